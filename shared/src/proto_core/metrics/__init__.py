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
from proto_core.metrics.uncertainty import aleatoric_uncertainty, epistemic_uncertainty, predictive_entropy

__all__ = [
    "MacroAUROC",
    "RecallAtK",
    "aleatoric_uncertainty",
    "auroc_matrix",
    "auroc_per_label",
    "best_positive_rank",
    "calibration_error",
    "epistemic_uncertainty",
    "f1_micro",
    "f1_per_label",
    "fmax",
    "macro_auroc",
    "nearest",
    "predictive_entropy",
    "recall_at_k",
]
