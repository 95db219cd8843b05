"""miniImageNet, CIFAR-FS and tieredImageNet in the files of RFS: base classes train, new classes are told apart.

Source: the layout of "Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?", ECCV 2020, arXiv
2003.11539. Difference from the authors' code: pickles are read without running them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from PIL import Image

from proto_vision.data.class_split import by_fold
from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import FileReader
from proto_vision.data.module import ImageDataModule
from proto_vision.data.plain_pickle import read_plain_pickle

__all__ = ["FewShotImages"]

Name = Literal["miniImageNet", "CIFAR-FS", "tieredImageNet"]

_MINI = "miniImageNet_category_split_"
_FILES: dict[str, dict[str, str]] = {
    "miniImageNet": {
        "train": f"{_MINI}train_phase_train.pickle",
        "held": f"{_MINI}train_phase_val.pickle",
        "val": f"{_MINI}val.pickle",
        "test": f"{_MINI}test.pickle",
    },
    "CIFAR-FS": {part: f"CIFAR_FS_{part}.pickle" for part in ("train", "val", "test")},
    "tieredImageNet": {part: f"{part}_labels.pkl" for part in ("train", "val", "test")},
}
"""Data set -> file of the labels of a part; ``held`` are other images of the training classes, where there are any."""


class FewShotImages(ImageDataModule):
    """Training images of base classes, held-out images of the same classes for validation, new classes for the test.

    - miniImageNet: ``miniImageNet_category_split_train_phase_train.pickle``, ``..._val.pickle``, ``..._test.pickle``;
      ``..._train_phase_val.pickle``, where it is there, validates.
    - CIFAR-FS: ``CIFAR_FS_train.pickle``, ``CIFAR_FS_val.pickle``, ``CIFAR_FS_test.pickle``.
    - tieredImageNet: ``train_images.npz`` and ``train_labels.pkl``, likewise ``val`` and ``test``.

    A pickle is a dictionary with ``data``, uint8 ``[N, S, S, 3]``, and ``labels``, N whole numbers (tieredImageNet:
    ``labels`` alone, its images are the array ``images``). Only the training file, the file of the new classes and, if
    need be, that of validation are read, whole into memory. Classes are named by their numbers.

    Args:
        root: the folder of the files; nothing is written into it.
        name: which of the three.
        novel: whose classes the test fold holds: ``"test"``, or ``"val"`` to choose settings by.
        val_fraction: share of each base class's images held out for validation where no file holds such images.
        seed: of that share.
        image_size: height and width of the model's input; ``None``: that of the images, 84 or 32 (CIFAR-FS).
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: an unknown name, a missing file, one that holds anything else, a class in two files that need
            classes of their own; names the file.

    Source:
        arXiv 2003.11539, section 4.
    """

    unseen_classes: ClassVar[bool] = True

    def __init__(
        self,
        root: str | Path,
        name: Name = "miniImageNet",
        novel: Literal["test", "val"] = "test",
        val_fraction: float = 0.1,
        seed: int = 0,
        image_size: int | None = None,
        **settings: Any,
    ) -> None:
        if name not in get_args(Name):
            raise ValueError(f"name: found {name!r}, needed one of {get_args(Name)}")
        if novel not in ("test", "val"):
            raise ValueError(f"novel: found {novel!r}, needed 'test' or 'val'")
        native = 32 if name == "CIFAR-FS" else 84
        super().__init__(root, image_size=native if image_size is None else image_size, **settings)
        self.name, self.novel, self.val_fraction, self.seed = name, novel, val_fraction, seed
        self._pixels: list[np.ndarray] | None = None

    def _paths(self) -> dict[str, Path]:
        """Fold -> file of its labels."""
        files = _FILES[str(self.name)]
        paths = {"train": self.root / files["train"], "test": self.root / files[self.novel]}
        held = self.root / files.get("held", "")
        return paths | ({"val": held} if held.is_file() else {})

    def read_table(self) -> ImageTable:
        """Ids such as ``train-000000``, in the order of the files."""
        paths = self._paths()
        found = {fold: read_plain_pickle(path, argument="root") for fold, path in paths.items()}
        labels = {fold: _labels(path, found[fold]) for fold, path in paths.items()}
        if self.name != "tieredImageNet":
            self._pixels = [_pixels(path, found[fold].get("data"), labels[fold]) for fold, path in paths.items()]
        if (both := np.intersect1d(labels["train"], labels["test"])).size:
            raise ValueError(
                f"{self.root}: found {both.size} classes in {paths['train'].name} and {paths['test'].name}, such as "
                f"{both[:3].tolist()}, needed none in both"
            )
        strange = np.setdiff1d(labels.get("val", labels["train"]), labels["train"])
        if strange.size:
            raise ValueError(
                f"{paths['val']}: found {strange.size} classes that {paths['train'].name} lacks, such as "
                f"{strange[:3].tolist()}, needed base classes"
            )
        classes, targets = np.unique(np.concatenate(list(labels.values())), return_inverse=True)
        fold = np.repeat(np.array(list(labels), dtype="<U5"), [len(part) for part in labels.values()])
        if "val" not in labels:
            base = targets[: len(labels["train"])]
            fold[split_rows(base, self.val_fraction, self.seed, argument="val_fraction")] = "val"
        ids = [f"{part}-{number:06d}" for part, some in labels.items() for number in range(len(some))]
        return by_fold(ImageTable(ids, targets.astype(np.int64), fold, [str(label) for label in classes]))

    def reader(self) -> FileReader:
        """Row -> image; reads tieredImageNet's images on first use."""
        table = self.table
        if self._pixels is None:
            counts = [len(_labels(path, read_plain_pickle(path))) for path in self._paths().values()]
            self._pixels = [
                _archive(path.with_name(path.name.replace("_labels.pkl", "_images.npz")), count)
                for path, count in zip(self._paths().values(), counts)
            ]
        return _ArraysReader(self.root, table.record_ids, self._pixels)


class _ArraysReader(FileReader):
    """Row -> image of several files in memory; rows count on from one to the next.

    Args:
        root: the data set's folder.
        ids: names of the rows.
        parts: ``[n, S, S, 3]`` uint8 each.
    """

    def __init__(self, root: Path, ids: Sequence[str], parts: Sequence[np.ndarray]) -> None:
        super().__init__(root, ids)
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __call__(self, row: int) -> Image.Image:
        """The image of a row."""
        place = int(np.searchsorted(self.ends, row, side="right"))
        return Image.fromarray(self.parts[place][row - self.ends[place]])


def _labels(path: Path, found: Any) -> np.ndarray:
    """``[N]`` int64."""
    if not isinstance(found, dict) or "labels" not in found:
        held = list(found)[:5] if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: found {held}, needed a dictionary with labels")
    try:
        labels = np.asarray(found["labels"])
    except ValueError:  # lists of several lengths
        labels = np.array(None)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: found labels {labels.dtype} {labels.shape}, needed whole numbers [N], N at least 1")
    return labels.astype(np.int64)


def _pixels(path: Path, pixels: Any, labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """``[N, S, S, 3]`` uint8."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[3:] != (3,):
        kind = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: found images {kind}, needed uint8 [N, S, S, 3]")
    if len(pixels) != len(labels):
        raise ValueError(f"{path}: found {len(pixels)} images and {len(labels)} labels, needed one label for each")
    return pixels


def _archive(path: Path, count: int) -> np.ndarray:
    """The array ``images`` of an archive."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file["images"]
    except Exception as error:  # a broken archive can fail in any way; whichever, the file is the fault
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"root: {str(path)!r} cannot be read ({reason}), needed the array images") from error
    return _pixels(path, found, range(count))
