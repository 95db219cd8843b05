"""Certified accuracy over a whole fold."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from proto_core.metrics.fold import FoldScores

__all__ = ["CertifiedAccuracy"]


class CertifiedAccuracy(FoldScores):
    """Share of a fold whose certified radius is above each of some radii, and the mean radius.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn.certified import CertifiedAccuracy
        >>> fold = CertifiedAccuracy([0.5])
        >>> fold.update(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> fold.compute()
        {'certified_0.5': 0.5, 'mean_radius': 0.5}
    """

    def __init__(self, radii: Sequence[float]) -> None:
        super().__init__()
        self.radii = tuple(radii)

    def update(self, radius: Tensor, targets: Tensor, index: Tensor) -> None:
        """Collect a batch: the radius ``[N]`` of each sample for its own class."""
        self.collect(radius.unsqueeze(1), targets, index)

    def compute(self) -> dict[str, float]:
        """``certified_R`` for each radius R, and ``mean_radius``."""
        radius = self.gathered()[0].squeeze(1)
        found = {f"certified_{least:g}": float((radius > least).float().mean()) for least in self.radii}
        return {**found, "mean_radius": float(radius.mean())}
