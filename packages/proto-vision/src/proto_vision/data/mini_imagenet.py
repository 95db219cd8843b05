"""miniImageNet as it lies on disk: a folder of images and a CSV file for each fold, each with classes of its own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from proto_vision.data.class_split import by_fold
from proto_vision.data.dataset import FOLDS, ImageTable
from proto_vision.data.module import ImageDataModule

__all__ = ["MiniImageNet"]

_LABELS = ("wnid", "label")


class MiniImageNet(ImageDataModule):
    """``train.csv``, ``val.csv`` and ``test.csv`` with columns ``filename`` and ``wnid`` (or ``label``), and images.

    Args:
        root: the folder of the CSV files; nothing is written into it.
        images: the folder of the images, from the root.
        image_size: height and width of the model's input: 84 for ConvNet-4, 80 for ResNet-12.
        resize: see :class:`~proto_vision.data.module.ImageDataModule`.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: no ``train.csv``, a file without these columns, a class in two folds, images that are not there.
    """

    unseen_classes: ClassVar[bool] = True

    def __init__(
        self, root: str | Path, images: str = "images", image_size: int = 84, resize: Any = "crop", **settings: Any
    ) -> None:
        super().__init__(root, image_size=image_size, resize=resize, **settings)
        self.images = images

    def read_table(self) -> ImageTable:
        """Images, classes and folds of the CSV files."""
        names, labels, folds = [], [], []
        for fold in FOLDS:
            path = self.root / f"{fold}.csv"
            if path.is_file():
                rows = _rows(path)
                names += [f"{self.images}/{name}" for name, _ in rows]
                labels += [label for _, label in rows]
                folds += [fold] * len(rows)
        if "train" not in folds:
            raise ValueError(f"{self.root}: found no train.csv, needed it, and val.csv and test.csv beside it")
        missing = [name for name in names if not (self.root / name).is_file()]
        if missing:
            raise ValueError(f"{self.root}: {len(missing)} images of the CSV files are missing, such as {missing[:3]}")
        classes, targets = np.unique(np.array(labels), return_inverse=True)
        fold_array = np.array(folds, dtype="<U5")
        held = {fold: set(targets[fold_array == fold].tolist()) for fold in FOLDS}
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            if both := held[one] & held[other]:
                raise ValueError(f"{self.root}: found class {str(classes[min(both)])!r} in {one}.csv and {other}.csv")
        table = ImageTable(names, targets.astype(np.int64), fold_array, [str(name) for name in classes])
        return by_fold(table)


def _rows(path: Path) -> list[tuple[str, str]]:
    """File name and class of each line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error})") from error
    columns = list(table[0]) if table else []
    label = next((name for name in _LABELS if name in columns), None)
    if label is None or "filename" not in columns:
        raise ValueError(f"{path}: found columns {columns}, needed filename and wnid (or label)")
    rows = [((row["filename"] or "").strip(), (row[label] or "").strip()) for row in table]
    for line, row in enumerate(rows, 2):
        if not all(row):
            raise ValueError(f"{path}, line {line}: found {row}, needed a file name and a class")
    return rows
