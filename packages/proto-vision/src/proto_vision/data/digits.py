"""The handwritten digits of scikit-learn, enlarged: 1,797 images that need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import ArrayReader
from proto_vision.data.module import ImageDataModule

__all__ = ["Digits"]


class Digits(ImageDataModule):
    """Ten classes of 8 x 8 grey digits, enlarged to ``image_size``; half for training, half for testing.

    Args:
        image_size: height and width of the model's input.
        in_channels: 1 (grey) or 3 (three equal channels).
        val_fraction: share of the training half that is held out for validation.
        seed: of the split.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Example:
        >>> from proto_vision import Digits
        >>> data = Digits(image_size=16, batch_size=4)
        >>> data.setup("fit")
        >>> next(iter(data.val_dataloader())).image.shape
        torch.Size([4, 1, 16, 16])
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        val_fraction: float = 0.2,
        seed: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(
            "scikit-learn digits", image_size=image_size, in_channels=in_channels, batch_size=batch_size, **settings
        )
        self.val_fraction, self.seed = val_fraction, seed
        self._pixels: np.ndarray | None = None

    def read_table(self) -> ImageTable:
        """Ids ``digit-0000`` to ``digit-1796``."""
        digits = load_digits()
        self._pixels = np.clip(digits.images * 16, 0, 255).astype(np.uint8)
        targets = digits.target.astype(np.int64)
        fold = np.full(len(targets), "train", dtype="<U5")
        fold[split_rows(targets, 0.5, self.seed)] = "test"
        train = np.flatnonzero(fold == "train")
        fold[train[split_rows(targets[train], self.val_fraction, self.seed, argument="val_fraction")]] = "val"
        names = [f"digit-{row:04d}" for row in range(len(targets))]
        return ImageTable(names, targets, fold, [str(digit) for digit in range(10)])

    def reader(self) -> ArrayReader:
        """Row -> 8 x 8 image."""
        _ = self.table
        assert self._pixels is not None
        return ArrayReader(self._pixels)
