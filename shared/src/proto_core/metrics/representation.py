"""How an embedding is spread, and whom a contrastive loss punishes (CVPR 2021, arXiv 2012.09740).

Uniformity has the sign of its first paper: LOWER is more uniform (this paper plots the negative).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proto_core.checks import check_embeddings, check_positive
from proto_core.precision import full_precision, no_autocast, unit_vectors

__all__ = ["penalty_distribution", "penalty_entropy", "relative_penalty", "tolerance", "uniformity"]

BLOCK = 2**22


def penalty_distribution(negative_similarities: Float[Tensor, "N K"], temperature: float) -> Float[Tensor, "N K"]:
    """``e^(s_k / tau) / sum over negatives of e^(s / tau)``: a negative's share of the penalty; the positive is out.

    Raises:
        ValueError: not ``[N, K]`` with K at least 1, temperature not positive.

    Example:
        >>> import torch
        >>> from proto_core.metrics import penalty_distribution
        >>> penalty_distribution(torch.tensor([[0.5, 0.5]]), 0.07)
        tensor([[0.5000, 0.5000]])
    """
    check_positive(temperature=temperature)
    if negative_similarities.ndim != 2 or negative_similarities.shape[1] == 0:
        raise ValueError(
            f"negative_similarities: found shape {tuple(negative_similarities.shape)}, needed [N, K] with K at least 1"
        )
    return (full_precision(negative_similarities) / temperature).softmax(dim=1)


def penalty_entropy(negative_similarities: Float[Tensor, "N K"], temperature: float) -> Float[Tensor, "N"]:
    """Entropy of :func:`penalty_distribution` in nats; it rises with the temperature to ``log K``.

    Raises:
        ValueError: as there.

    Example:
        >>> import torch
        >>> from proto_core.metrics import penalty_entropy
        >>> penalty_entropy(torch.tensor([[0.5, 0.5]]), 0.07)
        tensor([0.6931])
    """
    return torch.special.entr(penalty_distribution(negative_similarities, temperature)).sum(dim=1)


def relative_penalty(similarities: Float[Tensor, "N N"], temperature: float) -> Float[Tensor, "N N"]:
    """:func:`penalty_distribution` of a batch: row i is anchor i, its diagonal the positive, which becomes 0.

    Raises:
        ValueError: not ``[N, N]`` with N at least 2, temperature not positive.

    Example:
        >>> import torch
        >>> from proto_core.metrics import relative_penalty
        >>> relative_penalty(torch.eye(2), 1.0)
        tensor([[0., 1.],
                [1., 0.]])
    """
    check_positive(temperature=temperature)
    shape = tuple(similarities.shape)
    if similarities.ndim != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(f"similarities: found shape {shape}, needed [N, N] with N at least 2")
    itself = torch.eye(shape[0], dtype=torch.bool, device=similarities.device)
    return (full_precision(similarities) / temperature).masked_fill(itself, -torch.inf).softmax(dim=1)


def uniformity(embeddings: Float[Tensor, "N D"], t: float = 2.0) -> Float[Tensor, ""]:
    """``log mean over pairs of exp(-t |z_i - z_j|^2)`` of normalised rows; lower is more uniform.

    Raises:
        ValueError: fewer than 2 rows, t not positive.

    Example:
        >>> import torch
        >>> from proto_core.metrics import uniformity
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).round()
        tensor(-8.)
    """
    check_positive(t=t)
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings: found shape {tuple(embeddings.shape)}, needed [N, D] with N at least 2")
    z = unit_vectors(embeddings)
    count = len(z)
    size = max(1, BLOCK // count)
    square = (z * z).sum(dim=1)  # 0 for a zero row
    parts = []
    with no_autocast(z):
        for start in range(0, count, size):
            rows = z[start : start + size]
            distance = square[start : start + size, None] + square - 2 * (rows @ z.T)
            pair = torch.ones_like(distance, dtype=torch.bool).triu(start + 1)
            parts.append(torch.where(pair, -t * distance.clamp_min(0), -torch.inf).flatten().logsumexp(0))
    return torch.stack(parts).logsumexp(0) - math.log(count * (count - 1) / 2)


def tolerance(embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"], pairs: str = "same") -> Float[Tensor, ""]:
    """Mean cosine of samples of one label, by sums over classes.

    Args:
        embeddings: rows, normalised inside.
        labels: any integers.
        pairs: ``"same"``: mean over ordered pairs of two samples of one label; ``"all"``: the sum over all pairs of one
            label, each sample with itself included, divided by N^2 (the expectation as the paper writes it).

    Raises:
        ValueError: shapes that do not fit, an unknown word, no two samples of one label (for ``"same"``).

    Example:
        >>> import torch
        >>> from proto_core.metrics import tolerance
        >>> tolerance(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
        tensor(1.)
    """
    check_embeddings(embeddings, labels)
    if pairs not in ("same", "all"):
        raise ValueError(f"pairs: found {pairs!r}, needed 'same' or 'all'")
    z = unit_vectors(embeddings)
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = z.new_zeros(len(counts), z.shape[1]).index_add(0, index, z)
    total = sums.square().sum()
    if pairs == "all":
        return total / len(z) ** 2
    number = (counts * (counts - 1)).sum()
    if int(number) == 0:
        raise ValueError("labels: found no two samples of one label, needed at least one pair")
    return (total - z.square().sum()) / number
