"""Ranking a gallery by similarity to queries: one search in blocks of queries, and the metrics that read it.

Recall@K is that of Multi-Similarity Loss (CVPR 2019, arXiv 1904.06627): a query counts as a hit when fewer than K
negatives are strictly more similar than its best positive, so that ties favour the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proto_core.checks import check_class_targets, check_positive
from proto_core.metrics.fold import SampleLists
from proto_core.precision import full_precision, no_autocast, unit_vectors

__all__ = [
    "RecallAtK",
    "best_positive_rank",
    "knn_predict",
    "mean_reciprocal_rank",
    "nearest",
    "recall_at_k",
    "reciprocal_ranks",
]

BLOCK = 2**22
"""Similarities that one looks at in one go."""


def nearest(
    query: Float[Tensor, "Q D"], gallery: Float[Tensor, "G D"], k: int = 1, *, normalize: bool = False
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k gallery rows most similar to each query by dot product, and where they are; lowest index first on ties.

    Args:
        query: rows.
        gallery: rows; at least one.
        k: how many, cut to the size of the gallery.
        normalize: cosine instead of the dot product.

    Raises:
        ValueError: shapes that do not fit, k below 1, an empty gallery, NaN.

    Example:
        >>> import torch
        >>> from proto_core.metrics.ranking import nearest
        >>> nearest(torch.tensor([[1.0, 0.0]]), torch.eye(2), 2)[1].tolist()
        [[0, 1]]
    """
    query, gallery = _rows(query, gallery)
    if k < 1:
        raise ValueError(f"k: found {k}, needed at least 1")
    k = min(k, len(gallery))
    if normalize:
        query, gallery = unit_vectors(query), unit_vectors(gallery)
    values, index = [], []
    for block in query.split(max(1, BLOCK // len(gallery))):
        with no_autocast(block):
            similarity = block @ gallery.T
        where = _first_of_equals(similarity, k)
        index.append(where)
        values.append(similarity.gather(1, where))
    return torch.cat(values), torch.cat(index)


@torch.no_grad()
def knn_predict(
    features: Float[Tensor, "N D"],
    bank: Float[Tensor, "M D"],
    bank_labels: Int[Tensor, "M"],
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> Int[Tensor, "N C"]:
    """Classes by falling vote of the k nearest rows of a bank, each with weight ``exp(cosine / temperature)``.

    Args:
        features: rows to classify.
        bank: rows of known class.
        bank_labels: their classes.
        num_classes: C.
        k: neighbours, cut to M.
        temperature: of the weights.

    Returns:
        Column 0 is the prediction; equal votes stand in the order of the classes.

    Raises:
        ValueError: shapes that do not fit, labels outside 0..C-1, k below 1, temperature not positive, NaN.

    Source:
        Instance discrimination (arXiv 1805.01978), as AMCL (arXiv 2310.05615) evaluates.

    Example:
        >>> import torch
        >>> from proto_core.metrics import knn_predict
        >>> knn_predict(torch.tensor([[1.0, 0.1]]), torch.eye(2), torch.tensor([1, 0]), num_classes=2, k=1)
        tensor([[1, 0]])
    """
    check_positive(temperature=temperature)
    check_class_targets(bank, bank_labels, "bank", classes=num_classes)
    similarity, index = nearest(features, bank, k, normalize=True)
    weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    votes = weights.new_zeros(len(features), num_classes).scatter_add_(1, bank_labels[index].long(), weights)
    return votes.argsort(dim=1, descending=True, stable=True)


def best_positive_rank(
    query: Float[Tensor, "Q D"],
    query_labels: Int[Tensor, "Q"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_labels: Int[Tensor, "G"] | None = None,
    *,
    in_order: bool = False,
) -> Int[Tensor, "Q"]:
    """How many negatives are strictly more similar (dot product) to a query than its best positive.

    Args:
        query: rows, used as they are.
        query_labels: one label per query.
        gallery: rows; ``None``: the queries themselves, each left out of its own ranking by taking the second largest
            of the similarities of its label.
        gallery_labels: one label per gallery row; with ``gallery``.
        in_order: count negatives that are as similar as the first best positive and stand before it, too.

    Returns:
        0 where the best positive leads.

    Raises:
        ValueError: shapes that do not fit, a query without any positive in the gallery, NaN.

    Example:
        >>> import torch
        >>> from proto_core.metrics.ranking import best_positive_rank
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.2]])
        >>> best_positive_rank(x[:1], torch.tensor([0]), x[1:], torch.tensor([1, 0]))
        tensor([0])
    """
    itself = gallery is None
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery, gallery_labels: found one of them, needed both or none")
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = query, query_labels
    query, gallery = _rows(query, gallery)
    for name, labels, count in [
        ("query_labels", query_labels, len(query)),
        ("gallery_labels", gallery_labels, len(gallery)),
    ]:
        if labels.shape != (count,) or labels.is_floating_point():
            raise ValueError(f"{name}: found {tuple(labels.shape)} {labels.dtype}, needed ({count},) integers")
    ranks = []
    size = max(1, BLOCK // len(gallery))
    for start in range(0, len(query), size):
        rows = slice(start, start + size)
        with no_autocast(query):
            similarity = query[rows] @ gallery.T
        same = query_labels[rows].unsqueeze(1) == gallery_labels
        short = same.sum(dim=1) < (2 if itself else 1)
        if short.any():
            first = start + int(short.nonzero()[0])
            label = int(query_labels[first])
            raise ValueError(f"query_labels: found no other sample of label {label} (query {first}), needed one")
        own = torch.where(same, similarity, -torch.inf)
        best = own.topk(2, dim=1).values[:, 1] if itself else own.amax(dim=1)
        ahead = similarity > best.unsqueeze(1)
        if in_order:
            ties = similarity == best.unsqueeze(1)
            place = torch.arange(len(gallery), device=ties.device)
            ahead |= ties & (place < (ties & same).int().argmax(dim=1, keepdim=True))
        ranks.append((ahead & ~same).sum(dim=1))
    return torch.cat(ranks)


def recall_at_k(
    query: Float[Tensor, "Q D"],
    query_labels: Int[Tensor, "Q"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_labels: Int[Tensor, "G"] | None = None,
    k: Sequence[int] = (1, 2, 4, 8),
) -> dict[int, float]:
    """Share of queries with fewer than k negatives strictly more similar than the best positive, for each k.

    Args:
        query: rows, used as they are (normalise them for cosines).
        query_labels: one label per query.
        gallery: rows; ``None``: each query against all the others.
        gallery_labels: one label per gallery row.
        k: ranks to report.

    Raises:
        ValueError: k below 1, shapes that do not fit, a query without any positive.

    Example:
        >>> import torch
        >>> from proto_core.metrics import recall_at_k
        >>> recall_at_k(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), k=(1,))
        {1: 1.0}
    """
    _ranks(k)
    rank = best_positive_rank(query, query_labels, gallery, gallery_labels)
    return {int(each): float((rank < each).double().mean()) for each in k}


def reciprocal_ranks(
    query: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    query_labels: Int[Tensor, "Q"],
    gallery_labels: Int[Tensor, "G"],
    cutoff: int = 1000,
) -> Float[Tensor, "Q"]:
    """One over the rank (by dot product, from 1) of the first gallery row of each query's label.

    0 where that rank is beyond the cutoff, or no row has the label; rows of equal scores rank by their place.

    Args:
        query: rows, used as they are.
        gallery: rows.
        query_labels: one per query.
        gallery_labels: one per gallery row.
        cutoff: last rank that counts.

    Raises:
        ValueError: shapes that do not fit, a cutoff below 1, NaN.

    Example:
        >>> import torch
        >>> from proto_core.metrics import reciprocal_ranks
        >>> gallery = torch.tensor([[3.0], [2.0], [1.0]])
        >>> reciprocal_ranks(torch.ones(2, 1), gallery, torch.tensor([7, 9]), torch.tensor([5, 7, 6]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if cutoff < 1:
        raise ValueError(f"cutoff: found {cutoff}, needed at least 1")
    found = torch.zeros(len(query), dtype=torch.float64, device=query.device)
    known = torch.isin(query_labels, gallery_labels)
    if bool(known.any()):
        rank = best_positive_rank(query[known], query_labels[known], gallery, gallery_labels, in_order=True) + 1
        found[known] = torch.where(rank <= cutoff, rank.double().reciprocal(), 0.0)
    return found


def mean_reciprocal_rank(
    query: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    query_labels: Int[Tensor, "Q"],
    gallery_labels: Int[Tensor, "G"],
    cutoff: int = 1000,
) -> float:
    """Mean of :func:`reciprocal_ranks` over the queries (MRR).

    Raises:
        ValueError: see :func:`reciprocal_ranks`; no query.

    Example:
        >>> import torch
        >>> from proto_core.metrics import mean_reciprocal_rank
        >>> mean_reciprocal_rank(torch.eye(2), torch.eye(2), torch.tensor([3, 4]), torch.tensor([3, 4]))
        1.0
    """
    if len(query) == 0:
        raise ValueError("query: found no row, needed one at least")
    return reciprocal_ranks(query, gallery, query_labels, gallery_labels, cutoff).mean().item()


class RecallAtK(SampleLists):
    """Recall@K over a whole fold, every sample a query against all others; exact for any split and under DDP.

    Args:
        k: ranks to report.
        normalize: rank by cosine.

    Raises:
        ValueError: k below 1; on ``compute``: no batch, or a sample without another of its label.

    Example:
        >>> import torch
        >>> from proto_core.metrics import RecallAtK
        >>> metric = RecallAtK(k=(1,))
        >>> metric.update(torch.eye(2), torch.tensor([0, 1]))
        >>> metric.update(torch.eye(2), torch.tensor([0, 1]))
        >>> metric.compute()
        {1: 1.0}
    """

    embeddings: list[Tensor]
    labels: list[Tensor]

    def __init__(self, k: Sequence[int] = (1, 2, 4, 8), *, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__("embeddings", "labels", **kwargs)
        _ranks(k)
        self.k = tuple(k)
        self.normalize = normalize

    def update(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> None:
        """Add a batch."""
        if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
            shapes = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"embeddings, labels: found shapes {shapes}, needed [N, D] and [N]")
        self.embeddings.append(full_precision(embeddings.detach()))
        self.labels.append(labels.detach())

    def compute(self) -> dict[int, float]:
        """Recall at each k."""
        x, labels = self.joined()
        return recall_at_k(unit_vectors(x) if self.normalize else x, labels, k=self.k)


def _first_of_equals(similarity: Tensor, k: int) -> Tensor:
    """Places of the k largest of a row, equals by place; only rows with equals at the border are sorted in full."""
    if k == 1:
        return similarity.argmax(dim=1, keepdim=True)
    found = similarity.topk(k, dim=1, sorted=False)
    where = found.indices.sort(dim=1).values
    where = where.gather(1, similarity.gather(1, where).sort(dim=1, descending=True, stable=True).indices)
    unclear = (similarity >= found.values.amin(dim=1, keepdim=True)).sum(dim=1) > k
    if unclear.any():
        where[unclear] = similarity[unclear].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return where


def _ranks(k: Sequence[int]) -> None:
    if len(k) == 0 or min(k) < 1:
        raise ValueError(f"k: found {tuple(k)}, needed ranks of at least 1")


def _rows(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1] or 0 in (len(query), len(gallery)):
        shapes = f"{tuple(query.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"query, gallery: found shapes {shapes}, needed [Q, D] and [G, D], both with rows")
    for name, rows in [("query", query), ("gallery", gallery)]:
        if rows.isnan().any():
            raise ValueError(f"{name}: found {int(rows.isnan().any(dim=1).sum())} rows with NaN, needed numbers")
    dtype = torch.promote_types(torch.promote_types(query.dtype, gallery.dtype), torch.float32)
    return query.detach().to(dtype), gallery.detach().to(dtype)
