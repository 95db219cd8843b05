"""MNIST, Fashion-MNIST and KMNIST as their makers ship them: IDX files, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8

from proto_vision.data.dataset import ImageTable
from proto_vision.data.images import ArrayReader
from proto_vision.data.module import ImageDataModule

__all__ = ["MNIST", "read_idx"]

Name = Literal["MNIST", "FashionMNIST", "KMNIST"]
CLASSES: dict[str, list[str]] = {
    "MNIST": [str(digit) for digit in range(10)],
    "FashionMNIST": [
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ],
    "KMNIST": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}
_MAGIC = {1: 2049, 3: 2051}
_PARTS = {1: "labels", 3: "images"}


def read_idx(path: str | Path, axes: Literal[1, 3]) -> UInt8[np.ndarray, "..."]:
    """An IDX file of bytes: a big-endian header (2049 and n, or 2051, n, rows and columns), then the bytes.

    Args:
        path: plain, or compressed where it ends in ``.gz``.
        axes: 1 for labels, 3 for images.

    Returns:
        ``[n]`` or ``[n, rows, columns]``, uint8.

    Raises:
        ValueError: a file that cannot be read, another magic number, or another length than the header says.

    Example:
        >>> import pathlib, struct, tempfile
        >>> from proto_vision.data.idx import read_idx
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(struct.pack(">2i", 2049, 3) + bytes([7, 2, 1]))
        >>> read_idx(path, 1).tolist()
        [7, 2, 1]
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r}: cannot be read ({error})") from error
    head = 4 * (axes + 1)
    if len(content) < head:
        raise ValueError(f"{str(path)!r}: found {len(content)} bytes, needed a header of {head}")
    magic, *shape = np.frombuffer(content, ">u4", axes + 1).tolist()
    if magic != _MAGIC[axes]:
        raise ValueError(f"{str(path)!r}: found magic number {magic}, needed {_MAGIC[axes]} ({_PARTS[axes]})")
    size = int(np.prod(shape, dtype=object))
    if len(content) - head != size:
        sizes = " x ".join(map(str, shape))
        raise ValueError(
            f"{str(path)!r}: found {len(content) - head} bytes after the header, needed {size} for {sizes} of it"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


class MNIST(ImageDataModule):
    """Grey images of ten classes: MNIST, Fashion-MNIST, KMNIST, or one's own files in the same format.

    ``root`` holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k``, plain or with
    ``.gz``; or the folder ``NAME/raw`` with them, as torchvision lays them down. The last ``val_count`` training images
    are the validation fold, so that 55,000 of the 60,000 train.

    Args:
        root: the folder.
        name: which data set: class names, and the folder in torchvision's layout.
        val_count: images held out for validation.
        download: fetch the files where they are missing (torchvision).
        image_size: height and width of the model's input; the images have 28.
        in_channels: 1 (grey) or 3 (three equal channels).
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: an unknown name; missing, cut or wrong files; images and labels of different number, images of
            different size, a label above 9; fewer training images than are held out.
    """

    def __init__(
        self,
        root: str | Path,
        name: Name = "MNIST",
        val_count: int = 5000,
        download: bool = False,
        image_size: int = 28,
        in_channels: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(root, image_size=image_size, in_channels=in_channels, **settings)
        if name not in get_args(Name):
            raise ValueError(f"name: found {name!r}, needed one of {get_args(Name)}")
        if val_count < 0:
            raise ValueError(f"val_count: found {val_count}, needed 0 or more")
        self.name: str = name
        self.val_count, self.download = val_count, download
        self._pixels: np.ndarray | None = None

    def prepare_data(self) -> None:
        """Fetch the files, if that was asked for."""
        if self.download:
            from torchvision import datasets

            try:
                getattr(datasets, self.name)(str(self.root), download=True)
            except (RuntimeError, OSError) as error:
                raise ValueError(f"download: {self.name} could not be fetched into {self.root} ({error})") from error
        super().prepare_data()

    def _find(self, part: str, axes: int) -> Path:
        """The file of a part, in the root or in torchvision's folder."""
        stem = f"{part}-{_PARTS[axes]}"
        names = [f"{stem}{mark}idx{axes}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
        for folder in (self.root, self.root / self.name / "raw"):
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        raise ValueError(
            f"root: found no {names[0]!r} (or with .gz) in {str(self.root)!r} or its {self.name}/raw; "
            f"--data.download true gets it"
        )

    def _part(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        paths = self._find(part, 3), self._find(part, 1)
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{str(paths[1])!r}: found {len(labels)} labels, needed one for each of {len(images)} images"
            )
        if not images.size:
            raise ValueError(f"{str(paths[0])!r}: found {images.shape} pixels, needed at least one image")
        count = len(CLASSES[self.name])
        if labels.max() >= count:
            row = int((labels >= count).argmax())
            raise ValueError(f"{str(paths[1])!r}: found label {labels[row]} in row {row}, needed 0 to {count - 1}")
        return images, labels

    def read_table(self) -> ImageTable:
        """Ids such as ``train-00000``."""
        (train, known), (test, asked) = self._part("train"), self._part("t10k")
        if train.shape[1:] != test.shape[1:]:
            sizes = f"{train.shape[1:]} and {test.shape[1:]}"
            raise ValueError(f"{self.root}: found images of {sizes} pixels, needed one size for training and testing")
        if self.val_count >= len(train):
            raise ValueError(f"val_count: found {self.val_count}, needed fewer than the {len(train)} training images")
        self._pixels = np.concatenate([train, test])
        fold = np.full(len(self._pixels), "train", dtype="<U5")
        fold[len(train) - self.val_count :] = "val"
        fold[len(train) :] = "test"
        ids = [f"train-{n:05d}" for n in range(len(train))] + [f"test-{n:05d}" for n in range(len(test))]
        return ImageTable(ids, np.concatenate([known, asked]).astype(np.int64), fold, list(CLASSES[self.name]))

    def reader(self) -> ArrayReader:
        """Row -> image."""
        _ = self.table
        assert self._pixels is not None
        return ArrayReader(self._pixels)
