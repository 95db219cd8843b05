"""Losses on the part prototypes themselves: closeness, discrimination, orthogonality within a class, sparse heads.

ST-ProtoPNet (ICCV 2023, arXiv 2301.04011): support prototypes are drawn to those of other classes (closeness), trivial
ones pushed off (discrimination), as support vectors and the rest of a margin classifier; orthogonality and the
penalty on connections to other classes go back to TesNet and ProtoPNet. Products are of the raw vectors: the
prototypes are brought back to unit length after every step, not here. Prototypes stand class-major.
The authors' code takes the entrywise L1 norm for orthogonality; ``"fro2"`` is the squared Frobenius norm of TesNet's
formula.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from proto_core.checks import check_option
from proto_core.precision import full_precision, no_autocast

__all__ = ["ClosenessLoss", "DiscriminationLoss", "IncorrectConnectionL1Loss", "SubspaceOrthogonalityLoss"]


class ClosenessLoss(nn.Module):
    """Draw the furthest prototypes of any two classes together (ST-ProtoPNet, support prototypes).

    ``-(1 / (C (C - 1))) sum over ordered pairs of classes of the smallest product of a prototype of one with one of
    the other``.

    Raises:
        ValueError: fewer than two classes, prototypes that are not ``[P, D]`` or ``[P, D, 1, 1]``, or P not a multiple
            of the number of classes.

    Example:
        >>> import torch
        >>> from proto_core.losses import ClosenessLoss
        >>> ClosenessLoss()(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), 2)
        tensor(-0.6000)
    """

    def forward(self, prototypes: Shaped[Tensor, "P D *one"], num_classes: int) -> Float[Tensor, ""]:
        """Loss of a set of prototypes, class-major."""
        return -_mean_of_pairs(_class_products(prototypes, num_classes).amin(dim=(1, 3)))


class DiscriminationLoss(nn.Module):
    """Push the nearest prototypes of any two classes apart (ST-ProtoPNet, trivial prototypes).

    ``(1 / (C (C - 1))) sum over ordered pairs of classes of the largest product of a prototype of one with one of the
    other``.

    Raises:
        ValueError: fewer than two classes, prototypes that are not ``[P, D]`` or ``[P, D, 1, 1]``, or P not a multiple
            of the number of classes.

    Example:
        >>> import torch
        >>> from proto_core.losses import DiscriminationLoss
        >>> DiscriminationLoss()(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), 2)
        tensor(0.6000)
    """

    def forward(self, prototypes: Shaped[Tensor, "P D *one"], num_classes: int) -> Float[Tensor, ""]:
        """Loss of a set of prototypes, class-major."""
        return _mean_of_pairs(_class_products(prototypes, num_classes).amax(dim=(1, 3)))


class SubspaceOrthogonalityLoss(nn.Module):
    """Make the prototypes of each class orthonormal: ``sum over classes of the size of P_c P_c^T - I``.

    Args:
        norm: ``"l1"``, the sum of absolute entries (authors' code), or ``"fro2"``, the sum of squares.

    Raises:
        ValueError: unknown norm, prototypes that are not ``[P, D]`` or ``[P, D, 1, 1]``, or P not a multiple of the
            number of classes.

    Example:
        >>> import torch
        >>> from proto_core.losses import SubspaceOrthogonalityLoss
        >>> SubspaceOrthogonalityLoss()(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), 1).round(decimals=4)
        tensor(1.2000)
    """

    def __init__(self, norm: str = "l1") -> None:
        super().__init__()
        self.norm = check_option("norm", norm, "l1", "fro2")

    def extra_repr(self) -> str:
        """Settings."""
        return f"norm={self.norm!r}"

    def forward(self, prototypes: Shaped[Tensor, "P D *one"], num_classes: int) -> Float[Tensor, ""]:
        """Loss of a set of prototypes, class-major."""
        vectors = _vectors(prototypes, num_classes)
        classes = vectors.unflatten(0, (num_classes, -1))
        with no_autocast(vectors):
            excess = classes @ classes.mT - torch.eye(classes.shape[1], dtype=vectors.dtype, device=vectors.device)
        return excess.abs().sum() if self.norm == "l1" else excess.square().sum()


class IncorrectConnectionL1Loss(nn.Module):
    """``sum of |W_cj|`` over the weights from a prototype j to a class c that it does not stand for.

    Raises:
        ValueError: shapes that do not fit.

    Source:
        ProtoPNet's last stage; ST-ProtoPNet (arXiv 2301.04011).

    Example:
        >>> import torch
        >>> from proto_core.losses import IncorrectConnectionL1Loss
        >>> IncorrectConnectionL1Loss()(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.eye(2))
        tensor(1.)
    """

    def forward(self, weight: Float[Tensor, "C P"], class_identity: Shaped[Tensor, "P C"]) -> Float[Tensor, ""]:
        """Penalty of a head's weights, given the prototypes' classes."""
        if weight.ndim != 2 or tuple(class_identity.shape) != tuple(weight.shape[::-1]) or weight.numel() == 0:
            shapes = f"{tuple(weight.shape)} and {tuple(class_identity.shape)}"
            raise ValueError(f"weight, class_identity: found shapes {shapes}, needed [C, P] and [P, C] with C, P >= 1")
        return full_precision(weight).abs().masked_fill((class_identity != 0).T, 0).sum()


def _vectors(prototypes: Tensor, num_classes: int) -> Tensor:
    """Prototypes as ``[P, D]`` in full precision."""
    shape = tuple(prototypes.shape)
    if len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1)) or 0 in shape:
        raise ValueError(f"prototypes: found shape {shape}, needed [P, D] or [P, D, 1, 1]")
    if num_classes < 1 or shape[0] % num_classes:
        raise ValueError(f"prototypes: found {shape[0]} for {num_classes} classes, needed the same number for each")
    return full_precision(prototypes).flatten(1)


def _class_products(prototypes: Tensor, num_classes: int) -> Tensor:
    """Products of all prototypes as ``[C, K, C, K]``."""
    vectors = _vectors(prototypes, num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes: found {num_classes}, needed 2 at least: the loss speaks of pairs of classes")
    with no_autocast(vectors):
        products = vectors @ vectors.T
    return products.unflatten(1, (num_classes, -1)).unflatten(0, (num_classes, -1))


def _mean_of_pairs(matrix: Tensor) -> Tensor:
    """Mean of the entries off the diagonal."""
    classes = len(matrix)
    own = torch.eye(classes, dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(own, 0).sum() / (classes * (classes - 1))
