"""Samplings: which images come together in a batch, where chance must not decide alone.

A sampling is an argument of every data module (``--data.sampling``): episodes for few-shot learning, batches of P
classes with K images each for metric learning. Under DDP all ranks draw the same batches and take turns, so that no
batch is torn and each rank has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from proto_core.checks import check_positive
from proto_core.data import EpisodeSampler
from proto_core.distributed import is_distributed
from proto_vision.data.dataset import ImageBatch, ImageDataset

__all__ = ["ClassBalanced", "Episode", "Episodes", "Sampling", "SharedBatches", "WholeBatches", "as_episode"]

Draw = Callable[[int, int], Iterator[Any]]


class Episode(NamedTuple):
    """A batch as a task: W classes, S supports and Q queries of each.

    Attributes:
        image: ``[W S + W Q, channels, S, S]``, supports class by class, then queries in the same order of classes.
        target: ``[W S + W Q]`` classes in the data set.
        index: ``[W S + W Q]`` rows of the data set's table.
        way: W.
        shot: S.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # as in ImageBatch
    way: int
    shot: int

    @property
    def query(self) -> int:
        """Q."""
        return len(self.image) // self.way - self.shot

    def labels(self) -> tuple[Int[Tensor, "supports"], Int[Tensor, "queries"]]:
        """Places of the supports' and of the queries' classes in the episode, 0 to W - 1."""
        classes = torch.arange(self.way, device=self.image.device)
        return classes.repeat_interleave(self.shot), classes.repeat_interleave(self.query)


def as_episode(batch: ImageBatch) -> Episode:
    """A batch in the order of :class:`Episodes` as an episode; reads targets, so done on the CPU.

    Raises:
        ValueError: images in another order than supports class by class and queries in the same order.

    Example:
        >>> import torch
        >>> from proto_vision.data.dataset import ImageBatch
        >>> from proto_vision.data.batches import as_episode
        >>> targets = torch.tensor([7, 7, 2, 2, 7, 2])
        >>> episode = as_episode(ImageBatch(torch.zeros(6, 1, 4, 4), targets, targets, targets > 0))
        >>> episode.way, episode.shot, episode.query, episode.labels()[1].tolist()
        (2, 2, 1, [0, 1])
    """
    targets = batch.target
    way = len(targets.unique())
    changes = (targets != targets[:1]).nonzero() if len(targets) else targets
    shot = int(changes[0]) if len(changes) else 0
    each = len(targets) // max(way, 1)
    fits = 0 < shot < each and way * each == len(targets)
    if fits:
        supports, queries = targets[: way * shot].view(way, shot), targets[way * shot :].view(way, -1)
        fits = bool((supports == supports[:, :1]).all() and (queries == supports[:, :1]).all())
    if not fits:
        raise ValueError(
            f"batch: found {len(targets)} images of {way} classes that are no episode, needed supports class by class, "
            "then queries in the same order of classes"
        )
    return Episode(batch.image, targets, batch.index, way, shot)


class WholeBatches(Dataset[Any]):
    """Positions of a batch -> the batch: for loaders whose sampler gives batches.

    Args:
        images: whose positions they are.
        arrange: what becomes of a batch.
    """

    def __init__(self, images: ImageDataset, arrange: Callable[[ImageBatch], Any]) -> None:
        self.images, self.arrange = images, arrange

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: Any) -> Any:
        return self.arrange(ImageDataset.collate(self.images.__getitems__(torch.as_tensor(positions).tolist())))


class SharedBatches(DistributedSampler[Any]):
    """The batches of an epoch that are this rank's: every world-size-th. Lightning sets the epoch before it starts.

    Args:
        draw: ``(epoch, count)`` -> the epoch's first ``count`` batches, the same on all ranks.
        count: batches of an epoch, of all ranks together.
        even: whether all ranks take equally many, more than ``count`` in sum if need be (training).

    Example:
        >>> from proto_vision.data.batches import SharedBatches
        >>> batches = SharedBatches(lambda epoch, count: ([epoch, n] for n in range(count)), 3)
        >>> batches.set_epoch(5)
        >>> list(batches), len(batches)
        ([[5, 0], [5, 1], [5, 2]], 3)
    """

    def __init__(self, draw: Draw, count: int, *, even: bool = True) -> None:
        world, rank = (dist.get_world_size(), dist.get_rank()) if is_distributed() else (1, 0)
        super().__init__(range(count), world, rank, shuffle=False)  # type: ignore[arg-type]  # only its length counts
        self.draw, self.count = draw, self.total_size if even else count

    def __len__(self) -> int:
        return len(range(self.rank, self.count, self.num_replicas))

    def __iter__(self) -> Iterator[Any]:
        return islice(self.draw(self.epoch, self.count), self.rank, None, self.num_replicas)


class Sampling(ABC):
    """How the batches of a fold are drawn.

    Args:
        seed: of the draws; together with the epoch it decides on the batches.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def chances(self, fold: str, trusted: Bool[Tensor, "N"]) -> Float[Tensor, "N"] | None:
        """How often each image of a fold is drawn, with replacement, into batches of the data module's size.

        Args:
            fold: ``"train"``, ``"val"`` or ``"test"``.
            trusted: whether the target of each of its images may be used.

        Returns:
            Weights, or ``None`` where images are not drawn by chances.
        """
        return None

    @abstractmethod
    def __call__(self, fold: str, targets: Int[Tensor, "N"]) -> SharedBatches | None:
        """Batches of positions in a fold, or ``None`` for those of an ordinary loader.

        Args:
            fold: ``"train"``, ``"val"`` or ``"test"``.
            targets: classes of its images.
        """

    def arrange(self, batch: ImageBatch) -> Any:
        """What a batch becomes before it leaves the loader."""
        return batch

    def seed_of(self, epoch: int) -> int:
        """A seed for an epoch that has nothing to do with its neighbours'."""
        return int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])


class Episodes(Sampling):
    """Few-shot episodes: W classes, of each S support images and Q queries, none twice.

    Batches are :class:`Episode`: supports class by class, then the queries in the same order of classes. Those of
    validation and test are the same every time.

    Args:
        way: W of validation and test.
        shot: S.
        query: Q.
        train_way: W of training, usually more.
        episodes: of a training epoch.
        val_episodes: of a validation.
        test_episodes: of a test.
        seed: of the draws.

    Raises:
        ValueError: a number below 1; when called: fewer classes than W, a class with fewer than S + Q images.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.batches import Episodes
        >>> data = Digits(image_size=8, sampling=Episodes(way=3, shot=1, query=2, train_way=4, episodes=5))
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.image.shape, batch.target[:4].tolist() == batch.target[4::2].tolist()
        (torch.Size([12, 1, 8, 8]), True)
    """

    def __init__(
        self,
        way: int = 5,
        shot: int = 1,
        query: int = 15,
        train_way: int = 30,
        episodes: int = 100,
        val_episodes: int = 500,
        test_episodes: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        check_positive(way=way, shot=shot, query=query, train_way=train_way)
        check_positive(episodes=episodes, val_episodes=val_episodes, test_episodes=test_episodes)
        self.way, self.shot, self.query, self.train_way = way, shot, query, train_way
        self.counts = {"train": episodes, "val": val_episodes, "test": test_episodes}

    def __call__(self, fold: str, targets: Int[Tensor, "N"]) -> SharedBatches:
        """Episodes of a fold."""
        train = fold == "train"
        way = self.train_way if train else self.way

        def draw(epoch: int, count: int) -> Iterator[Int[Tensor, "samples"]]:
            seed = self.seed_of(epoch) if train else self.seed
            return iter(EpisodeSampler(targets, way, self.shot, self.query, count, seed=seed))

        try:
            EpisodeSampler(targets, way, self.shot, self.query, 1, seed=0)
        except ValueError as error:
            raise ValueError(f"sampling, {fold} fold: {error}") from error
        return SharedBatches(draw, self.counts[fold], even=train)

    def arrange(self, batch: ImageBatch) -> Episode:
        """The batch as an episode."""
        return as_episode(batch)


class ClassBalanced(Sampling):
    """Training batches of P classes with K images each.

    The images of each class are shuffled and cut into chunks of K; a class of fewer is filled up by drawing some of
    its images again. A batch takes a chunk of each of P random classes that have one left; when fewer than P have,
    everything is shuffled anew.

    Args:
        classes: P.
        images: K.
        batches: of an epoch, of all ranks together; ``None``: as many as hold the number of training images.
        seed: of the draws.

    Raises:
        ValueError: a number below 1; when called: fewer than P classes.

    Source:
        Multi-Similarity Loss (arXiv 1904.06627), the authors' sampler.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.batches import ClassBalanced
        >>> data = Digits(image_size=8, sampling=ClassBalanced(classes=4, images=3))
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.target.unique(return_counts=True)[1].tolist()
        [3, 3, 3, 3]
    """

    def __init__(self, classes: int = 16, images: int = 5, batches: int | None = None, seed: int = 0) -> None:
        super().__init__(seed)
        check_positive(classes=classes, images=images)
        if batches is not None:
            check_positive(batches=batches)
        self.classes, self.images, self.batches = classes, images, batches

    def __call__(self, fold: str, targets: Int[Tensor, "N"]) -> SharedBatches | None:
        """Batches of the training fold; the other folds are gone through as they are."""
        if fold != "train":
            return None
        found = len(targets.unique())
        if found < self.classes:
            raise ValueError(f"sampling: found {found} classes in the {fold} fold, needed {self.classes} for a batch")

        def draw(epoch: int, count: int) -> Iterator[Int[Tensor, "samples"]]:
            generator = torch.Generator().manual_seed(self.seed_of(epoch))
            return islice(self._endless(targets, generator), count)

        return SharedBatches(draw, self.batches or max(1, len(targets) // (self.classes * self.images)))

    def _endless(self, targets: Int[Tensor, "N"], generator: torch.Generator) -> Iterator[Int[Tensor, "samples"]]:
        while True:
            chunks, left = self._chunks(targets, generator)
            first = left.cumsum(0) - left
            while int((left > 0).sum()) >= self.classes:
                open_classes = (left > 0).nonzero().flatten()
                chosen = open_classes[torch.randperm(len(open_classes), generator=generator)[: self.classes]]
                left[chosen] -= 1
                yield chunks[first[chosen] + left[chosen]].flatten()

    def _chunks(
        self, targets: Int[Tensor, "N"], generator: torch.Generator
    ) -> tuple[Int[Tensor, "chunks K"], Int[Tensor, "C"]]:
        """All chunks, class by class, and how many each class has."""
        order = torch.randperm(len(targets), generator=generator)
        order = order[targets[order].argsort(stable=True)]
        counts = targets.unique(return_counts=True)[1]
        first = counts.cumsum(0) - counts
        number = (counts // self.images).clamp_min(1)
        chunk_class = torch.arange(len(counts)).repeat_interleave(number)
        in_class = torch.arange(len(chunk_class)) - (number.cumsum(0) - number)[chunk_class]
        place = in_class[:, None] * self.images + torch.arange(self.images)
        size = counts[chunk_class, None]
        again = (torch.rand(place.shape, generator=generator) * size).long().clamp(max=size - 1)
        return order[first[chunk_class, None] + torch.where(place < size, place, again)], number
