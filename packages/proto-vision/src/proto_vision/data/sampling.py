"""Drawing training images with unequal chances, the same draw on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DistributedSampler

from proto_core.distributed import is_distributed

__all__ = ["WeightedDraws"]


class WeightedDraws(DistributedSampler[int]):
    """As many draws with replacement as there are rows, shared out evenly among the ranks.

    All ranks make the same draw and each takes its own part, so that several processes see what one would. The draw
    depends on torch's seed and on the epoch, which a trainer sets: a resumed run goes on with the draws it would have
    had.

    Args:
        weights: ``[N]`` how often each row is drawn, relative to the others.

    Raises:
        ValueError: no row, a negative weight, or none above 0.

    Example:
        >>> import torch
        >>> from proto_vision.data.sampling import WeightedDraws
        >>> list(WeightedDraws(torch.tensor([0.0, 0.0, 1.0])))
        [2, 2, 2]
    """

    def __init__(self, weights: Float[Tensor, "N"]) -> None:
        if weights.ndim != 1 or not len(weights) or not bool((weights >= 0).all()) or not bool(weights.any()):
            raise ValueError(f"weights: found shape {tuple(weights.shape)}, needed [N] at least 0, one above 0")
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if is_distributed() else (1, 0)
        self.weights = weights.double()
        super().__init__(range(len(weights)), ranks, rank, seed=torch.initial_seed() % 2**62)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        g = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(self.weights, self.total_size, replacement=True, generator=g)
        return iter(drawn[self.rank :: self.num_replicas].tolist())
