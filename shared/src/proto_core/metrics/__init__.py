"""Metrics: plain functions over a whole fold, and torchmetrics classes that gather the fold."""

from proto_core.metrics.multilabel import (
    MacroAUROC,
    auroc_matrix,
    auroc_per_label,
    calibration_error,
    f1_micro,
    f1_per_label,
    fmax,
    macro_auroc,
)
from proto_core.metrics.ranking import RecallAtK, best_positive_rank, nearest, recall_at_k

__all__ = [
    "MacroAUROC",
    "RecallAtK",
    "auroc_matrix",
    "auroc_per_label",
    "best_positive_rank",
    "calibration_error",
    "f1_micro",
    "f1_per_label",
    "fmax",
    "macro_auroc",
    "nearest",
    "recall_at_k",
]
