"""Losses among prototypes, by the cosines between them: diversity, and contrast by the classes' co-occurrence.

Source: ProtoECGNet (2025, arXiv 2504.08713), equations of its section on the training objective.
Differences from the authors' code: the cosines are computed once where both losses need them, the symmetric product
from half of its blocks; a zero prototype gets a zero gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.prototypes.classes import check_identity_on_cpu

__all__ = [
    "DiversityLoss",
    "PrototypeContrastiveLoss",
    "contrastive_of_gram",
    "diversity_of_gram",
    "prototype_gram",
]


class DiversityLoss(nn.Module):
    """Keep prototypes apart: ``sum((G - I)^2) / P^2`` with G the cosines between prototypes (ProtoECGNet).

    All P x P entries are summed, so each pair counts twice.

    Raises:
        ValueError: prototypes without a feature dimension.

    Example:
        >>> import torch
        >>> from proto_core.losses import DiversityLoss
        >>> DiversityLoss()(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        tensor(0.5000)
    """

    def forward(self, prototypes: Shaped[Tensor, "P *features"]) -> Float[Tensor, ""]:
        """Loss of a set of prototypes, flattened after the first dimension."""
        return diversity_of_gram(prototype_gram(prototypes))


class PrototypeContrastiveLoss(nn.Module):
    """Prototypes of classes that occur together shall be alike, the others not (ProtoECGNet, contrastive term).

    ``S = clamp(G, -1 + eps, 1 - eps)`` with G the cosines between prototypes, ``A = I L I^T`` with I the class identity
    and L the classes' co-occurrence, ``B = 1 - A``;
    ``loss = -(sum(S A) / (sum A + eps) - sum(S B) / (sum B + eps)) / sqrt(P)``.
    The diagonal is part of the sums; the clamp takes its gradient away. Prototypes of several classes can make A larger
    than 1 and B negative: the formula stands.

    Args:
        eps: margin of the clamp and guard of the denominators.

    Raises:
        ValueError: ``eps`` not positive; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import PrototypeContrastiveLoss
        >>> loss = PrototypeContrastiveLoss()
        >>> loss(torch.eye(2), torch.eye(2), torch.eye(2))
        tensor(-0.7071)
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps: found {eps}, needed a positive number")
        self.eps = eps

    def extra_repr(self) -> str:
        """Settings."""
        return f"eps={self.eps}"

    def forward(
        self,
        prototypes: Shaped[Tensor, "P *features"],
        class_identity: Shaped[Tensor, "P C"],
        cooccurrence: Shaped[Tensor, "C C"],
    ) -> Float[Tensor, ""]:
        """Loss of a set of prototypes, their classes, and the classes' co-occurrence."""
        return contrastive_of_gram(prototype_gram(prototypes), class_identity, cooccurrence, self.eps)


def prototype_gram(prototypes: Shaped[Tensor, "P *features"]) -> Float[Tensor, "P P"]:
    """Cosines between all prototypes, each flattened; computed once where two losses need it.

    Raises:
        ValueError: prototypes without a feature dimension.

    Example:
        >>> import torch
        >>> from proto_core.losses import prototype_gram
        >>> prototype_gram(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    if prototypes.ndim < 2 or prototypes.numel() == 0:
        raise ValueError(f"prototypes: found shape {tuple(prototypes.shape)}, needed [P, ...] with P >= 1 and features")
    return _Cosines.apply(full_precision(prototypes.flatten(1)))


def diversity_of_gram(gram: Float[Tensor, "P P"]) -> Float[Tensor, ""]:
    """:class:`DiversityLoss` of the prototypes' cosines."""
    return F.mse_loss(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def contrastive_of_gram(
    gram: Float[Tensor, "P P"],
    class_identity: Shaped[Tensor, "P C"],
    cooccurrence: Shaped[Tensor, "C C"],
    eps: float = 1e-6,
) -> Float[Tensor, ""]:
    """:class:`PrototypeContrastiveLoss` of the prototypes' cosines."""
    prototypes, classes = len(gram), cooccurrence.shape[-1]
    if tuple(class_identity.shape) != (prototypes, classes) or tuple(cooccurrence.shape) != (classes, classes):
        raise ValueError(
            f"class_identity, cooccurrence: found shapes {tuple(class_identity.shape)} and "
            f"{tuple(cooccurrence.shape)}, needed [P, C] and [C, C] with P = {prototypes}"
        )
    check_identity_on_cpu(class_identity)
    with no_autocast(gram), torch.no_grad():
        identity = class_identity.to(gram)
        related = identity @ cooccurrence.to(gram) @ identity.T
        attract = 1 / (related.sum() + eps)
        repel = 1 / ((1 - related).sum() + eps)
        # lerp is exact at both ends: where all is related, repel = 1 / (0 + eps) must meet zeros
        weight = torch.lerp(-repel, attract, related)
    # hardtanh is a clamp whose backward pass is one kernel
    return -(F.hardtanh(gram, -1 + eps, 1 - eps) * weight).sum() / prototypes**0.5


_BLOCKED_FROM = 512
"""Prototypes from which on half of the product saves more than its smaller blocks cost."""
_BLOCKS = 6
_SMALLEST_NORM = 1e-12


class _Cosines(torch.autograd.Function):
    """Cosines between all rows, ``unit_vectors(x) unit_vectors(x)^T``, in fewer products than autograd's rules need.

    The forward product is symmetric, so large ones are made of the blocks on and above the diagonal. The backward pass
    is one product, not two, and the normalisation's is folded into it.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        unit = unit_vectors(x, _SMALLEST_NORM)
        with no_autocast(x):
            return unit @ unit.T if len(x) < _BLOCKED_FROM else _symmetric_product(unit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.where(norm > 0, norm.clamp_min(_SMALLEST_NORM).reciprocal(), 0)
        unit = x * scale
        with no_autocast(x):
            pull = (grads[0] + grads[0].T) @ unit
        # a change of length changes no direction, unless the length is below the smallest that is divided by
        along = torch.where(norm >= _SMALLEST_NORM, (pull * unit).sum(dim=-1, keepdim=True), 0)
        return torch.addcmul(pull * scale, unit, along * scale, value=-1)


def _symmetric_product(x: Float[Tensor, "P D"]) -> Float[Tensor, "P P"]:
    """``x x^T`` from the blocks on and above its diagonal; the others are their mirror images."""
    product = x.new_empty(len(x), len(x))
    step = -(-len(x) // _BLOCKS)
    for start in range(0, len(x), step):
        stop = start + step
        rows = x[start:stop] @ x[start:].T
        product[start:stop, start:] = rows
        product[stop:, start:stop] = rows[:, step:].T
    return product
