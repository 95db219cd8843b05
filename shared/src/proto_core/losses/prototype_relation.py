"""Prototype-sample relation distillation, PRD (ICML 2023, arXiv 2303.14771): keep old classes without old samples.

The similarities of NEW samples to OLD prototypes shall stay what they were. The authors' code compares, per sample, the
distribution over the classes of a head; the paper compares, per prototype, the distribution over the samples. Both are
here, with the teacher as the target as in the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets, check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.systems import Paper

__all__ = ["PrototypePullLoss", "PrototypeRelationDistillationLoss"]


class PrototypePullLoss(nn.Module):
    """``mean_i (1 - cos(P[y_i], f_i))``: prototypes move to their samples, nothing pushes them apart (equation 2).

    Args:
        stop_gradient: samples get no gradient.

    Raises:
        ValueError: shapes or types that do not fit, a label without a prototype.

    Example:
        >>> import torch
        >>> from proto_core.losses import PrototypePullLoss
        >>> PrototypePullLoss()(torch.eye(2), torch.tensor([0, 0]), torch.eye(2))
        tensor(0.5000)
    """

    def __init__(self, stop_gradient: bool = True) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient

    def extra_repr(self) -> str:
        """Settings."""
        return f"stop_gradient={self.stop_gradient}"

    def forward(
        self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"], prototypes: Float[Tensor, "C D"]
    ) -> Float[Tensor, ""]:
        """Loss of a batch."""
        if prototypes.ndim != 2 or embeddings.ndim != 2 or prototypes.shape[1] != embeddings.shape[1]:
            shapes = f"{tuple(embeddings.shape)} and {tuple(prototypes.shape)}"
            raise ValueError(f"embeddings, prototypes: found shapes {shapes}, needed [N, D] and [C, D]")
        check_class_targets(embeddings, labels, "embeddings", classes=len(prototypes))
        if self.stop_gradient:
            embeddings = embeddings.detach()
        own = unit_vectors(prototypes).index_select(0, labels.long())
        return (1 - (unit_vectors(embeddings) * own).sum(dim=1)).mean()


class PrototypeRelationDistillationLoss(nn.Module):
    """KL divergence of old from new similarities between this batch and the prototypes of old tasks (equation 3).

    ``classes``: for each head, softmax over its classes of ``<f, p / |p|> / T``, mean over samples, sum over heads; the
    features are not normalised, so that their norm acts as an inverse temperature. ``samples``: softmax over the batch
    of ``cos(f, p) / T`` for each prototype, sum over prototypes. No factor T^2.

    Args:
        temperature: T.
        relation: ``"classes"`` (authors' code) or ``"samples"`` (paper).
        normalize_features: ``None``: as said above.
        gather_distributed: the joint batch of all ranks, which ``"samples"`` needs.

    Raises:
        ValueError: temperature not positive, an unknown relation; features or prototypes that differ in shape from
            their old copies, another number of heads.

    Example:
        >>> import torch
        >>> from proto_core.losses import PrototypeRelationDistillationLoss
        >>> x, prototypes = torch.eye(3), torch.ones(2, 3)
        >>> PrototypeRelationDistillationLoss()(x, prototypes, x, prototypes)
        tensor(0.)
    """

    paper: ClassVar[Paper] = Paper(
        title="Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning",
        year=2023,
        arxiv="2303.14771",
        code="naderAsadi/Probing-Continual-Learning@8b82d53",
        evidence="code",
        summary="continual learning without stored samples: relations of new samples to old prototypes are kept",
        claim="accuracy over five tasks rises and forgetting falls against training without distillation",
    )

    def __init__(
        self,
        temperature: float = 1.0,
        relation: str = "classes",
        normalize_features: bool | None = None,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.relation = check_option("relation", relation, "classes", "samples")
        self.normalize_features = relation == "samples" if normalize_features is None else normalize_features
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"temperature={self.temperature}, relation={self.relation!r}, normalize_features={self.normalize_features}"
        )

    def forward(
        self,
        features: Float[Tensor, "N D"],
        prototypes: Tensor | Sequence[Tensor],
        old_features: Float[Tensor, "N D"],
        old_prototypes: Tensor | Sequence[Tensor],
    ) -> Float[Tensor, ""]:
        """Loss of a batch; prototypes are one tensor ``[C, D]`` or one per old task; the old get no gradient."""
        heads = [prototypes] if isinstance(prototypes, Tensor) else list(prototypes)
        old_heads = [old_prototypes] if isinstance(old_prototypes, Tensor) else list(old_prototypes)
        if features.ndim != 2 or features.shape != old_features.shape or len(features) == 0:
            shapes = f"{tuple(features.shape)} and {tuple(old_features.shape)}"
            raise ValueError(f"features, old_features: found shapes {shapes}, needed one [N, D] with N at least 1")
        if len(heads) != len(old_heads):
            raise ValueError(f"old_prototypes: found {len(old_heads)} heads, needed {len(heads)}")
        for number, (head, old) in enumerate(zip(heads, old_heads)):
            if head.ndim != 2 or head.shape != old.shape or head.shape[1] != features.shape[1]:
                shapes = f"{tuple(head.shape)} and {tuple(old.shape)}"
                raise ValueError(
                    f"prototypes, old_prototypes: found shapes {shapes} in head {number}, "
                    f"needed one [C, {features.shape[1]}]"
                )
        ready = unit_vectors if self.normalize_features else full_precision
        new, old = ready(features), ready(old_features.detach())
        if self.gather_distributed:
            new, old = gather_with_grad(new), gather_with_grad(old)
        axis = 1 if self.relation == "classes" else 0
        loss = new.sum() * 0
        with no_autocast(new):
            for head, old_head in zip(heads, old_heads):
                scores = new @ unit_vectors(head).to(new).T / self.temperature
                target = old @ unit_vectors(old_head.detach()).to(old).T / self.temperature
                log_p, log_q = scores.log_softmax(dim=axis), target.log_softmax(dim=axis)
                divergence = (log_q.exp() * (log_q - log_p)).sum()
                loss = loss + (divergence / len(new) if axis == 1 else divergence)
        return loss
