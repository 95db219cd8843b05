"""Images named in list files, one ``path,label`` a line: how metric learning shares its data sets out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from proto_vision.data.class_split import by_fold
from proto_vision.data.dataset import ImageTable
from proto_vision.data.module import ImageDataModule

__all__ = ["GALLERY", "ImageList"]

GALLERY = "gallery"
"""Fold of images that test images (the queries) are compared with."""


class ImageList(ImageDataModule):
    """Images of list files. With a gallery, test images are queries, and a test goes through both.

    A label is any word; the same word in two lists is the same class. Lists may share classes (In-Shop: queries and
    gallery) or have their own (Stanford Online Products: training and test).

    Args:
        root: the folder that the paths start from; nothing is written into it.
        train: list file of the training images, from the root or anywhere.
        test: of the test images, or of the queries.
        val: of validation images, or ``None``.
        gallery: of the gallery, or ``None``: test images are compared with each other.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: a list that is missing, empty or cannot be read, a line without a path or a label, an image named
            twice or not there.
    """

    unseen_classes: ClassVar[bool] = True

    def __init__(
        self,
        root: str | Path,
        train: str = "train.txt",
        test: str = "test.txt",
        val: str | None = None,
        gallery: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self.lists = {"train": train, "val": val, "test": test, GALLERY: gallery}

    def read_table(self) -> ImageTable:
        """Images, classes and folds of the lists."""
        names: list[str] = []
        labels: list[str] = []
        folds: list[str] = []
        for fold, file in self.lists.items():
            if file is not None:
                rows = _rows(self.root / Path(file).expanduser())
                names += [name for name, _ in rows]
                labels += [label for _, label in rows]
                folds += [fold] * len(rows)
        unique, counts = np.unique(np.array(names), return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"{self.root}: found {str(unique[counts.argmax()])!r} in the lists more than once")
        missing = [name for name in names if not (self.root / name).is_file()]
        if missing:
            raise ValueError(f"{self.root}: {len(missing)} images of the lists are missing, such as {missing[:3]}")
        classes, targets = np.unique(np.array(labels), return_inverse=True)
        table = ImageTable(names, targets.astype(np.int64), np.array(folds), [str(name) for name in classes])
        return by_fold(table)

    def test_dataloader(self) -> Any:
        """Test images, or the queries and the gallery."""
        if self.lists[GALLERY] is None:
            return super().test_dataloader()
        return [super().test_dataloader(), self._loader(self._dataset(self.rows(GALLERY)))]


def _rows(path: Path) -> list[tuple[str, str]]:
    """Path and label of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list {str(path)!r}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, _, label = (part.strip() for part in line.rpartition(","))
            if not name or not label:
                raise ValueError(f"{path}, line {number}: found {line!r}, needed a path, a comma and a label")
            rows.append((name, label))
    if not rows:
        raise ValueError(f"{path}: found no line, needed path,label")
    return rows
