"""The contrastive terms of ProtoGCD: views of one image, and images of one label.

Source: "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery", TPAMI 2025, arXiv
2504.03755, section 4.1. Differences from the authors' code: any number of views, any device, and 0 where no row has a
positive.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from proto_core.checks import check_embeddings, check_positive
from proto_core.losses import SupConLoss
from proto_core.losses.pairs import masked_logsumexp, same_label
from proto_core.precision import full_precision, no_autocast, unit_vectors

__all__ = ["check_views", "contrast_taken", "rows_of_views", "supervised_contrastive_loss", "view_contrastive_loss"]


def view_contrastive_loss(
    projections: Float[Tensor, "rows P"], *, num_views: int = 2, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Views of one image are positives, all other rows are negatives; the mean over rows and positives.

    Args:
        projections: ``[V N, P]``, view after view; normalised here.
        num_views: V.
        temperature: of the softmax over all other rows.

    Returns:
        The loss; 0 for an empty batch, and for one image with two views.

    Raises:
        ValueError: fewer than two views, rows that are no whole number of views, a temperature that is not positive.

    Source:
        arXiv 2504.03755, section 4.1.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import view_contrastive_loss
        >>> view_contrastive_loss(torch.eye(2).repeat(2, 1)).round(decimals=4)
        tensor(0.5514)
    """
    check_positive(temperature=temperature)
    check_views(num_views)
    rows = rows_of_views(projections, num_views, "projections")
    if rows == 0:
        return full_precision(projections).sum()
    images = torch.arange(rows, device=projections.device).repeat(num_views)
    return SupConLoss(temperature, temperature)(projections, images)


def supervised_contrastive_loss(
    embeddings: Float[Tensor, "M P"], labels: Int[Tensor, "M"], *, temperature: float = 0.07
) -> Float[Tensor, ""]:
    """Rows of one label are positives; an anchor without a positive counts as 0 in the mean over all M anchors.

    Args:
        embeddings: ``[M, P]``; normalised here.
        labels: ``[M]``.
        temperature: of the softmax over all other rows.

    Returns:
        The loss; 0 for fewer than two rows.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive.

    Source:
        arXiv 2504.03755, section 4.1.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import supervised_contrastive_loss
        >>> supervised_contrastive_loss(torch.eye(2), torch.tensor([3, 3]))
        tensor(0.)
    """
    check_positive(temperature=temperature)
    if embeddings.ndim == 2 and labels.ndim == 1 and len(embeddings) == len(labels) < 2:
        return full_precision(embeddings).sum() * 0
    check_embeddings(embeddings, labels)
    return contrast_taken(embeddings, labels, torch.ones_like(labels, dtype=torch.bool), temperature)


def contrast_taken(
    embeddings: Float[Tensor, "M P"], labels: Int[Tensor, "M"], taken: Bool[Tensor, "M"], temperature: float
) -> Float[Tensor, ""]:
    """Supervised contrast among the rows that are taken; of fixed shape, so that no device waits for a count."""
    unit = unit_vectors(embeddings)
    with no_autocast(unit):
        logits = unit @ unit.T / temperature
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    others = taken[:, None] & taken & ~itself
    positive = others & same_label(labels, labels)
    count = positive.sum(1)
    near = torch.where(positive, logits, 0).sum(1) / count.clamp_min(1)
    per_anchor = torch.where(count > 0, masked_logsumexp(logits, others) - near, 0)
    return per_anchor.sum() / taken.sum().clamp_min(1)


def check_views(num_views: int) -> None:
    """Refuse fewer than two views.

    Raises:
        ValueError: names how many were found.
    """
    if num_views < 2:
        raise ValueError(f"num_views: found {num_views}, needed 2 or more: views teach each other")


def rows_of_views(stacked: Tensor, num_views: int, name: str) -> int:
    """Images of a stack of views.

    Raises:
        ValueError: rows that are no whole number of views; another shape.
    """
    if stacked.ndim != 2 or len(stacked) % num_views:
        raise ValueError(f"{name}: found shape {tuple(stacked.shape)}, needed rows in a multiple of {num_views} views")
    return len(stacked) // num_views
