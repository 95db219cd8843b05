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
