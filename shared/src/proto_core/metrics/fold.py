"""Scores and targets of a whole fold, gathered over batches and ranks: an average over batches is another number."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from proto_core.distributed import gather_parts

__all__ = ["FoldScores", "SampleLists"]


class SampleLists(Metric):
    """Keeps what it is given of every sample in lists, and gathers them over ranks, which may have none.

    Args:
        names: of the lists, which become attributes.
    """

    full_state_update = False

    def __init__(self, *names: str, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_parts} | kwargs)
        self.lists = names
        for name in names:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def collected(self) -> bool:
        """Whether there was a batch: on any rank after a sync."""
        state = getattr(self, self.lists[0])
        return state.numel() > 0 if isinstance(state, Tensor) else len(state) > 0

    def joined(self) -> tuple[Tensor, ...]:
        """All lists, each as one tensor.

        Raises:
            ValueError: there was no batch.
        """
        if not self.collected:
            raise ValueError(f"{type(self).__name__}: found no batch, needed one update at least")
        return tuple(dim_zero_cat(getattr(self, name)) for name in self.lists)


class FoldScores(SampleLists):
    """Collects ``scores [N, C]`` and targets; subclasses say what is computed of them (torchmetrics).

    Where sample indices are given, samples seen twice (the padding of a distributed sampler) count once.
    """

    is_differentiable = False
    higher_is_better = True
    scores: list[Tensor]
    targets: list[Tensor]
    index: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("scores", "targets", "index", **kwargs)

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
            return self.fold()

    def fold(self) -> tuple[Tensor, Tensor]:
        """What this rank holds (all ranks after a sync), each sample once.

        Raises:
            ValueError: nothing was collected, or indices were given for some batches only.
        """
        scores, targets, index = (state.cpu() for state in self.joined())
        indexed = index >= 0
        if not indexed.any():
            return scores, targets
        if not indexed.all():
            raise ValueError("index: found batches with and without indices, needed one or the other")
        index, order = index.sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return scores[order[first]], targets[order[first]]
