"""Rows of a source of images: what a batch is, what a table of images knows, and shares of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["FOLDS", "ImageBatch", "ImageDataset", "ImageTable", "Readable", "evenly_spaced", "split_rows"]

FOLDS: tuple[str, ...] = ("train", "val", "test")


class ImageBatch(NamedTuple):
    """A batch, or without the leading ``N`` an image.

    Attributes:
        image: ``[N, channels, S, S]`` float32, normalised; ``[N, V, channels, S, S]`` for training with V views.
        target: ``[N]`` int64, class.
        index: ``[N]`` int64, row of the data set's table.
        trusted: ``[N]`` bool, whether the target is known to be right (and may be used, where labels are kept back).
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a batch
    trusted: Tensor

    def stacked(self) -> ImageBatch:
        """Views as images of their own, ``[V N, channels, S, S]``: the first of all images, the second, and so on."""
        if self.image.ndim == 4:
            return self
        views = self.image.shape[1]
        return ImageBatch(self.image.transpose(0, 1).flatten(0, 1), *(part.repeat(views) for part in self[1:]))


class ImageTable(NamedTuple):
    """What a source knows about its images before any is read.

    Attributes:
        record_ids: paths relative to the root, or names; row -> id.
        targets: ``[N]`` int64 classes.
        fold: ``[N]`` of ``"train"``, ``"val"``, ``"test"``, or ``""`` for images in no fold.
        class_names: C names.
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)`` that are cut out, or ``None`` for whole images.
        trusted: ``[N]`` bool, rows whose targets are known to be right, or ``None`` for all.
        true_targets: ``[N]`` int64, what the targets were before a protocol made some of them wrong, or ``None``.
    """

    record_ids: list[str]
    targets: np.ndarray
    fold: np.ndarray
    class_names: list[str]
    boxes: np.ndarray | None = None
    trusted: np.ndarray | None = None
    true_targets: np.ndarray | None = None


class ImageDataset(Dataset[ImageBatch]):
    """Some rows of a source.

    Args:
        read: row -> RGB image.
        transform: RGB image -> ``[channels, S, S]``.
        targets: ``[N]`` classes of all rows.
        rows: the rows that belong to this data set, in its order.
        prepared: ``[N, channels, S, S]`` all rows as the transform makes them, where they are kept.
        trusted: ``[N]`` whether each target is known to be right; by default all are.
        views: further transforms; each image then comes as ``[1 + views, channels, S, S]``.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        transform: Callable[[Image.Image], Tensor],
        targets: Int[Tensor, " N"],
        rows: Int[np.ndarray, " n"],
        prepared: Float[Tensor, "N channels S S"] | None = None,
        *,
        trusted: Bool[Tensor, " N"] | None = None,
        views: Sequence[Callable[[Image.Image], Tensor]] = (),
    ) -> None:
        self.read, self.transform, self.prepared, self.views = read, transform, prepared, tuple(views)
        self.targets, self.rows = targets, np.asarray(rows, dtype=np.int64)
        self.trusted = torch.ones(len(targets), dtype=torch.bool) if trusted is None else trusted

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> ImageBatch:
        row = int(self.rows[position])
        if self.prepared is not None:
            image = self.prepared[row]
        else:
            raw = self.read(row)
            image = self.transform(raw)
            if self.views:
                image = torch.stack([image, *(view(raw) for view in self.views)])
        return ImageBatch(image, self.targets[row], torch.tensor(row), self.trusted[row])

    def __getitems__(self, positions: Sequence[int]) -> list[ImageBatch] | ImageBatch:
        """A whole batch: at once where images are kept, one by one where they are read."""
        if self.prepared is None:
            return [self[position] for position in positions]
        rows = torch.from_numpy(self.rows[np.asarray(positions, dtype=np.int64)])
        return ImageBatch(self.prepared[rows], self.targets[rows], rows, self.trusted[rows])

    @staticmethod
    def collate(batch: Any) -> ImageBatch:
        """One batch of single images, or the batch as it was fetched."""
        if isinstance(batch, ImageBatch):
            return batch
        return ImageBatch(*(torch.stack(parts) for parts in zip(*batch)))


class Readable(Dataset[tuple[int, str]]):
    """Row -> what is wrong with its image, or nothing."""

    def __init__(self, read: Callable[[int], Image.Image], count: int) -> None:
        self.read, self.count = read, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[int, str]:
        try:
            self.read(row)
        except ValueError as error:
            return row, str(error)
        return row, ""


def split_rows(
    targets: Int[np.ndarray, " N"], fraction: float, seed: int, *, argument: str = "fraction"
) -> Int[np.ndarray, " n"]:
    """A share of the rows of every class, drawn at random; a class keeps at least one row.

    Args:
        targets: classes.
        fraction: share that is drawn, in [0, 1), rounded down per class.
        seed: of the draw.
        argument: name for the error.

    Returns:
        Sorted rows.

    Raises:
        ValueError: a fraction outside [0, 1).

    Example:
        >>> import numpy as np
        >>> from proto_vision.data.dataset import split_rows
        >>> split_rows(np.array([0, 0, 0, 0, 1]), 0.5, seed=0).tolist()
        [2, 3]
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"{argument}: found {fraction}, needed a share in [0, 1)")
    order = np.random.default_rng(seed).permutation(len(targets))
    grouped = order[np.argsort(targets[order], kind="stable")]
    classes, start, count = np.unique(targets[grouped], return_index=True, return_counts=True)
    del classes
    place = np.arange(len(grouped)) - np.repeat(start, count)
    return np.sort(grouped[place < np.repeat((fraction * count + 1e-9).astype(int), count)])


def evenly_spaced(rows: Int[np.ndarray, " N"], limit: int | None) -> Int[np.ndarray, " n"]:
    """At most so many of the rows, from the first to the last; all where there is no limit.

    Raises:
        ValueError: a limit below 1.

    Example:
        >>> import numpy as np
        >>> from proto_vision.data.dataset import evenly_spaced
        >>> evenly_spaced(np.arange(9), 3).tolist()
        [0, 4, 8]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, needed at least 1")
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]
