"""Accuracy of clusters: each is given one class so that as many samples as possible are right (Hungarian method).

The measure of category discovery, as ProtoGCD (arXiv 2504.03755) reports it: one assignment over all samples, then
accuracy on all, on known ("old") and on novel classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from proto_core.metrics.fold import SampleLists

__all__ = ["ClusterAccuracy", "cluster_accuracy"]


def cluster_accuracy(
    y_true: Any, y_pred: Any, old_mask: Any | None = None, *, balanced: bool = False
) -> float | tuple[float, float, float]:
    """Share of samples whose cluster was given their class, under the best assignment of clusters to classes.

    Args:
        y_true: classes ``[N]``, integers from 0.
        y_pred: clusters ``[N]``, integers from 0.
        old_mask: ``[N]``, which samples are of known classes.
        balanced: mean of the classes' shares instead, under the same assignment.

    Returns:
        One share; with ``old_mask`` three: of all, of the classes that have a sample in the mask, of those that have
        one outside. NaN for an empty set. Clusters or classes left over by the assignment count as wrong.

    Raises:
        ValueError: arguments of different lengths, no sample, negative or non-integer labels.

    Source:
        ProtoGCD (arXiv 2504.03755), evaluation.

    Example:
        >>> from proto_core.metrics import cluster_accuracy
        >>> cluster_accuracy([0, 0, 1, 1], [5, 5, 2, 5])
        0.75
        >>> cluster_accuracy([0, 0, 1, 1], [5, 5, 2, 5], [True, True, False, False])
        (0.75, 1.0, 0.5)
    """
    true, pred = _labels("y_true", y_true), _labels("y_pred", y_pred)
    if len(true) != len(pred):
        raise ValueError(f"y_true, y_pred: found {len(true)} and {len(pred)} labels, needed as many of both")
    size = int(max(true.max(), pred.max())) + 1
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (pred, true), 1)
    clusters, classes = linear_sum_assignment(counts.max() - counts)
    given = np.empty(size, dtype=np.int64)
    given[clusters] = classes
    right = given[pred] == true
    everything = np.ones(len(true), dtype=bool)
    if old_mask is None:
        return _share(right, true, everything, balanced)
    old = np.asarray(old_mask.detach().cpu() if isinstance(old_mask, Tensor) else old_mask).astype(bool)
    if old.shape != true.shape:
        raise ValueError(f"old_mask: found shape {old.shape}, needed ({len(true)},)")
    sets = [everything, *(np.isin(true, true[where]) for where in (old, ~old))]
    every, known, novel = (_share(right, true, where, balanced) for where in sets)
    return every, known, novel


class ClusterAccuracy(SampleLists):
    """:func:`cluster_accuracy` over all batches; one assignment for all, exact for any split and under DDP.

    Args:
        balanced: mean of the classes' shares.

    Raises:
        ValueError: on ``update``: shapes that do not fit; on ``compute``: no sample.

    Example:
        >>> import torch
        >>> from proto_core.metrics import ClusterAccuracy
        >>> metric = ClusterAccuracy()
        >>> metric.update(torch.tensor([0, 0, 1]), torch.tensor([7, 7, 3]), torch.tensor([True, True, False]))
        >>> metric.compute()
        {'all': 1.0, 'old': 1.0, 'new': 1.0}
    """

    classes: list[Tensor]
    clusters: list[Tensor]
    old: list[Tensor]

    def __init__(self, balanced: bool = False, **kwargs: Any) -> None:
        super().__init__("classes", "clusters", "old", **kwargs)
        self.balanced = balanced

    def update(self, y_true: Int[Tensor, "N"], y_pred: Int[Tensor, "N"], old_mask: Tensor | None = None) -> None:
        """Add classes, clusters, and which samples are of known classes (all, if not said)."""
        old = torch.ones_like(y_true, dtype=torch.bool) if old_mask is None else old_mask.bool()
        if y_true.ndim != 1 or not y_true.shape == y_pred.shape == old.shape:
            shapes = f"{tuple(y_true.shape)}, {tuple(y_pred.shape)} and {tuple(old.shape)}"
            raise ValueError(f"y_true, y_pred, old_mask: found shapes {shapes}, needed [N] each")
        self.classes.append(y_true.detach())
        self.clusters.append(y_pred.detach())
        self.old.append(old.detach())

    def compute(self) -> dict[str, float]:
        """``all``, ``old`` and ``new``; NaN for a set without a sample."""
        found = cluster_accuracy(*self.joined(), balanced=self.balanced)
        assert isinstance(found, tuple)
        return dict(zip(("all", "old", "new"), found))


def _labels(name: str, values: Any) -> np.ndarray:
    labels = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"{name}: found shape {labels.shape}, needed [N] with N at least 1")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: found {labels.dtype}, needed integers")
    if labels.min() < 0:
        raise ValueError(f"{name}: found {labels.min()}, needed labels from 0 on")
    return labels.astype(np.int64)


def _share(right: np.ndarray, true: np.ndarray, where: np.ndarray, balanced: bool) -> float:
    if not where.any():
        return float("nan")
    if not balanced:
        return float(right[where].mean())
    members = np.bincount(true[where])
    hits: Float64[np.ndarray, "C"] = np.bincount(true[where], right[where])
    return float((hits[members > 0] / members[members > 0]).mean())
