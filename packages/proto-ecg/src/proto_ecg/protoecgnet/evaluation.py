"""All figures of a fold from its scores and targets: what ``test`` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from proto_core.metrics import auroc_per_label, calibration_error, f1_micro, f1_per_label, fmax, macro_auroc

__all__ = ["evaluate"]


def evaluate(
    scores: Float[Tensor, "N C"], targets: Shaped[Tensor, "N C"], thresholds: Float[Tensor, " C"], names: Sequence[str]
) -> dict[str, Any]:
    """All figures of a fold.

    Args:
        scores: probabilities.
        targets: 0 or 1.
        thresholds: of each label.
        names: of the labels.

    Returns:
        ``summary``: macro-AUROC (labels with both values), Fmax, micro-F1 at 0.5, macro-F1 at the thresholds,
        calibration error. ``labels``: one dict per label with auroc, f1, threshold, positives, prevalence.
    """
    auroc = torch.as_tensor(auroc_per_label(scores, targets))
    f1 = torch.as_tensor(f1_per_label(scores, targets, thresholds))
    positives = targets.sum(0)
    present = positives > 0
    summary = {
        "auroc": float(macro_auroc(scores, targets)),
        "fmax": float(fmax(scores, targets)),
        "f1_micro_at_half": float(f1_micro(scores, targets, 0.5)),
        "f1_macro": float(f1[present].float().mean()) if bool(present.any()) else float("nan"),
        "calibration_error": float(calibration_error(scores, targets)),
    }
    rows = [
        {
            "label": name,
            "auroc": float(auroc[i]),
            "f1": float(f1[i]),
            "threshold": float(thresholds[i]),
            "positives": int(positives[i]),
            "prevalence": float(positives[i] / max(len(targets), 1)),
        }
        for i, name in enumerate(names)
    ]
    return {"summary": summary, "labels": rows, "records": len(targets)}
