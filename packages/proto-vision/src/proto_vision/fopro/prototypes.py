"""FoPro's prototypes: from a few trusted embeddings, polished by clean ones, each with a density of its own.

Source: "FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning", AAAI 2023, arXiv 2212.00465. Differences
from the authors' code: a batch is polished at once, not row by row; a class that nothing visited keeps its density.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from proto_core.checks import check_class_targets
from proto_core.precision import full_precision, no_autocast, unit_vectors

__all__ = ["initial_prototypes", "polish_prototypes", "prototype_density"]

LEAST_DENSITY = 1e-3


def initial_prototypes(
    embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"], num_classes: int
) -> Float[Tensor, "K D"]:
    """Unit vectors along the mean embedding of each class; zeros for a class without any.

    Args:
        embeddings: of trusted images.
        labels: their classes.
        num_classes: K.

    Raises:
        ValueError: shapes that do not fit, labels outside 0..K-1.

    Source:
        arXiv 2212.00465, equation 2.

    Example:
        >>> import torch
        >>> from proto_vision.fopro import initial_prototypes
        >>> initial_prototypes(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 1]), 2)
        tensor([[0., 0.],
                [1., 0.]])
    """
    check_class_targets(embeddings, labels, what="embeddings", classes=num_classes, empty=True)
    embeddings, labels = full_precision(embeddings), labels.long()
    total = embeddings.new_zeros(num_classes, embeddings.shape[1]).index_add(0, labels, embeddings)
    return unit_vectors(total / (torch.bincount(labels, minlength=num_classes)[:, None] + 1e-6))


def prototype_density(
    distance: Float[Tensor, "K"], visited: Float[Tensor, "K"], *, previous: Float[Tensor, "K"] | None = None
) -> Float[Tensor, "K"]:
    """How widely a class is spread about its prototype: ``distance / (visited log(visited + 10) + 1e-7)``.

    Args:
        distance: sum of the distances of what visited it.
        visited: how many.
        previous: density that a class without a visit keeps.

    Returns:
        At least 1e-3: logits are divided by it.

    Source:
        arXiv 2212.00465, section 3.3.

    Example:
        >>> import torch
        >>> from proto_vision.fopro import prototype_density
        >>> prototype_density(torch.tensor([5.0, 0.0]), torch.tensor([10.0, 0.0]), previous=torch.tensor([0.1, 0.2]))
        tensor([0.1669, 0.2000])
    """
    distance, visited = full_precision(distance), full_precision(visited)
    density = distance / (visited * (visited + 10).log() + 1e-7)
    if previous is not None:
        density = torch.where(visited > 0, density, previous.to(density))
    return density.clamp_min(LEAST_DENSITY)


@torch.no_grad()
def polish_prototypes(
    prototypes: Float[Tensor, "K D"],
    embeddings: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    mask: Bool[Tensor, "N"],
    momentum: float,
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"], Float[Tensor, "K"]]:
    """Move prototypes towards embeddings of a batch, in its order: ``c_y := m c_y + (1 - m) k``, then all to norm 1.

    At once: ``m^n c + (1 - m) sum_i m^(n - i) k_i`` for a class with n rows.

    Args:
        prototypes: c.
        embeddings: k, of norm 1.
        labels: y; those of masked rows do not count.
        mask: which rows take part.
        momentum: m.

    Returns:
        The new prototypes, the number of visits of each class, and the sum of its visits' distances to the prototype as
        it was before. The arguments stay as they are.

    Raises:
        ValueError: shapes that do not fit, labels outside 0..K-1.

    Source:
        arXiv 2212.00465, equation 7.

    Example:
        >>> import torch
        >>> from proto_vision.fopro import polish_prototypes
        >>> new, visited, _ = polish_prototypes(
        ...     torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([True]), 0.5
        ... )
        >>> new, visited
        (tensor([[0.7071, 0.7071],
                [0.0000, 1.0000]]), tensor([1., 0.]))
    """
    check_class_targets(embeddings, labels, what="embeddings", classes=len(prototypes), empty=True)
    prototypes = full_precision(prototypes)
    embeddings, labels = full_precision(embeddings).to(prototypes.dtype), labels.long()
    takes = F.one_hot(labels, len(prototypes)) * mask[:, None]
    visits = takes.sum(0)
    later = visits - takes.cumsum(0)
    keep = torch.full((), momentum, dtype=prototypes.dtype, device=prototypes.device)
    shares = (1 - keep) * takes * keep**later
    distances = torch.linalg.vector_norm(embeddings - prototypes[labels], dim=1)
    takes = takes.to(prototypes.dtype)
    with no_autocast(embeddings):
        moved = keep ** visits[:, None] * prototypes + shares.mT @ embeddings
        return unit_vectors(moved), takes.sum(0), takes.mT @ distances
