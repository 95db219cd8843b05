"""Images in folders, one folder per class, or named in a table: what most people have on disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from proto_vision.data.dataset import FOLDS, ImageTable, split_rows
from proto_vision.data.images import find_images
from proto_vision.data.module import ImageDataModule

__all__ = ["ImageFolder"]

_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class ImageFolder(ImageDataModule):
    """A folder of images, in one of three layouts.

    - ``root/train/CLASS/...``, and ``val`` and ``test`` likewise. Without ``test``, ``val`` is the test fold (as with
      ImageNet), and a share of the training images is held out for validation.
    - ``root/CLASS/...``: shares of each class are drawn for testing and validation.
    - any folder with a CSV table: columns ``image`` (path from the root), ``label`` and, if wanted, ``split`` (train,
      val, test); images without a split are training images.

    Args:
        root: the folder; nothing is written into it.
        labels: the CSV table, or ``None`` for folders per class.
        val_fraction: share of each class's training images held out for validation where there is no such split.
        test_fraction: share of each class's images for testing where there is no such split.
        seed: of the shares.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: an empty folder or class, classes of ``val`` or ``test`` that ``train`` lacks, class names that
            differ by letter case only, a table that names missing files or columns.
    """

    def __init__(
        self,
        root: str | Path,
        labels: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self.labels = labels
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed

    def read_table(self) -> ImageTable:
        """Images, classes and folds of the folder or the table."""
        if not self.root.is_dir():
            raise ValueError(f"root: {str(self.root)!r} is no folder, needed one that holds images")
        names, labels, split = self._listed() if self.labels else self._found()
        classes = sorted(set(labels))
        _check_names(self.root, classes)
        place = {name: number for number, name in enumerate(classes)}
        targets = np.array([place[label] for label in labels], dtype=np.int64)
        fold = np.array(split, dtype="<U5")
        if not (fold == "test").any():
            if (fold == "val").any():
                fold[fold == "val"] = "test"
            else:
                fold[split_rows(targets, self.test_fraction, self.seed, argument="test_fraction")] = "test"
        if not (fold == "val").any():
            train = np.flatnonzero(fold == "train")
            chosen = split_rows(targets[train], self.val_fraction, self.seed, argument="val_fraction")
            fold[train[chosen]] = "val"
        return ImageTable(names, targets, fold, classes)

    def _found(self) -> tuple[list[str], list[str], list[str]]:
        there = {path.name: path for path in sorted(self.root.iterdir()) if path.is_dir() and path.name[0] != "."}
        parts = {fold: there[name] for fold, names in _NAMES.items() for name in names if name in there}
        if "train" not in parts:
            parts = {"train": self.root}
        names: list[str] = []
        labels: list[str] = []
        split: list[str] = []
        known: set[str] = set()
        for fold, folder in parts.items():
            classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
            if not classes:
                raise ValueError(f"{folder}: found no folder, needed one per class with images in it")
            strange = [path.name for path in classes if known and path.name not in known]
            if strange:
                near = {name.casefold(): name for name in known}
                hint = "".join(f" ({near[s.casefold()]!r} there)" for s in strange[:1] if s.casefold() in near)
                raise ValueError(f"{folder}: found classes that {parts['train'].name} lacks: {strange[:5]}{hint}")
            for path in classes:
                images = find_images(path)
                if not images:
                    raise ValueError(f"{path}: found no image, needed at least one (or no such folder)")
                names += [image.relative_to(self.root).as_posix() for image in images]
                labels += [path.name] * len(images)
                split += [fold] * len(images)
            known = known or {path.name for path in classes}
        return names, labels, split

    def _listed(self) -> tuple[list[str], list[str], list[str]]:
        path = Path(str(self.labels)).expanduser()
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"labels: {str(path)!r} cannot be read ({error})") from error
        if not table or not {"image", "label"} <= set(table[0]):
            found = list(table[0]) if table else []
            raise ValueError(f"labels: {str(path)!r} has columns {found}, needed image, label and perhaps split")
        names = [(row["image"] or "").strip() for row in table]
        labels = [(row["label"] or "").strip() for row in table]
        split = [(row.get("split") or "train").strip().lower() for row in table]
        for line, (name, label, fold) in enumerate(zip(names, labels, split), 2):
            if not name or not label or fold not in FOLDS:
                raise ValueError(f"{path}, line {line}: found {table[line - 2]}, needed an image, a label, and {FOLDS}")
        missing = [name for name in names if not (self.root / name).is_file()]
        if missing:
            raise ValueError(f"labels: {len(missing)} images of {path} are not in {self.root}, such as {missing[:3]}")
        doubled = sorted({name for name in names if names.count(name) > 1})[:3] if len(set(names)) < len(names) else []
        if doubled:
            raise ValueError(f"labels: {path} names images twice, such as {doubled}")
        return names, labels, split


def _check_names(root: Path, classes: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"{root}: found classes {other!r} and {name!r}, which differ by letter case only")
