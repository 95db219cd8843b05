"""PALM (ICLR 2024, arXiv 2402.02653): embeddings as mixtures of von Mises-Fisher clusters around class prototypes.

The maximum-likelihood term pulls a sample to the prototypes it is assigned to, against all others; the contrast of
prototypes keeps those of a class together and classes apart. The latter reaches embeddings only through the moving
average, scaled by ``1 - momentum``: that is the authors' behaviour. Unlike theirs, evaluation mode leaves the
prototypes alone.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_positive
from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes.mixture import MixturePrototypes
from proto_core.systems import Paper

__all__ = ["PALMLoss"]


class PALMLoss(nn.Module):
    """``mean_i [logsumexp_j(z_i p_j / t) - sum_j Q_ij z_i p_j / t] + lambda_pcon * contrast of prototypes``.

    p are the prototypes after this batch's update, constant in the first term; Q the new assignment restricted to the
    entries that the update kept, rows of sum 1. In training mode forward writes the update into the buffer.

    Args:
        num_classes: C.
        embedding_dim: D.
        prototypes_per_class: K.
        momentum: of the prototypes.
        temperature: t.
        proto_temperature: of the contrast of prototypes.
        lambda_pcon: weight of that contrast; 0 leaves it out.
        epsilon: temperature of the assignment.
        sinkhorn_iterations: of the assignment.
        top_k: prototypes of its class that a sample is assigned to, at most; 0: all.
        gather_distributed: the joint batch of all ranks; without it, the ranks' prototypes drift apart.

    Attributes:
        prototypes: the :class:`~proto_core.prototypes.MixturePrototypes`.
        terms: after each forward, ``{"mle", "proto_contrast"}``, detached; they add up to the loss.

    Raises:
        ValueError: a temperature that is not positive, a negative weight, what the layer refuses; shapes or types that
            do not fit, a class outside 0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.losses import PALMLoss
        >>> loss = PALMLoss(num_classes=3, embedding_dim=8)
        >>> z = torch.nn.functional.normalize(torch.randn(6, 8))
        >>> value = loss(z, torch.arange(6) % 3)
        >>> torch.isclose(value, loss.terms["mle"] + loss.terms["proto_contrast"])
        tensor(True)
    """

    paper: ClassVar[Paper] = Paper(
        title="Learning with Mixture of Prototypes for Out-of-Distribution Detection",
        year=2024,
        arxiv="2402.02653",
        code="jeff024/PALM@eecb59a",
        evidence="code",
        summary="embeddings around several prototypes per class, for out-of-distribution detection",
        claim="several prototypes per class detect unknown inputs better than one",
    )

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 128,
        prototypes_per_class: int = 6,
        momentum: float = 0.999,
        temperature: float = 0.1,
        proto_temperature: float = 0.5,
        lambda_pcon: float = 1.0,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        top_k: int = 5,
        *,
        gather_distributed: bool = True,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, proto_temperature=proto_temperature)
        if lambda_pcon < 0:
            raise ValueError(f"lambda_pcon: found {lambda_pcon}, needed at least 0")
        self.prototypes = MixturePrototypes(
            num_classes, embedding_dim, prototypes_per_class, momentum, epsilon, sinkhorn_iterations, top_k
        )
        self.temperature = temperature
        self.proto_temperature = proto_temperature
        self.lambda_pcon = lambda_pcon
        self.gather_distributed = gather_distributed
        self.terms: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        """Settings that are not the layer's."""
        return (
            f"temperature={self.temperature}, proto_temperature={self.proto_temperature}, "
            f"lambda_pcon={self.lambda_pcon}"
        )

    def forward(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Loss of embeddings of norm 1; several views are stacked along N, with their labels repeated."""
        check_class_targets(embeddings, labels, "embeddings", classes=self.prototypes.num_classes)
        z = full_precision(embeddings)
        if self.gather_distributed:
            z, labels = self.prototypes.joint(z, labels)
        moved, selected = self.prototypes.update(z, labels)
        with no_autocast(z):
            mle = self._likelihood(z, moved.detach(), selected)
            contrast = self.lambda_pcon * self._contrast(moved) if self.lambda_pcon else mle.new_zeros(())
        if self.training:
            self.prototypes.set_(moved)
        self.terms = {"mle": mle.detach(), "proto_contrast": contrast.detach()}
        return mle + contrast

    def _likelihood(self, z: Tensor, prototypes: Tensor, selected: Tensor) -> Tensor:
        share = torch.where(selected, self.prototypes.assign(z, prototypes), 0)
        share = F.normalize(share, p=1, dim=1)
        logits = z @ prototypes.T / self.temperature
        return (logits.logsumexp(dim=1) - (share * logits).sum(dim=1)).mean()

    def _contrast(self, prototypes: Tensor) -> Tensor:
        unit = F.normalize(prototypes)
        similarity = unit @ unit.T / self.proto_temperature
        per_class = self.prototypes.prototypes_per_class
        if per_class > 1:
            # the row's maximum cancels; rows of one class are num_classes apart
            blocks = unit.view(per_class, self.prototypes.num_classes, -1)
            others = blocks.sum(dim=0) - blocks
            near = (others * blocks).sum(dim=2).flatten() / (self.proto_temperature * (per_class - 1))
        else:
            near = similarity.detach().amax(dim=1)
        return (similarity.fill_diagonal_(-torch.inf).logsumexp(dim=1) - near).mean()
