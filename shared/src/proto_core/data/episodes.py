"""Few-shot episodes: N classes, K support samples and Q queries of each, none of them twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["EpisodeSampler"]


class EpisodeSampler:
    """Indices of episodes: all supports class by class, then all queries in the same order of classes.

    Unlike the sampler of SuSana Distancia's authors (arXiv 2305.09062), a query is never a support sample of its
    episode. As a ``batch_sampler`` of a ``DataLoader`` it gives one episode per batch.

    Args:
        labels: label of each sample, ``[N]``.
        n_way: classes of an episode.
        n_shot: support samples of a class.
        n_query: queries of a class.
        n_episodes: episodes of one iteration.
        seed: with a seed every iteration gives the same episodes (for validation and tests); without, they come from
            torch's global generator.

    Raises:
        ValueError: a number below 1 (queries: below 0), fewer classes than ``n_way``, a class with fewer samples than
            an episode takes.

    Example:
        >>> import torch
        >>> from proto_core.data import EpisodeSampler
        >>> labels = torch.arange(40) % 4
        >>> episode = next(iter(EpisodeSampler(labels, n_way=2, n_shot=1, n_query=3, n_episodes=5, seed=0)))
        >>> episode.shape, labels[episode[:2]].unique().numel()
        (torch.Size([8]), 2)
    """

    def __init__(
        self, labels: Any, n_way: int, n_shot: int, n_query: int, n_episodes: int, seed: int | None = None
    ) -> None:
        for name, value, least in [
            ("n_way", n_way, 1),
            ("n_shot", n_shot, 1),
            ("n_query", n_query, 0),
            ("n_episodes", n_episodes, 1),
        ]:
            if value < least:
                raise ValueError(f"{name}: found {value}, needed at least {least}")
        values = torch.as_tensor(labels)
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"labels: found shape {tuple(values.shape)}, needed [N] with N at least 1")
        classes, inverse, counts = values.cpu().unique(return_inverse=True, return_counts=True)
        if len(classes) < n_way:
            raise ValueError(f"labels: found {len(classes)} classes, needed at least n_way = {n_way}")
        if int(counts.min()) < n_shot + n_query:
            poorest = int(counts.argmin())
            raise ValueError(
                f"labels: found {int(counts[poorest])} samples of class {classes[poorest].item()}, needed "
                f"{n_shot + n_query} (n_shot + n_query)"
            )
        self.n_way, self.n_shot, self.n_query, self.n_episodes, self.seed = n_way, n_shot, n_query, n_episodes, seed
        self._rows = list(inverse.argsort(stable=True).split(counts.tolist()))

    def __len__(self) -> int:
        return self.n_episodes

    def __iter__(self) -> Iterator[Int[Tensor, "samples"]]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        each = self.n_shot + self.n_query
        for _ in range(self.n_episodes):
            classes = torch.randperm(len(self._rows), generator=generator)[: self.n_way].tolist()
            drawn = torch.stack(
                [self._rows[c][torch.randperm(len(self._rows[c]), generator=generator)[:each]] for c in classes]
            )
            yield torch.cat([drawn[:, : self.n_shot].flatten(), drawn[:, self.n_shot :].flatten()])
