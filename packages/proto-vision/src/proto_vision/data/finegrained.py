"""CUB-200-2011, Stanford Cars and Stanford Dogs, as they lie on disk after unpacking.

None is downloaded here: their makers ask for their own terms. Names of classes, splits and boxes are the data sets'.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import read_image
from proto_vision.data.module import ImageDataModule

__all__ = ["CUB200", "PartTable", "StanfordCars", "StanfordDogs"]


class PartTable(NamedTuple):
    """Annotated parts of the images, in pixels of the stored image.

    Attributes:
        locations: ``[N, M, 2]`` int64 ``(x, y)``.
        visible: ``[N, M]`` bool.
        names: of the M parts.
    """

    locations: np.ndarray
    visible: np.ndarray
    names: list[str]


class _FineGrained(ImageDataModule):
    """What the three share: cropping, and a share of the training images for validation."""

    def __init__(
        self, root: str | Path, crop: bool = True, val_fraction: float = 0.0, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(root, **settings)
        self.crop, self.val_fraction, self.seed = crop, val_fraction, seed

    def _folds(self, training: np.ndarray, targets: np.ndarray) -> np.ndarray:
        fold = np.where(training, "train", "test").astype("<U5")
        train = np.flatnonzero(training)
        chosen = split_rows(targets[train], self.val_fraction, self.seed, argument="val_fraction")
        fold[train[chosen]] = "val"
        return fold

    def _check(self, *names: str) -> None:
        missing = [name for name in names if not (self.root / name).exists()]
        if missing:
            raise ValueError(f"root: {str(self.root)!r} lacks {missing}, needed {type(self).__name__}'s own layout")


def _columns(path: Path, count: int) -> list[list[str]]:
    """The rows of a file of columns between spaces.

    Raises:
        ValueError: a row of another number of columns; names file and line.
    """
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise ValueError(f"{path}, line {number}: found {len(row)} columns, needed {count}")
    if not rows:
        raise ValueError(f"{path}: found no row")
    return rows


def _numbers(path: Path, count: int) -> np.ndarray:
    try:
        return np.array(_columns(path, count), dtype=np.float64)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: found text, needed {count} numbers a row ({error})") from error


class CUB200(_FineGrained):
    """Caltech-UCSD Birds 200-2011: 200 species, boxes, 15 annotated parts.

    Reads ``images.txt``, ``image_class_labels.txt``, ``classes.txt``, ``train_test_split.txt``, ``bounding_boxes.txt``
    and, for :meth:`parts`, ``parts/parts.txt`` and ``parts/part_locs.txt``; images lie in ``images``. Silhouettes, a
    download of their own, are looked for in ``segmentations`` inside of the folder or beside it.

    Args:
        root: folder ``CUB_200_2011``.
        crop: cut each image to its bird's box.
        val_fraction: share of each class's training images held out for validation; 0 is the paper's protocol.
        seed: of that share.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: a missing file, rows that do not fit; names file and line.
    """

    _boxes: np.ndarray | None = None

    def read_table(self) -> ImageTable:
        """Images, species, the official split and boxes."""
        self._check("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "images")
        images = _columns(self.root / "images.txt", 2)
        keys = [row[0] for row in images]
        classes = {row[0]: row[1] for row in _columns(self.root / "classes.txt", 2)}
        label, split = (
            {row[0]: row[1] for row in _columns(self.root / name, 2)}
            for name in ("image_class_labels.txt", "train_test_split.txt")
        )
        for name, table in (("image_class_labels.txt", label), ("train_test_split.txt", split)):
            missing = [key for key in keys if key not in table]
            if missing:
                raise ValueError(f"{self.root / name}: lacks {len(missing)} images of images.txt, such as {missing[0]}")
        order = {key: number for number, key in enumerate(sorted(classes, key=int))}
        unknown = sorted({label[key] for key in keys} - set(order))
        if unknown:
            raise ValueError(f"{self.root / 'classes.txt'}: lacks classes {unknown[:5]} of image_class_labels.txt")
        targets = np.array([order[label[key]] for key in keys], dtype=np.int64)
        fold = self._folds(np.array([split[key] == "1" for key in keys]), targets)
        names = [classes[key] for key in sorted(classes, key=int)]
        ids = [f"images/{row[1]}" for row in images]
        return ImageTable(ids, targets, fold, names, self.boxes(keys) if self.crop else None)

    def boxes(self, keys: list[str] | None = None) -> np.ndarray:
        """``[N, 4]`` corners ``(x1, y1, x2, y2)`` of the birds, truncated to whole pixels."""
        self._check("bounding_boxes.txt")
        if keys is None:
            keys = [row[0] for row in _columns(self.root / "images.txt", 2)]
        rows = {str(int(row[0])): row[1:] for row in _numbers(self.root / "bounding_boxes.txt", 5)}
        missing = [key for key in keys if key not in rows]
        if missing:
            raise ValueError(f"{self.root / 'bounding_boxes.txt'}: lacks image {missing[0]}")
        found = np.stack([rows[key] for key in keys])
        corners = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], 1)
        return np.trunc(corners).astype(np.int64)

    def parts(self) -> PartTable:
        """Locations of the 15 parts in the images of the table.

        Raises:
            ValueError: a missing file, or an image with another number of parts.
        """
        self._check("parts/parts.txt", "parts/part_locs.txt")
        lines = (self.root / "parts" / "parts.txt").read_text(encoding="utf-8").splitlines()
        names = [line.partition(" ")[2].strip() for line in lines if line.strip()]
        keys = [row[0] for row in _columns(self.root / "images.txt", 2)]
        place = {int(key): number for number, key in enumerate(keys)}
        found = _numbers(self.root / "parts" / "part_locs.txt", 5)
        rows = np.array([place.get(int(image), -1) for image in found[:, 0]])
        part = found[:, 1].astype(int) - 1
        if len(found) != len(keys) * len(names) or (rows < 0).any() or part.min() < 0 or part.max() >= len(names):
            expected = f"{len(keys)} images with {len(names)} parts each"
            raise ValueError(f"{self.root / 'parts' / 'part_locs.txt'}: found {len(found)} rows, needed {expected}")
        locations = np.zeros((len(keys), len(names), 2), dtype=np.int64)
        visible = np.zeros((len(keys), len(names)), dtype=bool)
        locations[rows, part] = np.trunc(found[:, 2:4])
        visible[rows, part] = found[:, 4] != 0
        return PartTable(locations, visible, names)

    def mask_kind(self) -> Literal["silhouette", "box"] | None:
        """What :meth:`mask` can show: silhouettes where they lie on disk, boxes of whole images, or nothing."""
        if self._silhouettes() is not None:
            return "silhouette"
        return "box" if not self.crop and (self.root / "bounding_boxes.txt").is_file() else None

    def mask(self, row: int) -> Image.Image:
        """Where the bird is, white on black, cut as the reader cuts the image.

        Raises:
            ValueError: neither silhouettes nor boxes of whole images; a file that cannot be read.
        """
        folder, name = self._silhouettes(), self.record_ids[row]
        if folder is not None:
            path = (folder / name.removeprefix("images/")).with_suffix(".png")
            return read_image(path, None if self.table.boxes is None else self.table.boxes[row].tolist()).convert("L")
        if self.mask_kind() is None:
            raise ValueError(f"root: {str(self.root)!r} lacks 'segmentations', needed for masks of cropped images")
        if self._boxes is None:
            self._boxes = self.boxes()
        mask = Image.new("L", read_image(self.root / name).size)
        mask.paste(255, tuple(self._boxes[row].tolist()))
        return mask

    def _silhouettes(self) -> Path | None:
        places = (self.root / "segmentations", self.root.parent / "segmentations")
        return next((place for place in places if place.is_dir()), None)


def _matrix(path: Path, key: str) -> Any:
    """One variable of a MATLAB file.

    Raises:
        ValueError: a file that cannot be read, or lacks it.
    """
    try:
        content = loadmat(str(path), squeeze_me=True)
    except (OSError, ValueError, NotImplementedError, TypeError, MatReadError) as error:
        raise ValueError(f"{path}: cannot be read as a MATLAB file ({error})") from error
    if key not in content:
        raise ValueError(f"{path}: found no variable {key!r}, but {[k for k in content if not k.startswith('_')]}")
    return content[key]


class StanfordCars(_FineGrained):
    """Stanford Cars: 196 makes and models, boxes.

    Reads ``devkit/cars_meta.mat``, ``devkit/cars_train_annos.mat`` and ``cars_test_annos_withlabels.mat``; images lie
    in ``cars_train`` and ``cars_test``.

    Args:
        root: folder ``stanford_cars``.
        crop: cut each image to its car's box.
        val_fraction: share of each class's training images held out for validation.
        seed: of that share.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: a missing or corrupt file.
    """

    def read_table(self) -> ImageTable:
        """Images, models, the official split and boxes."""
        train, test = "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"
        self._check("devkit/cars_meta.mat", train, test, "cars_train", "cars_test")
        names = [str(name) for name in np.atleast_1d(_matrix(self.root / "devkit" / "cars_meta.mat", "class_names"))]
        ids: list[str] = []
        targets: list[int] = []
        boxes: list[tuple[int, int, int, int]] = []
        training: list[bool] = []
        for file, folder in ((train, "cars_train"), (test, "cars_test")):
            for row in np.atleast_1d(_matrix(self.root / file, "annotations")):
                ids.append(f"{folder}/{row['fname']}")
                targets.append(int(row["class"]) - 1)
                x1, y1, x2, y2 = (int(row[key]) for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"))
                boxes.append((x1 - 1, y1 - 1, x2, y2))
                training.append(folder == "cars_train")
        classes = np.array(targets, dtype=np.int64)
        fold = self._folds(np.array(training), classes)
        return ImageTable(ids, classes, fold, names, np.array(boxes) if self.crop else None)


class StanfordDogs(_FineGrained):
    """Stanford Dogs: 120 breeds, boxes.

    Reads ``train_list.mat`` and ``test_list.mat``; images lie in ``Images``, boxes in ``Annotation``.

    Args:
        root: the folder.
        crop: cut each image to its (first) dog's box.
        val_fraction: share of each class's training images held out for validation.
        seed: of that share.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: a missing or corrupt file.
    """

    def __init__(
        self, root: str | Path, crop: bool = False, val_fraction: float = 0.0, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(root, crop, val_fraction, seed, **settings)

    def read_table(self) -> ImageTable:
        """Images, breeds, the official split and boxes."""
        self._check("train_list.mat", "test_list.mat", "Images", *(["Annotation"] if self.crop else []))
        files: list[str] = []
        labels: list[int] = []
        training: list[bool] = []
        for name in ("train", "test"):
            path = self.root / f"{name}_list.mat"
            listed = [str(file) for file in np.atleast_1d(_matrix(path, "file_list"))]
            files += listed
            labels += [int(label) - 1 for label in np.atleast_1d(_matrix(path, "labels"))]
            training += [name == "train"] * len(listed)
        targets = np.array(labels, dtype=np.int64)
        names = [""] * (int(targets.max()) + 1)
        for file, target in zip(files, labels):
            names[target] = file.partition("/")[0].partition("-")[2] or file.partition("/")[0]
        boxes = np.array([self._box(file) for file in files]) if self.crop else None
        ids = [f"Images/{file}" for file in files]
        return ImageTable(ids, targets, self._folds(np.array(training), targets), names, boxes)

    def _box(self, file: str) -> tuple[int, ...]:
        path = self.root / "Annotation" / Path(file).with_suffix("")
        try:
            box = ElementTree.parse(path).find("object/bndbox")
            assert box is not None
            return tuple(int(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        except (OSError, ElementTree.ParseError, AssertionError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as a box of a dog ({error or 'no bndbox'})") from error
