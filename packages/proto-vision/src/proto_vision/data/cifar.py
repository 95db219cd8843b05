"""CIFAR-10 and CIFAR-100 as their makers ship them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import ArrayReader
from proto_vision.data.module import ImageDataModule

__all__ = ["CIFAR"]


class CIFAR(ImageDataModule):
    """Tiny images of 10 or 100 classes, 50,000 for training and 10,000 for testing (torchvision reads them).

    Args:
        root: folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        classes: 10 or 100.
        val_fraction: share of each class's training images held out for validation.
        seed: of that share.
        download: fetch the data set where it is missing.
        image_size: height and width of the model's input; the images have 32.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: another number of classes, missing or corrupt files.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Literal[10, 100] = 10,
        val_fraction: float = 0.1,
        seed: int = 0,
        download: bool = False,
        image_size: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(root, image_size=image_size, **settings)
        if classes not in (10, 100):
            raise ValueError(f"classes: found {classes}, needed 10 or 100")
        self.classes, self.val_fraction, self.seed, self.download = classes, val_fraction, seed, download
        self._pixels: np.ndarray | None = None

    def prepare_data(self) -> None:
        """Fetch the data set, if that was asked for."""
        if self.download:
            self._parts(download=True)
        super().prepare_data()

    def _parts(self, *, download: bool = False) -> list[Any]:
        from torchvision import datasets

        source = datasets.CIFAR10 if self.classes == 10 else datasets.CIFAR100
        try:
            return [source(str(self.root), train=train, download=download) for train in (True, False)]
        except (RuntimeError, OSError, KeyError, EOFError) as error:
            folder = self.root / source.base_folder
            raise ValueError(
                f"root: {str(folder)!r} is missing or corrupt ({error}); --data.download gets it"
            ) from error

    def read_table(self) -> ImageTable:
        """Ids such as ``train-00000``."""
        train, test = self._parts()
        self._pixels = np.concatenate([train.data, test.data])
        targets = np.concatenate([train.targets, test.targets]).astype(np.int64)
        fold = np.full(len(targets), "test", dtype="<U5")
        fold[: len(train.data)] = "train"
        known = targets[: len(train.data)]
        fold[split_rows(known, self.val_fraction, self.seed, argument="val_fraction")] = "val"
        ids = [f"train-{n:05d}" for n in range(len(train.data))] + [f"test-{n:05d}" for n in range(len(test.data))]
        return ImageTable(ids, targets, fold, list(train.classes))

    def reader(self) -> ArrayReader:
        """Row -> 32 x 32 image."""
        _ = self.table
        assert self._pixels is not None
        return ArrayReader(self._pixels)
