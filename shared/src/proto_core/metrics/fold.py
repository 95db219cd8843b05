"""Scores and targets of a whole fold, gathered over batches and ranks: an average over batches is another number."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["FoldScores"]


class FoldScores(Metric):
    """Collects ``scores [N, C]`` and targets; subclasses say what is computed of them (torchmetrics).

    Where sample indices are given, samples seen twice (the padding of a distributed sampler) count once.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]
    index: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("scores", "targets", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def collect(
        self, scores: Float[Tensor, "N C"], targets: Shaped[Tensor, "N ..."], index: Int[Tensor, "N"] | None
    ) -> None:
        """Keep a batch; ``index`` are the samples' places in the data set, at least 0."""
        if index is None:
            index = torch.full((len(scores),), -1, device=scores.device)
        if index.shape != scores.shape[:1]:
            raise ValueError(f"index: found shape {tuple(index.shape)}, needed ({len(scores)},)")
        self.scores.append(scores.detach().float())
        self.targets.append(targets.detach())
        self.index.append(index.detach().long())

    def gathered(self) -> tuple[Float[Tensor, "N C"], Shaped[Tensor, "N ..."]]:
        """Scores (float32) and targets of the whole fold on the CPU: all ranks, each sample once, by index.

        Every rank must call it if one does.

        Raises:
            ValueError: nothing was collected, or indices were given for some batches only.
        """
        synced = self._is_synced
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=not synced and self._to_sync, should_unsync=not synced
        ):
            if not self.collected:
                raise ValueError(f"{type(self).__name__}: found no batch, needed one update at least")
            return self.fold()

    @property
    def collected(self) -> bool:
        """Whether there was a batch."""
        return isinstance(self.scores, Tensor) or len(self.scores) > 0

    def fold(self) -> tuple[Tensor, Tensor]:
        """What this rank holds (all ranks after a sync), each sample once.

        Raises:
            ValueError: indices were given for some batches only.
        """
        scores, targets, index = (dim_zero_cat(state).cpu() for state in (self.scores, self.targets, self.index))
        indexed = index >= 0
        if not indexed.any():
            return scores, targets
        if not indexed.all():
            raise ValueError("index: found batches with and without indices, needed one or the other")
        index, order = index.sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return scores[order[first]], targets[order[first]]
