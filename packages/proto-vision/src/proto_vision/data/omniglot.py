"""Omniglot as it lies on disk: handwritten characters of many alphabets, drawn by 20 people each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.progress import track

from proto_vision.data.class_split import by_fold
from proto_vision.data.dataset import ImageTable
from proto_vision.data.images import ArrayReader, find_images, read_image
from proto_vision.data.module import ImageDataModule

__all__ = ["Omniglot"]

_FOLDS = {"images_background": "train", "images_evaluation": "test"}


class TurnedReader(ArrayReader):
    """Row -> image of an array; rows past its end are the same images turned by 90, 180 and 270 degrees.

    Args:
        pixels: ``[M, H, W]`` grey, uint8.
    """

    def __call__(self, row: int) -> Any:
        """The image of a row."""
        turns, place = divmod(row, len(self.pixels))
        image = super().__call__(place)
        return image.rotate(90 * turns, expand=True) if turns else image


class Omniglot(ImageDataModule):
    """Characters as classes named ``ALPHABET/CHARACTER``, read into memory once (11 kB an image).

    - ``root/images_background/ALPHABET/CHARACTER/*.png`` trains, ``root/images_evaluation/...`` is the test fold.
    - ``root/ALPHABET/CHARACTER/*.png`` (one of these folders, or an excerpt) trains; a protocol such as
      :class:`~proto_vision.data.class_split.ClassSplit` gives whole alphabets to validation and test.

    Args:
        root: the folder; nothing is written into it.
        rotations: also each character turned by 90, 180 and 270 degrees, as classes ``ALPHABET/CHARACTER/90`` and so
            on, as is usual in few-shot learning.
        image_size: height and width of the model's input.
        in_channels: 1 (grey) or 3.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: no folder, no image in it, images that lie elsewhere or differ in size.
    """

    unseen_classes: ClassVar[bool] = True

    def __init__(
        self,
        root: str | Path,
        rotations: bool = False,
        image_size: int = 28,
        in_channels: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(root, image_size=image_size, in_channels=in_channels, **settings)
        self.rotations = rotations
        self._files: list[Path] = []
        self._pixels: np.ndarray | None = None

    def read_table(self) -> ImageTable:
        """Images, characters and folds; with rotations, all upright ones come first, then all turned by 90, ..."""
        if not self.root.is_dir():
            raise ValueError(f"root: {str(self.root)!r} is no folder, needed one that holds Omniglot")
        parts = {name: fold for name, fold in _FOLDS.items() if (self.root / name).is_dir()} or {".": "train"}
        self._files, folds, classes = [], [], []
        for name, fold in parts.items():
            folder = self.root / name
            for path in find_images(folder):
                places = path.relative_to(folder).parts
                if len(places) != 3:
                    raise ValueError(f"{path}: needed images at ALPHABET/CHARACTER/NAME below {folder}")
                self._files.append(path)
                folds.append(fold)
                classes.append("/".join(places[:2]))
        if not self._files:
            raise ValueError(f"{self.root}: found no image, needed ALPHABET/CHARACTER/*.png")
        ids = [path.relative_to(self.root).as_posix() for path in self._files]
        turns = ["", "/90", "/180", "/270"] if self.rotations else [""]
        labels = [label + turn for turn in turns for label in classes]
        names, targets = np.unique(np.array(labels), return_inverse=True)
        return by_fold(
            ImageTable(
                [f"{name}{turn.replace('/', '@')}" for turn in turns for name in ids],
                targets.astype(np.int64),
                np.array(folds * len(turns), dtype="<U5"),
                [str(name) for name in names],
            )
        )

    def reader(self) -> ArrayReader:
        """Row -> image, black on white; reads all files on first use."""
        _ = self.table
        if self._pixels is None:
            found = [
                np.asarray(read_image(path).convert("L")) for path in track(self._files, "reading", transient=True)
            ]
            sizes = {pixels.shape for pixels in found}
            if len(sizes) > 1:
                raise ValueError(f"{self.root}: found images of {sorted(sizes)} pixels, needed one size for all")
            self._pixels = np.stack(found)
        return TurnedReader(self._pixels)
