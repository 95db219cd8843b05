"""Out-of-distribution detection from scores that are higher for inputs of the known distribution.

Two false positive rates are in use and differ: PALM's (arXiv 2402.02653) takes a percentile of the known scores as its
threshold, ProtoGCD's reads the recall nearest to 0.95 off the curve of distinct thresholds. Each stands under the name
of its card. AUROC and AUPR are scikit-learn's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from proto_core.metrics.fold import SampleLists

__all__ = ["OODDetection", "OODMetrics", "auroc", "fpr_at_tpr", "ood_metrics"]


class OODMetrics(NamedTuple):
    """What :func:`ood_metrics` returns, each in [0, 1]."""

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr_in: float
    fpr_out: float


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Probability that a known input scores higher than an unknown one, ties counting half.

    Args:
        id_scores: scores of known inputs, ``[N]``.
        ood_scores: scores of unknown inputs, ``[M]``.

    Raises:
        ValueError: another shape, nothing in one of them, NaN.

    Example:
        >>> from proto_core.metrics import auroc
        >>> auroc([0.9, 0.5], [0.5, 0.1])
        0.875
    """
    known, unknown = _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)
    return float(roc_auc_score(*_labelled(known, unknown)))


def fpr_at_tpr(id_scores: Any, ood_scores: Any, tpr: float = 0.95) -> float:
    """Share of unknown inputs that score strictly higher than the ``100 (1 - tpr)`` percentile of the known ones.

    Args:
        id_scores: scores of known inputs, ``[N]``.
        ood_scores: scores of unknown inputs, ``[M]``.
        tpr: share of known inputs to accept, in (0, 1]; percentiles interpolate linearly.

    Raises:
        ValueError: another shape, nothing in one of them, NaN, tpr outside (0, 1].

    Example:
        >>> from proto_core.metrics import fpr_at_tpr
        >>> fpr_at_tpr([1.0, 2.0, 3.0], [0.5, 2.5], tpr=0.5)
        0.5
    """
    known, unknown = _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr: found {tpr}, needed a share in (0, 1]")
    return float((unknown > np.percentile(known, round(100 * (1 - tpr), 9))).mean())


def ood_metrics(in_scores: Any, out_scores: Any) -> OODMetrics:
    """AUROC, AUPR and false positive rate with the known, and with the unknown, as the positives.

    Scores are higher for UNKNOWN inputs, as ProtoGCD's are; known inputs are the positives of their negative. The false
    positive rate is the one where the recall is nearest to 0.95, on the curve of distinct thresholds from the lowest
    recall-1 threshold's successor upwards (the first minimum from high recall to low).

    Args:
        in_scores: scores of known inputs, ``[N]``.
        out_scores: scores of unknown inputs, ``[M]``.

    Raises:
        ValueError: another shape, nothing in one of them, NaN.

    Example:
        >>> from proto_core.metrics import ood_metrics
        >>> ood_metrics([0.1, 0.2], [0.8, 0.9])
        OODMetrics(auroc=1.0, aupr_in=1.0, aupr_out=1.0, fpr_in=0.0, fpr_out=0.0)
    """
    known, unknown = _scores("in_scores", in_scores), _scores("out_scores", out_scores)
    positive_in, positive_out = _labelled(-known, -unknown), _labelled(unknown, known)
    return OODMetrics(
        auroc=float(roc_auc_score(*positive_in)),
        aupr_in=float(average_precision_score(*positive_in)),
        aupr_out=float(average_precision_score(*positive_out)),
        fpr_in=_fpr_at_recall(-known, -unknown),
        fpr_out=_fpr_at_recall(unknown, known),
    )


class OODDetection(SampleLists):
    """AUROC, AUPR and FPR95 over all batches; exact for any split and under DDP.

    Args:
        tpr: share of known inputs to accept.

    Raises:
        ValueError: tpr outside (0, 1]; on ``compute``: one kind of input missing.

    Example:
        >>> import torch
        >>> from proto_core.metrics import OODDetection
        >>> metric = OODDetection()
        >>> metric.update(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
        >>> metric.compute()
        {'auroc': 1.0, 'aupr_in': 1.0, 'aupr_out': 1.0, 'fpr': 0.0}
    """

    scores: list[Tensor]
    known: list[Tensor]

    def __init__(self, tpr: float = 0.95, **kwargs: Any) -> None:
        super().__init__("scores", "known", **kwargs)
        if not 0 < tpr <= 1:
            raise ValueError(f"tpr: found {tpr}, needed a share in (0, 1]")
        self.tpr = tpr

    def update(self, scores: Float[Tensor, "N"], known: Tensor) -> None:
        """Add scores, higher for known inputs, and which inputs are known."""
        if scores.ndim != 1 or scores.shape != known.shape:
            shapes = f"{tuple(scores.shape)} and {tuple(known.shape)}"
            raise ValueError(f"scores, known: found shapes {shapes}, needed [N] both")
        self.scores.append(scores.detach())
        self.known.append(known.detach().bool())

    def compute(self) -> dict[str, float]:
        """``auroc``, ``aupr_in``, ``aupr_out`` and ``fpr`` at the rate asked for."""
        scores, known = self.joined()
        scores = scores.double()
        inside, outside = scores[known], scores[~known]
        both = ood_metrics(-inside, -outside)
        fpr = fpr_at_tpr(inside, outside, self.tpr)
        return {"auroc": both.auroc, "aupr_in": both.aupr_in, "aupr_out": both.aupr_out, "fpr": fpr}


def _scores(name: str, values: Any) -> Float64[np.ndarray, "N"]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name}: found shape {scores.shape}, needed [N] with N at least 1")
    if np.isnan(scores).any():
        raise ValueError(f"{name}: found {int(np.isnan(scores).sum())} NaN, needed numbers")
    return scores


def _labelled(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    return labels, np.r_[positive, negative]


def _fpr_at_recall(positive: np.ndarray, negative: np.ndarray, level: float = 0.95) -> float:
    """False positive rate at the threshold whose recall is nearest to the level."""
    thresholds = np.unique(np.r_[positive, negative])
    recall = (len(positive) - np.searchsorted(np.sort(positive), thresholds)) / len(positive)
    # the highest threshold that still has recall 1, and all above it
    start = np.flatnonzero(recall == 1)[-1]
    best = start + int(np.abs(recall[start:] - level).argmin())
    return float((negative >= thresholds[best]).mean())
