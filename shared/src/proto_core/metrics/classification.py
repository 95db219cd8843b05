"""Figures of single-label classification over a whole fold: accuracy, per class, top 5, likelihood, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from proto_core.metrics.fold import FoldScores

__all__ = ["FoldAccuracy", "classification_figures"]


class FoldAccuracy(FoldScores):
    """Top-1 accuracy of a whole fold, however it was split into batches and ranks (torchmetrics).

    ``update(scores [N, C], targets [N], index [N])`` collects; ``compute()`` gathers all ranks. Where sample indices
    are given, samples seen twice (the padding of a distributed sampler) count once. The first class wins a tie.

    Raises:
        ValueError: shapes that do not fit, or indices given for some batches only.

    Example:
        >>> import torch
        >>> from proto_core.metrics import FoldAccuracy
        >>> metric = FoldAccuracy()
        >>> metric.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[0.8, 0.2]]), torch.tensor([1]), torch.tensor([1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(
        self, scores: Float[Tensor, "N C"], targets: Int[Tensor, "N"], index: Int[Tensor, "N"] | None = None
    ) -> None:
        """Collect a batch; ``index`` are the samples' places in the data set, at least 0."""
        if scores.ndim != 2 or targets.shape != scores.shape[:1]:
            shapes = f"{tuple(scores.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"scores, targets: found shapes {shapes}, needed [N, C] and [N]")
        self.collect(scores, targets, index)

    def compute(self) -> Float[Tensor, ""]:
        """Share of samples whose highest score is that of their class; NaN if nothing was collected."""
        if not self.collected:
            return torch.tensor(torch.nan, device=self.device)
        scores, targets = self.fold()
        return (scores.argmax(1) == targets).float().mean().to(self.device)


def classification_figures(
    probabilities: Float[Tensor, "N C"], targets: Int[Tensor, "N"], names: Sequence[str]
) -> dict[str, Any]:
    """All figures of a fold.

    Args:
        probabilities: of each class.
        targets: class indices.
        names: of the classes.

    Returns:
        ``summary``: accuracy, mean accuracy over the classes that occur, accuracy of the first five (with more than
        five classes), negative log-likelihood, calibration error (15 bins). ``labels``: one dict per class with
        accuracy, precision (NaN where it was never predicted) and number of images. ``records``: N.

    Raises:
        ValueError: shapes that do not fit, or no sample.

    Example:
        >>> import torch
        >>> from proto_core.metrics import classification_figures
        >>> found = classification_figures(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]), ["cat", "dog"])
        >>> found["summary"]["accuracy"], found["labels"][1]["accuracy"]
        (0.5, 0.0)
    """
    if probabilities.ndim != 2 or not len(probabilities) or targets.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"probabilities, targets: found shapes {shapes}, needed [N, C] and [N] with N >= 1")
    classes = probabilities.shape[1]
    if len(names) != classes:
        raise ValueError(f"names: found {len(names)} names for {classes} classes")
    predicted = probabilities.argmax(1)
    right = (predicted == targets).double()
    count, said = (torch.bincount(values, minlength=classes).double() for values in (targets, predicted))
    hits = torch.zeros(classes, dtype=torch.double).index_add_(0, targets, right)
    recall, precision = hits / count, hits / said
    summary = {"accuracy": float(right.mean()), "mean_class_accuracy": float(recall[count > 0].mean())}
    if classes > 5:
        summary["top5_accuracy"] = float((probabilities.topk(5).indices == targets[:, None]).any(1).double().mean())
    chosen = probabilities.double().gather(1, targets[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    summary["nll"] = float(-chosen.log().mean())
    summary["calibration_error"] = float(multiclass_calibration_error(probabilities, targets, classes, n_bins=15))
    rows = [
        {"label": name, "accuracy": a, "precision": p, "images": int(n)}
        for name, a, p, n in zip(names, recall.tolist(), precision.tolist(), count.tolist())
    ]
    return {"summary": summary, "labels": rows, "records": len(targets)}
