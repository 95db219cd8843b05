"""The losses of ProtoGCD: entropy of the mean prediction, separation of prototypes, and the weighted sum of all terms.

Source: "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery", TPAMI 2025, arXiv
2504.03755, section 4. Differences from the authors' code: a batch without a labelled image gives 0 instead of NaN, no
mask is cast to single precision, every term runs on any device, and several processes take the terms over their joint
batch.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_positive, readable
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import masked_logsumexp
from proto_core.precision import full_precision, no_autocast
from proto_vision.protogcd.contrast import contrast_taken, rows_of_views, view_contrastive_loss
from proto_vision.protogcd.pseudo_labels import DAPLLoss

__all__ = ["EntropyRegularizationLoss", "ProtoGCDLoss", "PrototypeSeparationLoss"]

_CONTRASTIVE_TEMPERATURE = 1.0
_SUPERVISED_TEMPERATURE = 0.07


class EntropyRegularizationLoss(nn.Module):
    """How far the mean prediction is from uniform: ``sum_k pbar_k log pbar_k + log K``, at least 0.

    ``pbar`` is the mean over all rows of ``softmax(logits / tau)``.

    Args:
        temperature: tau.

    Shapes:
        ``[N, K]`` -> scalar.

    Raises:
        ValueError: a temperature that is not positive; another shape.

    Source:
        arXiv 2504.03755, section 4.3.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import EntropyRegularizationLoss
        >>> EntropyRegularizationLoss()(torch.eye(4)).abs() < 1e-6
        tensor(True)
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def extra_repr(self) -> str:
        """Settings."""
        return f"temperature={self.temperature}"

    def forward(self, logits: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
        """Loss of a batch; 0 for an empty one."""
        if logits.ndim != 2:
            raise ValueError(f"logits: found shape {tuple(logits.shape)}, needed [N, K]")
        rows, classes = logits.shape
        if rows == 0:
            return full_precision(logits).sum()
        log_mean = (full_precision(logits) / self.temperature).log_softmax(1).logsumexp(0) - math.log(rows)
        return (log_mean.exp() * log_mean).sum() + math.log(classes)


class PrototypeSeparationLoss(nn.Module):
    """Prototypes apart: ``(tau / tau_base) mean_i log [ mean_{j != i} exp(<p_i, p_j> / tau) ]``.

    Args:
        temperature: tau.
        base_temperature: tau_base.

    Shapes:
        ``[K, D]``, taken as they are -> scalar; 0 for one prototype.

    Raises:
        ValueError: a temperature that is not positive; another shape.

    Source:
        arXiv 2504.03755, section 4.3.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import PrototypeSeparationLoss
        >>> PrototypeSeparationLoss()(torch.eye(3))
        tensor(0.)
    """

    def __init__(self, temperature: float = 0.1, base_temperature: float = 0.1) -> None:
        super().__init__()
        check_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature, self.base_temperature = temperature, base_temperature

    def extra_repr(self) -> str:
        """Settings."""
        return f"temperature={self.temperature}, base_temperature={self.base_temperature}"

    def forward(self, prototypes: Float[Tensor, "K D"]) -> Float[Tensor, ""]:
        """Loss of the prototypes."""
        if prototypes.ndim != 2:
            raise ValueError(f"prototypes: found shape {tuple(prototypes.shape)}, needed [K, D]")
        p = full_precision(prototypes)
        count = len(p)
        if count < 2:
            return p.sum() * 0
        with no_autocast(p):
            similarity = p @ p.T / self.temperature
        others = ~torch.eye(count, dtype=torch.bool, device=p.device)
        apart = masked_logsumexp(similarity, others) - math.log(count - 1)
        return apart.mean() * (self.temperature / self.base_temperature)


class ProtoGCDLoss(nn.Module):
    """All terms of ProtoGCD on two views of a batch.

    ``total = (1 - w) (dapl + w_e entropy + w_s separation + contrastive) + w (cls + sup_contrastive)``; cls is the
    cross-entropy of ``logits / tau`` on both views of the labelled images.

    Args:
        num_epochs: see :class:`DAPLLoss`.
        weight_sup: w.
        weight_entropy: w_e.
        weight_separation: w_s.
        temperature: tau of cls, of the student, of entropy and separation.
        teacher_temperature: see :class:`DAPLLoss`.
        wait_epochs: see :class:`DAPLLoss`.
        ramp_epochs: see :class:`DAPLLoss`.
        init_ratio: see :class:`DAPLLoss`.
        final_ratio: see :class:`DAPLLoss`.
        gather_distributed: take all terms over the joint batch of all ranks.

    Shapes:
        projections ``[2 N, P]``, logits ``[2 N, K]``, prototypes ``[K, D]``, labels ``[N]``, labelled ``[N]`` (bool or
        0/1; the labels of other images are not looked at) -> dict of scalars ``total``, ``dapl``, ``entropy``,
        ``separation``, ``contrastive``, ``cls``, ``sup_contrastive``.

    Raises:
        ValueError: shapes that do not fit, labels that are no integers or, of a labelled image, outside
            0..K-1, and what the terms refuse.

    Source:
        arXiv 2504.03755, section 4.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import ProtoGCDLoss
        >>> x, labels = torch.randn(8, 5), torch.tensor([0, 1, 0, 0])
        >>> labelled = torch.tensor([True, True, False, False])
        >>> terms = ProtoGCDLoss()(x, x, torch.eye(5), labels, labelled, epoch=0)
        >>> list(terms)
        ['total', 'dapl', 'entropy', 'separation', 'contrastive', 'cls', 'sup_contrastive']
    """

    def __init__(
        self,
        num_epochs: int = 200,
        *,
        weight_sup: float = 0.35,
        weight_entropy: float = 2.0,
        weight_separation: float = 0.1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.05,
        wait_epochs: int = 0,
        ramp_epochs: int = 100,
        init_ratio: float = 0.0,
        final_ratio: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= weight_sup <= 1:
            raise ValueError(f"weight_sup: found {weight_sup}, needed a share in [0, 1]")
        for name, weight in (("weight_entropy", weight_entropy), ("weight_separation", weight_separation)):
            if weight < 0:
                raise ValueError(f"{name}: found {weight}, needed at least 0")
        self.weight_sup, self.weight_entropy, self.weight_separation = weight_sup, weight_entropy, weight_separation
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.dapl = DAPLLoss(
            num_epochs,
            wait_epochs=wait_epochs,
            ramp_epochs=ramp_epochs,
            init_ratio=init_ratio,
            final_ratio=final_ratio,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
        )
        self.entropy = EntropyRegularizationLoss(temperature)
        self.separation = PrototypeSeparationLoss(temperature)

    def extra_repr(self) -> str:
        """Weights."""
        return (
            f"weight_sup={self.weight_sup}, weight_entropy={self.weight_entropy}, "
            f"weight_separation={self.weight_separation}"
        )

    def forward(
        self,
        projections: Float[Tensor, "rows P"],
        logits: Float[Tensor, "rows K"],
        prototypes: Float[Tensor, "K D"],
        labels: Int[Tensor, "N"],
        labelled: Shaped[Tensor, "N"],
        epoch: int,
    ) -> dict[str, Tensor]:
        """Every term and the total."""
        rows = rows_of_views(logits, 2, "logits")
        if len(projections) != len(logits) or labels.shape != (rows,) or labelled.shape != (rows,):
            shapes = f"{tuple(projections.shape)}, {tuple(logits.shape)}, {tuple(labels.shape)}"
            raise ValueError(
                f"projections, logits, labels, labelled: found shapes {shapes} and {tuple(labelled.shape)}, needed "
                f"[2 N, P], [2 N, K], [N] and [N]"
            )
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels: found {labels.dtype}, needed integers")
        known = labelled.bool()
        targets = torch.where(known, labels.long(), 0)
        if readable(targets) and bool(((targets < 0) | (targets >= logits.shape[1])).any()):
            wrong = targets[(targets < 0) | (targets >= logits.shape[1])][0]
            raise ValueError(f"labels: found {int(wrong)}, needed classes 0 to {logits.shape[1] - 1} where labelled")
        if self.gather_distributed:
            projections, logits = (_joint_views(part, 2) for part in (projections, logits))
            targets, known = gather_with_grad(targets), gather_with_grad(known)
        targets, known = targets.repeat(2), known.repeat(2)
        terms = {
            "dapl": self.dapl(logits, epoch),
            "entropy": self.entropy(logits),
            "separation": self.separation(prototypes),
            "contrastive": view_contrastive_loss(projections, temperature=_CONTRASTIVE_TEMPERATURE),
            "cls": self._classification(logits, targets, known),
            "sup_contrastive": contrast_taken(projections, targets, known, _SUPERVISED_TEMPERATURE),
        }
        free = terms["dapl"] + self.weight_entropy * terms["entropy"] + self.weight_separation * terms["separation"]
        taught = terms["cls"] + terms["sup_contrastive"]
        total = (1 - self.weight_sup) * (free + terms["contrastive"]) + self.weight_sup * taught
        return {"total": total, **terms}

    def _classification(
        self, logits: Float[Tensor, "rows K"], targets: Int[Tensor, "rows"], known: Bool[Tensor, "rows"]
    ) -> Float[Tensor, ""]:
        per_row = F.cross_entropy(full_precision(logits) / self.temperature, targets, reduction="none")
        return torch.where(known, per_row, 0).sum() / known.sum().clamp_min(1)


def _joint_views(stacked: Float[Tensor, "rows F"], views: int) -> Float[Tensor, "joint F"]:
    """The joint batch of all ranks, view after view as before."""
    images = stacked.unflatten(0, (views, -1)).transpose(0, 1)
    return gather_with_grad(images.contiguous()).transpose(0, 1).flatten(0, 1)
