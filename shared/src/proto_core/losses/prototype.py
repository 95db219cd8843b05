"""Losses between samples and prototypes: cluster and separation, for several labels per sample and for one.

Multi-label forms: ProtoECGNet (2025, arXiv 2504.08713), equations of its section on the training objective.
Single-label forms: ProtoPNet's pair as ST-ProtoPNet uses it (ICCV 2023, arXiv 2301.04011).
``class_identity [P, C]`` is 1 where prototype p stands for class c; a prototype may stand for several classes.
Besides the reading of the authors' code ("reference", "multiply": similarity times mask, so that entries off the mask
count as 0) there is the one their prose suggests ("strict", "exclude": entries off the mask are left out).
All of them: half precision in, float32 inside; 0 with zero gradient on an empty set; no host synchronisation.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from proto_core.distributed import joint_mean
from proto_core.losses.extremum import masked_maximum
from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes.classes import check_identity_on_cpu

__all__ = [
    "ClusterLoss",
    "MultiLabelClusterLoss",
    "MultiLabelSeparationLoss",
    "SeparationLoss",
]


class MultiLabelClusterLoss(nn.Module):
    """Pull every sample to a prototype of each of its classes (ProtoECGNet, cluster term).

    With ``M[n, p, c] = class_identity[p, c] * targets[n, c]``:

    - ``masking="reference"``: ``-mean over all n and all c of max_p(s[n, p] M[n, p, c])``; absent classes contribute
      0, and so does a present class whose prototypes are all negative (unless every prototype is of that class).
    - ``masking="strict"``: ``-mean over the pairs (n, c) with targets[n, c] = 1 of max over the prototypes of c``;
      classes without a prototype are left out.

    Args:
        masking: ``"reference"`` or ``"strict"``.
        gather_distributed: divide by the joint batch's count, so that DDP's mean over ranks is the joint batch's loss.

    Raises:
        ValueError: unknown masking; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import MultiLabelClusterLoss
        >>> loss = MultiLabelClusterLoss()
        >>> loss(torch.tensor([[0.8, 0.2]]), torch.tensor([[1.0, 0.0]]), torch.eye(2))
        tensor(-0.4000)
    """

    def __init__(self, masking: str = "reference", *, gather_distributed: bool = False) -> None:
        super().__init__()
        self.masking = _one_of(masking, "reference", "strict")
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return f"masking={self.masking!r}, gather_distributed={self.gather_distributed}"

    def forward(
        self,
        similarities: Float[Tensor, "N P"],
        targets: Shaped[Tensor, "N C"],
        class_identity: Shaped[Tensor, "P C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch: similarities, multi-hot targets, and the prototypes' classes."""
        similarities, present, member = _multi_label(similarities, targets, class_identity)
        rows, classes, wanted = _present_pairs(present)
        fill = 0.0 if self.masking == "reference" else -torch.inf
        maximum, found = masked_maximum(similarities, member.T[classes], fill=fill, rows=rows)
        counted = wanted & found
        total = -torch.where(counted, maximum, 0).sum()
        count = _full_count(present) if self.masking == "reference" else counted.sum()
        return _mean(total, count, self.gather_distributed)


class MultiLabelSeparationLoss(nn.Module):
    """Push every sample away from prototypes of other classes (ProtoECGNet, separation term).

    With ``M[n, p, c] = class_identity[p, c] * targets[n, c]``:

    - ``masking="reference"``: ``mean over all n and all c of max_p(s[n, p] (1 - M[n, p, c]))``; for a class that is
      absent from the sample this is the highest similarity to any prototype.
    - ``masking="strict"``: mean, over the samples that have a prototype sharing no class with them, of the highest
      similarity to such prototypes.

    Args:
        masking: ``"reference"`` or ``"strict"``.
        gather_distributed: divide by the joint batch's count, so that DDP's mean over ranks is the joint batch's loss.

    Raises:
        ValueError: unknown masking; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import MultiLabelSeparationLoss
        >>> loss = MultiLabelSeparationLoss(masking="strict")
        >>> loss(torch.tensor([[0.8, 0.2]]), torch.tensor([[1.0, 0.0]]), torch.eye(2))
        tensor(0.2000)
    """

    def __init__(self, masking: str = "reference", *, gather_distributed: bool = False) -> None:
        super().__init__()
        self.masking = _one_of(masking, "reference", "strict")
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return f"masking={self.masking!r}, gather_distributed={self.gather_distributed}"

    def forward(
        self,
        similarities: Float[Tensor, "N P"],
        targets: Shaped[Tensor, "N C"],
        class_identity: Shaped[Tensor, "P C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch: similarities, multi-hot targets, and the prototypes' classes."""
        similarities, present, member = _multi_label(similarities, targets, class_identity)
        if self.masking == "strict":
            with no_autocast(similarities):
                unrelated = present.to(similarities) @ member.T.to(similarities) == 0
            maximum, found = masked_maximum(similarities, unrelated, fill=-torch.inf)
            return _mean(maximum.sum(), found.sum(), self.gather_distributed)
        rows, classes, wanted = _present_pairs(present)
        foreign, _ = masked_maximum(similarities, ~member.T[classes], fill=0.0, rows=rows)
        anything = similarities.max(dim=1).values * (~present).sum(dim=1)
        total = anything.sum() + torch.where(wanted, foreign, 0).sum()
        return _mean(total, _full_count(present), self.gather_distributed)


class ClusterLoss(nn.Module):
    """Pull every sample to a prototype of its class: ``-mean_n max over the prototypes of class y_n of s[n, p]``.

    Args:
        masking: ``"exclude"`` leaves other classes' prototypes out; ``"multiply"`` lets them count as 0, as ProtoPNet's
            code does.

    Raises:
        ValueError: unknown masking; shapes that do not fit; a target without a class.

    Example:
        >>> import torch
        >>> from proto_core.losses import ClusterLoss
        >>> ClusterLoss()(torch.tensor([[0.8, 0.2]]), torch.tensor([1]), torch.eye(2))
        tensor(-0.2000)
    """

    def __init__(self, masking: str = "exclude") -> None:
        super().__init__()
        self.masking = _one_of(masking, "exclude", "multiply")

    def extra_repr(self) -> str:
        """Settings."""
        return f"masking={self.masking!r}"

    def forward(
        self,
        similarities: Float[Tensor, "N P"],
        targets: Int[Tensor, "N"],
        class_identity: Shaped[Tensor, "P C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch: similarities, class indices, and the prototypes' classes."""
        similarities, own = _single_label(similarities, targets, class_identity)
        maximum, _ = masked_maximum(similarities, own, fill=_fill(self.masking))
        return -maximum.sum() / max(len(maximum), 1)


class SeparationLoss(nn.Module):
    """Push every sample from other classes' prototypes: ``mean_n max over prototypes not of class y_n of s[n, p]``.

    Args:
        masking: ``"exclude"`` leaves the own class's prototypes out; ``"multiply"`` lets them count as 0, as
            ProtoPNet's code does.

    Raises:
        ValueError: unknown masking; shapes that do not fit; a target without a class; a single class where there must
            be another one ("exclude").

    Example:
        >>> import torch
        >>> from proto_core.losses import SeparationLoss
        >>> SeparationLoss()(torch.tensor([[0.8, 0.2]]), torch.tensor([1]), torch.eye(2))
        tensor(0.8000)
    """

    def __init__(self, masking: str = "exclude") -> None:
        super().__init__()
        self.masking = _one_of(masking, "exclude", "multiply")

    def extra_repr(self) -> str:
        """Settings."""
        return f"masking={self.masking!r}"

    def forward(
        self,
        similarities: Float[Tensor, "N P"],
        targets: Int[Tensor, "N"],
        class_identity: Shaped[Tensor, "P C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch: similarities, class indices, and the prototypes' classes."""
        similarities, own = _single_label(similarities, targets, class_identity)
        if self.masking == "exclude" and class_identity.shape[1] < 2:
            raise ValueError("class_identity: found 1 class, needed 2 at least: there is nothing to separate from")
        maximum, _ = masked_maximum(similarities, ~own, fill=_fill(self.masking))
        return maximum.sum() / max(len(maximum), 1)


def _one_of(masking: str, *known: str) -> str:
    if masking not in known:
        raise ValueError(f"masking: found {masking!r}, needed one of {', '.join(known)}")
    return masking


def _fill(masking: str) -> float:
    return -torch.inf if masking == "exclude" else 0.0


def _multi_label(similarities: Tensor, targets: Tensor, class_identity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities in full precision, and whether a class is present [N, C] and a prototype its member [P, C]."""
    shapes = [tuple(tensor.shape) for tensor in (similarities, targets, class_identity)]
    if (
        [len(shape) for shape in shapes] != [2, 2, 2]
        or shapes[0][0] != shapes[1][0]
        or shapes[2] != (shapes[0][1], shapes[1][1])
        or 0 in shapes[2]
    ):
        raise ValueError(
            f"similarities, targets, class_identity: found shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, "
            "needed [N, P], [N, C] and [P, C] with P, C >= 1"
        )
    check_identity_on_cpu(class_identity)
    return full_precision(similarities), targets != 0, class_identity != 0


def _single_label(similarities: Tensor, targets: Tensor, class_identity: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities in full precision, and whether a prototype is of the sample's class [N, P]."""
    shapes = [tuple(tensor.shape) for tensor in (similarities, targets, class_identity)]
    if (
        [len(shape) for shape in shapes] != [2, 1, 2]
        or shapes[0][0] != shapes[1][0]
        or shapes[2][0] != shapes[0][1]
        or 0 in shapes[2]
    ):
        raise ValueError(
            f"similarities, targets, class_identity: found shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, "
            "needed [N, P], [N] and [P, C] with P, C >= 1"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets: found {targets.dtype}, needed integers")
    check_identity_on_cpu(class_identity)
    if not torch.compiler.is_compiling() and targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= shapes[2][1]:
            raise ValueError(f"targets: found values from {low} to {high}, needed 0 to {shapes[2][1] - 1}")
    return full_precision(similarities), (class_identity != 0).T[targets.long()]


def _present_pairs(
    present: Bool[Tensor, "N C"],
) -> tuple[Int[Tensor, "R"], Int[Tensor, "R"], Bool[Tensor, "R"]]:
    """Pairs (sample, class) that hold all present labels: sample, class, and whether the label is present.

    Looking only at present labels saves most of the work, but their number is known without waiting only on the CPU;
    elsewhere, and in a compiled graph, all N x C pairs are looked at.
    """
    if present.device.type == "cpu" and not torch.compiler.is_compiling():
        rows, classes = present.nonzero(as_tuple=True)
        return rows, classes, torch.ones_like(rows, dtype=torch.bool)
    samples, labels = present.shape
    rows = torch.arange(samples, device=present.device).unsqueeze(1).expand(samples, labels).reshape(-1)
    classes = torch.arange(labels, device=present.device).expand(samples, labels).reshape(-1)
    return rows, classes, present.reshape(-1)


def _full_count(present: Bool[Tensor, "N C"]) -> Int[Tensor, ""]:
    return torch.full((), present.shape[0] * present.shape[1], device=present.device)


def _mean(total: Float[Tensor, ""], count: Int[Tensor, ""], joint: bool) -> Float[Tensor, ""]:
    return joint_mean(total, count) if joint else total / count.clamp_min(1)
