"""Image data sets for training: rows of a source, and the Lightning data module that all sources share.

A source (a folder, CUB, CIFAR, the digits) only says which images it has, with which classes and folds, and how a row
is read. Images are decoded in the loader's worker processes; those in memory that are not augmented are prepared once.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from proto_core.files import atomic_write
from proto_vision.data.augmentation import AUGMENTATIONS, Augmentation, augmentation
from proto_vision.data.batches import Sampling, WholeBatches
from proto_vision.data.dataset import FOLDS, ImageBatch, ImageDataset, ImageTable, Readable
from proto_vision.data.images import ArrayReader, FileReader, read_image
from proto_vision.data.protocols import Protocol
from proto_vision.data.sampling import WeightedDraws

__all__ = ["ImageDataModule"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageDataModule(LightningDataModule, ABC):
    """What every source of images offers for training, testing and explaining. Subclasses read the table.

    Args:
        root: the data set's folder; nothing is written into it.
        image_size: height and width S of the model's input, in pixels.
        in_channels: 3 (RGB) or 1 (grey).
        resize: ``"stretch"`` both sides to S (fine-grained data sets), or ``"crop"``: the shorter side to 256/224 S,
            then the middle (ImageNet).
        augment: of training images, by name: see :func:`proto_vision.data.augmentation.augmentation`.
        views: further views of each training image, by the names of their augmentations; training batches then hold
            ``[N, 1 + views, channels, S, S]``.
        protocol: what an experiment changes about classes, labels and folds, see :mod:`proto_vision.data.protocols`.
        sampling: which images come together in a batch, see :mod:`proto_vision.data.batches`; by default chance.
        mean: per channel; by default ImageNet's for RGB, 0.5 for grey.
        std: per channel; by default ImageNet's for RGB, 0.5 for grey.
        batch_size: images in a batch.
        drop_last: leave out the last training batch where it is smaller than the others.
        num_workers: processes of each data loader.
        predict_fold: which images ``predict`` goes through, ``"test"`` or ``"all"``.
        skip_corrupt: read every image once before work starts and leave out those that cannot be read; their names
            and what is wrong with each are written to ``skipped_file``. Otherwise such an image is an error.
        skipped_file: CSV in the trainer's root folder (or a path) that lists them.

    Attributes:
        class_names: list of the C classes.
        num_classes: C.

    Raises:
        ValueError: an argument out of range, a root that is not a folder, a class without a training image.
    """

    unseen_classes: ClassVar[bool] = False
    """Whether the source's own folds hold classes without training images; these come last in its table."""

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int = 224,
        in_channels: int = 3,
        resize: Literal["stretch", "crop"] = "stretch",
        augment: Augmentation = "none",
        views: Sequence[Augmentation] = (),
        protocol: Protocol | None = None,
        sampling: Sampling | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 64,
        drop_last: bool = False,
        num_workers: int = 0,
        predict_fold: Literal["test", "all"] = "test",
        skip_corrupt: bool = False,
        skipped_file: str = "skipped_images.csv",
    ) -> None:
        super().__init__()
        for argument, value, least in (("image_size", image_size, 1), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{argument}: found {value}, needed {least} or more")
        if num_workers < 0:
            raise ValueError(f"num_workers: found {num_workers}, needed 0 or more")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels: found {in_channels}, needed 3 (RGB) or 1 (grey)")
        for argument, name in (("augment", augment), *(("views", view) for view in views)):
            if name not in AUGMENTATIONS:
                raise ValueError(f"{argument}: found {name!r}, needed one of {AUGMENTATIONS}")
        self.root = Path(root).expanduser()
        self.image_size, self.in_channels = image_size, in_channels
        self.resize, self.augment, self.views, self.protocol = resize, augment, tuple(views), protocol
        self.sampling = sampling
        default = IMAGENET if in_channels == 3 else ((0.5,), (0.5,))
        self.mean, self.std = tuple(mean or default[0]), tuple(std or default[1])
        for argument, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != in_channels:
                raise ValueError(f"{argument}: found {len(numbers)} values for {in_channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std: found {self.std}, needed values above 0")
        self.batch_size, self.num_workers, self.predict_fold = batch_size, num_workers, predict_fold
        self.drop_last = drop_last
        self.skip_corrupt, self.skipped_file = skip_corrupt, skipped_file
        self._table: ImageTable | None = None
        self._prepared: Tensor | None = None

    def __str__(self) -> str:
        """Source and place; reads no file."""
        return f"{type(self).__name__}({str(self.root)!r})"

    # -- what there is

    @abstractmethod
    def read_table(self) -> ImageTable:
        """The source's images, classes and folds; reads no image."""

    def reader(self) -> FileReader | ArrayReader:
        """Row -> RGB image."""
        return FileReader(self.root, self.table.record_ids, self.table.boxes)

    @property
    def table(self) -> ImageTable:
        """The source's images, classes and folds, read on first use."""
        if self._table is None:
            table = self.read_table()
            empty = [table.class_names[c] for c in np.flatnonzero(~_trained(table))]
            if empty and not self.unseen_classes:
                raise ValueError(f"{self.root}: no training image of {len(empty)} classes, such as {empty[:5]}")
            self._table = table if self.protocol is None else self.protocol(table)
        return self._table

    @property
    def record_ids(self) -> list[str]:
        """Row -> id."""
        return self.table.record_ids

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that have training images, in the order of the targets."""
        return self.table.class_names[: int(_trained(self.table).sum())]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def targets(self) -> Int[Tensor, " N"]:
        """``[N]`` classes of all images."""
        return torch.from_numpy(np.ascontiguousarray(self.table.targets, dtype=np.int64))

    def rows(self, fold: str) -> Int[np.ndarray, " n"]:
        """The rows of one fold, ``"train"``, ``"val"`` or ``"test"``, in the order of the table.

        Raises:
            ValueError: the fold holds no image.
        """
        rows = np.flatnonzero(self.table.fold == fold)
        if not rows.size:
            counts = {name: int((self.table.fold == name).sum()) for name in FOLDS}
            raise ValueError(f"{self.root}: the {fold} fold holds no image, needed at least one; found {counts}")
        return rows

    def describe(self, index: int) -> tuple[str, list[str]]:
        """Id and class name of a row: what a prototype remembers of its case."""
        return self.record_ids[index], [self.table.class_names[int(self.table.targets[index])]]

    # -- images as the model sees them

    def _geometry(self) -> list[Any]:
        size = self.image_size
        smooth = {"interpolation": InterpolationMode.BILINEAR, "antialias": True}
        if self.resize == "crop":
            return [v2.Resize(round(size * 256 / 224), **smooth), v2.CenterCrop(size)]
        return [v2.Resize((size, size), **smooth)]

    def _numbers(self) -> list[Any]:
        grey = [v2.Grayscale(1)] if self.in_channels == 1 else []
        return [*grey, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]

    def geometry(self) -> Callable[[Image.Image], Image.Image]:
        """Image of any mode -> the same in the size of the model's input, cut as in testing."""
        return v2.Compose(self._geometry())

    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """RGB image -> ``[channels, S, S]`` as in testing."""
        return v2.Compose([*self._geometry(), *self._numbers()])

    def train_transform(self) -> Callable[[Image.Image], Tensor]:
        """RGB image -> ``[channels, S, S]`` with the augmentation of training."""
        return self._augmented(self.augment)

    def _augmented(self, name: str) -> Callable[[Image.Image], Tensor]:
        return v2.Compose([*augmentation(name, self._geometry(), self.image_size), *self._numbers()])

    def view(self, record: str | Path) -> Image.Image:
        """An image in the geometry of the model's input, 8-bit RGB, for drawing.

        Args:
            record: an id of this data set (``str``), or a file (``Path``).

        Raises:
            ValueError: an id that it does not have, or a file that cannot be read.
        """
        return self.geometry()(self._raw(record))

    def model_input(self, record: str | Path) -> Float[Tensor, "channels S S"]:
        """An image as the model sees it in testing; arguments as in :meth:`view`."""
        return self.eval_transform()(self._raw(record))

    def _raw(self, record: str | Path) -> Image.Image:
        if isinstance(record, Path):
            return read_image(record)
        row = self.find_row(record)
        if row is None:
            raise ValueError(f"image: found no {record!r} in {self.root}")
        return self.reader()(row)

    def find_row(self, record: str) -> int | None:
        """The row of an id, or ``None``."""
        if not hasattr(self, "_row_of"):
            self._row_of = {name: row for row, name in enumerate(self.record_ids)}
        return self._row_of.get(record)

    def find_image(self, name: str) -> str | Path:
        """What a person named: an id of this data set, or else a file anywhere on disk.

        Raises:
            ValueError: there is neither.
        """
        if self.find_row(name) is not None:
            return name
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise ValueError(f"image: found neither a file {name!r} nor an image of that name in {self.root}")

    # -- Lightning

    def prepare_data(self) -> None:
        """With ``skip_corrupt``, read every image once and list those that cannot be read; one process per node."""
        if self.skip_corrupt:
            self._list_corrupt()

    def setup(self, stage: str | None = None) -> None:
        """Check that the folds of this stage hold images; leave out those listed as unreadable.

        Raises:
            ValueError: an empty fold, or anything wrong with the folder.
        """
        if self.skip_corrupt:
            self._leave_out()
        if stage in (None, "fit") and len(self.rows("train")) < self.batch_size and self.drop_last:
            count = len(self.rows("train"))
            raise ValueError(f"batch_size: found {self.batch_size} for {count} training images, none left by drop_last")
        for fold in {"validate": ("val",), "test": ("test",)}.get(stage or "", ()):
            self.rows(fold)

    def prepare_in(self, folder: str | Path) -> None:
        """What a trainer does before it starts, for work without one; ``skipped_file`` is written to ``folder``."""
        self.list_skipped_in(folder)
        self.prepare_data()
        self.setup("predict")

    def list_skipped_in(self, folder: str | Path) -> None:
        """Write ``skipped_file`` to this folder."""
        self.skipped_file = str(Path(folder).absolute() / Path(self.skipped_file).name)

    def _skipped_path(self) -> Path:
        trainer = getattr(self, "trainer", None)
        return Path(trainer.default_root_dir if trainer is not None else ".") / self.skipped_file

    def _list_corrupt(self) -> None:
        checker = Readable(self.reader(), len(self.record_ids))
        loader = DataLoader(checker, batch_size=64, num_workers=self.num_workers, collate_fn=list)
        found = [(n, why) for part in track(loader, "reading all images", transient=True) for n, why in part if why]
        with atomic_write(self._skipped_path()) as file:
            writer = csv.writer(file)
            writer.writerow(["image", "problem"])
            writer.writerows((self.record_ids[row], why) for row, why in found)
        if found:
            rank_zero_warn(f"{self.root}: {len(found)} images cannot be read, listed in {self._skipped_path()}")

    def _leave_out(self) -> None:
        path = self._skipped_path()
        if not path.is_file():
            self._list_corrupt()
        with path.open(encoding="utf-8", newline="") as file:
            bad = {row["image"] for row in csv.DictReader(file)}
        keep = np.array([name not in bad for name in self.record_ids])
        fold = np.where(keep, self.table.fold, "")
        self._table = self.table._replace(fold=fold)

    def _dataset(self, rows: np.ndarray, *, augmented: bool = False) -> ImageDataset:
        reader, transform = self.reader(), self.train_transform() if augmented else self.eval_transform()
        prepared, views = None, [self._augmented(name) for name in self.views] if augmented else []
        if isinstance(reader, ArrayReader) and not views and not (augmented and self.augment != "none"):
            if self._prepared is None:
                self._prepared = torch.stack([transform(reader(row)) for row in range(len(self.record_ids))])
            prepared = self._prepared
        trusted = None if self.table.trusted is None else torch.from_numpy(np.asarray(self.table.trusted, dtype=bool))
        return ImageDataset(reader, transform, self.targets, rows, prepared, trusted=trusted, views=views)

    @property
    def train_set(self) -> ImageDataset:
        """Training images, augmented."""
        return self._dataset(self.rows("train"), augmented=True)

    @property
    def val_set(self) -> ImageDataset:
        """Validation images."""
        return self._dataset(self.rows("val"))

    @property
    def test_set(self) -> ImageDataset:
        """Test images."""
        return self._dataset(self.rows("test"))

    @property
    def predict_set(self) -> ImageDataset:
        """Images that ``predict`` goes through: the test fold, or all that are in a fold."""
        return self.test_set if self.predict_fold == "test" else self._dataset(np.flatnonzero(self.table.fold != ""))

    def projection_dataset(self) -> ImageDataset:
        """The training images, un-augmented, in the order of the table: what prototypes are projected onto."""
        return self.plain_set(self.rows("train"))

    def plain_set(self, rows: Int[np.ndarray, " n"]) -> ImageDataset:
        """Any rows of the table, un-augmented, in the order given."""
        return self._dataset(rows)

    def _loader(
        self, dataset: ImageDataset, *, shuffle: bool = False, sampler: WeightedDraws | None = None
    ) -> DataLoader[ImageBatch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle and sampler is None,
            sampler=sampler,
            drop_last=shuffle and self.drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=ImageDataset.collate,
        )

    def _sampled(self, fold: str, dataset: ImageDataset) -> DataLoader[ImageBatch]:
        """Batches as the sampling has them, otherwise by chance in training and in order in testing."""
        rows = torch.from_numpy(dataset.rows)
        chances = None if self.sampling is None else self.sampling.chances(fold, dataset.trusted[rows])
        if chances is not None:
            return self._loader(dataset, shuffle=fold == "train", sampler=WeightedDraws(chances))
        batches = None if self.sampling is None else self.sampling(fold, self.targets[rows])
        if self.sampling is None or batches is None:
            return self._loader(dataset, shuffle=fold == "train")
        return DataLoader(
            WholeBatches(dataset, self.sampling.arrange),
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Training images in random order, or as the sampling has them."""
        return self._sampled("train", self.train_set)

    def val_dataloader(self) -> Any:
        """Validation images in the order of the table; none where there is no validation fold."""
        return self._sampled("val", self.val_set) if (self.table.fold == "val").any() else []

    def test_dataloader(self) -> Any:
        """Test images in the order of the table."""
        return self._sampled("test", self.test_set)

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """Images of ``predict_fold`` in the order of the table."""
        return self._loader(self.predict_set)


def _trained(table: ImageTable) -> np.ndarray:
    """``[C]`` which classes have training images."""
    return np.bincount(table.targets[table.fold == "train"], minlength=len(table.class_names)) > 0
