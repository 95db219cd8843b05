"""Multi-label metrics over a whole fold: AUROC, F1, Fmax, calibration error.

Scores and targets are ``[N, C]`` tensors or arrays. Ranks are averaged over ties, as scikit-learn does; the definitions
are those of the PTB-XL benchmark (macro-AUROC over classes that have both labels, Fmax over a grid of thresholds).
``MacroAUROC`` gathers a fold over batches and ranks first: an average over batches is another number.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from proto_core.metrics.fold import FoldScores

__all__ = [
    "MacroAUROC",
    "auroc_matrix",
    "auroc_per_label",
    "calibration_error",
    "f1_micro",
    "f1_per_label",
    "fmax",
    "macro_auroc",
]

Scores = Float[Tensor, "N C"] | Float[np.ndarray, "N C"]
Targets = Shaped[Tensor, "N C"] | Shaped[np.ndarray, "N C"]


def auroc_matrix(
    scores: Float[Tensor, "N P"] | Float[np.ndarray, "N P"], targets: Shaped[Tensor, "N K"] | Shaped[np.ndarray, "N K"]
) -> Float[Tensor, "P K"]:
    """ROC-AUC of every score column against every target column, from one ranking (Mann-Whitney).

    Returns:
        float64; NaN where a target column lacks a label.

    Raises:
        ValueError: not two matrices over the same N, NaN scores, targets other than 0 and 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import auroc_matrix
        >>> auroc_matrix(torch.tensor([[0.1, 0.9], [0.8, 0.3]]), torch.tensor([[0, 1], [1, 0]]))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    values, labels = _fold(scores, targets, same_width=False)
    return _auroc(average_ranks(values).T @ labels, labels)


def auroc_per_label(scores: Scores, targets: Targets) -> Float[Tensor, "C"]:
    """ROC-AUC of every label.

    Returns:
        float64; NaN where a label lacks positives or negatives.

    Raises:
        ValueError: shapes that differ, NaN scores, targets other than 0 and 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import auroc_per_label
        >>> auroc_per_label(torch.tensor([[0.1, 0.5], [0.8, 0.5]]), torch.tensor([[0, 1], [1, 1]]))
        tensor([1., nan], dtype=torch.float64)
    """
    values, labels = _fold(scores, targets)
    return _auroc((average_ranks(values) * labels).sum(dim=0), labels)


def macro_auroc(scores: Scores, targets: Targets) -> float:
    """Unweighted mean of the labels' ROC-AUC over labels that have positives and negatives; NaN if none has.

    Raises:
        ValueError: shapes that differ, NaN scores, targets other than 0 and 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import macro_auroc
        >>> macro_auroc(torch.tensor([[0.1, 0.5], [0.8, 0.5]]), torch.tensor([[0, 1], [1, 1]]))
        1.0
    """
    return float(auroc_per_label(scores, targets).nanmean())


def f1_micro(scores: Scores, targets: Targets, threshold: float = 0.5) -> float:
    """F1 over all labels pooled; ``score >= threshold`` is a positive. NaN without any positive on either side.

    Raises:
        ValueError: shapes that differ, NaN scores, targets other than 0 and 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import f1_micro
        >>> f1_micro(torch.tensor([[0.9, 0.6]]), torch.tensor([[1, 0]]))
        0.6666666666666666
    """
    values, labels = _fold(scores, targets)
    return float(_f1((values >= threshold).flatten(), labels.flatten()))


def f1_per_label(
    scores: Scores, targets: Targets, thresholds: Float[Tensor, "C"] | Float[np.ndarray, "C"]
) -> Float[Tensor, "C"]:
    """F1 of every label at its own threshold; ``score >= threshold`` is a positive.

    Returns:
        float64; NaN for a label with no positive, neither true nor predicted.

    Raises:
        ValueError: shapes that differ, NaN scores, targets other than 0 and 1, thresholds not ``[C]``.

    Example:
        >>> import torch
        >>> from proto_core.metrics import f1_per_label
        >>> f1_per_label(torch.tensor([[0.9, 0.3]]), torch.tensor([[1, 1]]), torch.tensor([0.5, 0.2]))
        tensor([1., 1.], dtype=torch.float64)
    """
    values, labels = _fold(scores, targets)
    limits = torch.as_tensor(thresholds, device=values.device)
    if tuple(limits.shape) != (values.shape[1],):
        raise ValueError(f"thresholds: found shape {tuple(limits.shape)}, needed ({values.shape[1]},)")
    return _f1(values >= limits, labels)


def fmax(scores: Scores, targets: Targets) -> float:
    """Highest micro-F1 over the thresholds 0.00, 0.01 ... 1.00; NaN without a positive target.

    Raises:
        ValueError: shapes that differ, scores outside [0, 1], targets other than 0 and 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import fmax
        >>> fmax(torch.tensor([[0.9, 0.6]]), torch.tensor([[1, 0]]))
        1.0
    """
    values, labels = _fold(scores, targets)
    _check_probabilities(values)
    grid = (torch.arange(101, device=values.device, dtype=torch.float64) / 100).to(values.dtype)
    # a score passes as many thresholds as are not above it; counts are summed from the top
    passed = torch.searchsorted(grid, values.flatten().contiguous(), right=True)
    predicted = torch.bincount(passed, minlength=102).double()
    hits = torch.bincount(passed, weights=labels.flatten(), minlength=102)
    predicted, hits = (count.flip(0).cumsum(0).flip(0)[1:] for count in (predicted, hits))
    positives = labels.sum()
    if positives == 0:
        return float("nan")
    return float((2 * hits / (predicted + positives)).max())


@overload
def calibration_error(
    scores: Scores, targets: Targets, bins: int = ..., *, per_label: Literal[False] = ...
) -> float: ...
@overload
def calibration_error(
    scores: Scores, targets: Targets, bins: int = ..., *, per_label: Literal[True]
) -> Float[Tensor, "C"]: ...
def calibration_error(
    scores: Scores, targets: Targets, bins: int = 15, *, per_label: bool = False
) -> float | Float[Tensor, "C"]:
    """Expected calibration error of binary probabilities (Naeini et al. 2015): equal bins of [0, 1].

    Sum over the bins of (share of the scores in it) times |mean score - fraction of positives|.

    Args:
        scores: probabilities.
        targets: multi-hot.
        bins: number of bins.
        per_label: one value per label (float64) instead of one for all labels pooled.

    Raises:
        ValueError: shapes that differ, scores outside [0, 1], targets other than 0 and 1, ``bins`` below 1, no sample.

    Example:
        >>> import torch
        >>> from proto_core.metrics import calibration_error
        >>> round(calibration_error(torch.tensor([[0.9], [0.9]]), torch.tensor([[1], [0]])), 4)
        0.4
    """
    values, labels = _fold(scores, targets)
    _check_probabilities(values)
    if bins < 1 or values.numel() == 0:
        raise ValueError(f"bins, scores: found {bins} bins and {values.numel()} scores, needed 1 of each at least")
    if not per_label:
        values, labels = values.reshape(-1, 1), labels.reshape(-1, 1)
    place = (values.double() * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, values.shape[1], dtype=torch.float64, device=values.device)
    gap.scatter_add_(0, place, values.double() - labels)
    error = gap.abs().sum(dim=0) / len(values)
    return error if per_label else float(error)


class MacroAUROC(FoldScores):
    """Macro-AUROC of a whole fold, however it was split into batches and ranks (torchmetrics).

    ``update(scores [N, C], targets [N, C], index [N])`` collects; ``compute()`` gathers all ranks. Where sample
    indices are given, samples seen twice (the padding of a distributed sampler) count once, so that the value is
    exactly the fold's.

    Raises:
        ValueError: shapes that differ, or indices given for some batches only.

    Example:
        >>> import torch
        >>> from proto_core.metrics import MacroAUROC
        >>> metric = MacroAUROC()
        >>> metric.update(torch.tensor([[0.1], [0.8]]), torch.tensor([[0], [1]]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[0.8]]), torch.tensor([[1]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(1.)
        >>> metric.gathered()[0].shape
        torch.Size([2, 1])
    """

    def update(
        self,
        scores: Float[Tensor, "N C"],
        targets: Shaped[Tensor, "N C"],
        index: Int[Tensor, "N"] | None = None,
    ) -> None:
        """Collect a batch; ``index`` are the samples' places in the data set, at least 0."""
        if scores.ndim != 2 or scores.shape != targets.shape:
            raise ValueError(
                f"scores, targets: found shapes {tuple(scores.shape)} and {tuple(targets.shape)}, needed [N, C] twice"
            )
        self.collect(scores, targets.detach().to(torch.uint8), index)

    def compute(self) -> Float[Tensor, ""]:
        """Macro-AUROC of everything collected; NaN if no label has positives and negatives."""
        if not self.collected:
            return torch.tensor(torch.nan, device=self.device)
        return torch.tensor(macro_auroc(*self.fold()), device=self.device)


def average_ranks(values: Float[Tensor, "N P"]) -> Float[Tensor, "N P"]:
    """Ranks 1..N down every column, equal values sharing their mean rank (float64).

    Example:
        >>> import torch
        >>> from proto_core.metrics.multilabel import average_ranks
        >>> average_ranks(torch.tensor([[0.5], [0.1], [0.5]])).T
        tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    ranked, order = values.sort(dim=0)
    place = torch.arange(len(values), device=values.device).unsqueeze(1).expand_as(ranked)
    new = torch.ones_like(ranked, dtype=torch.bool)
    new[1:] = ranked[1:] != ranked[:-1]
    first = torch.where(new, place, 0).cummax(dim=0).values
    ends = torch.ones_like(new)
    ends[:-1] = new[1:]
    last = torch.where(ends, place, len(values)).flip(0).cummin(dim=0).values.flip(0)
    mean = (first + last).double() / 2 + 1
    return torch.empty_like(mean).scatter_(0, order, mean)


def _auroc(rank_sums: Tensor, labels: Tensor) -> Tensor:
    positives = labels.sum(dim=0)
    pairs = positives * (len(labels) - positives)
    wins = rank_sums - positives * (positives + 1) / 2
    return torch.where(pairs > 0, wins / pairs.clamp_min(1), torch.nan)


def _f1(predicted: Tensor, labels: Tensor) -> Tensor:
    return 2 * (predicted * labels).sum(dim=0) / (predicted.sum(dim=0) + labels.sum(dim=0))


def _fold(scores: Any, targets: Any, same_width: bool = True) -> tuple[Tensor, Tensor]:
    """Scores as they are (half precision as float32), targets as float64, both checked."""
    values = torch.as_tensor(scores).detach()
    labels = torch.as_tensor(targets).detach().to(values.device)
    if values.ndim != 2 or labels.ndim != 2 or len(values) != len(labels) or not values.is_floating_point():
        found = f"{tuple(values.shape)} ({values.dtype}) and {tuple(labels.shape)}"
        raise ValueError(f"scores, targets: found shapes {found}, needed floating-point [N, C] and [N, C]")
    if same_width and values.shape != labels.shape:
        raise ValueError(f"scores, targets: found shapes {tuple(values.shape)} and {tuple(labels.shape)}, needed one")
    if values.isnan().any():
        raise ValueError(f"scores: found {int(values.isnan().sum())} NaN, needed numbers")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("targets: found values other than 0 and 1, needed multi-hot labels")
    return values if values.dtype == torch.float64 else values.float(), labels.double()


def _check_probabilities(values: Tensor) -> None:
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("scores: found values outside [0, 1], needed probabilities")
