"""Category discovery: some classes have labels for a share of their images, all other images are unlabelled.

Source of the setting: ProtoGCD (arXiv 2504.03755) and the work that it compares itself with. :class:`CategoryDiscovery`
keeps labels of any labelled data set back, to measure; :class:`PartlyLabelled` reads images that have no labels.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from proto_vision.data.batches import Sampling
from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import find_images
from proto_vision.data.module import ImageDataModule
from proto_vision.data.protocols import Protocol

__all__ = ["CategoryDiscovery", "HalfLabelled", "PartlyLabelled"]

UNLABELLED = "unlabelled"
"""Name of the folder of unlabelled images, and of their class in tables."""


class HalfLabelled(Sampling):
    """Draw training images so that half of a batch, in expectation, is labelled.

    With replacement; a labelled image has weight 1, an unlabelled one the number of labelled images divided by that of
    the unlabelled ones. Where all images are of one kind, their chances are equal.

    Example:
        >>> import torch
        >>> from proto_vision.data.discovery import HalfLabelled
        >>> HalfLabelled().chances("train", torch.tensor([True, False, False, False, False]))
        tensor([1.0000, 0.2500, 0.2500, 0.2500, 0.2500])
    """

    def chances(self, fold: str, trusted: Bool[Tensor, "N"]) -> Float[Tensor, "N"] | None:
        """Weights of training images; the other folds are gone through as they are."""
        if fold != "train":
            return None
        known = trusted.sum()
        share = known / (len(trusted) - known)
        return torch.where(trusted | ~share.isfinite() | (known == 0), 1.0, share)

    def __call__(self, fold: str, targets: Int[Tensor, "N"]) -> None:
        """No batches of its own."""


class CategoryDiscovery(Protocol):
    """Generalized category discovery: old classes first, a share of their training images labelled, nothing else.

    ``trusted`` is True for the labelled rows alone; folds stay as they are. :class:`HalfLabelled` draws batches for it.

    Args:
        old: how many classes are known, the first ones in the order of names.
        classes: their names, instead of ``old``.
        labelled: share of each old class's training images whose labels are given, rounded down, one at least.
        seed: of the draw of these.

    Raises:
        ValueError: neither or both of ``old`` and ``classes``, a share outside (0, 1]; when called: unknown names, no
            class that is old or none that is new.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.discovery import CategoryDiscovery
        >>> table = Digits(image_size=8, protocol=CategoryDiscovery(classes=["7", "3"])).table
        >>> table.class_names[:3], sorted(set(table.targets[table.trusted].tolist()))
        (['3', '7', '0'], [0, 1])
    """

    def __init__(
        self, old: int | None = None, classes: list[str] | None = None, labelled: float = 0.5, seed: int = 0
    ) -> None:
        if (old is None) == (classes is None):
            raise ValueError("old, classes: needed one of them")
        if not 0 < labelled <= 1:
            raise ValueError(f"labelled: found {labelled}, needed a share in (0, 1]")
        self.old, self.classes, self.labelled, self.seed = old, classes, labelled, seed

    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table."""
        names = table.class_names
        if self.classes is None:
            assert self.old is not None
            if not 0 < self.old < len(names):
                raise ValueError(f"old: found {self.old}, needed 1 to {len(names) - 1} of {len(names)} classes")
            known = set(names[: self.old])
        else:
            known = set(self.classes)
            unknown = sorted(known - set(names))
            if unknown or len(known) in (0, len(names)):
                raise ValueError(f"classes: found {sorted(known)}, needed some, not all, of {names}")
        order = [name for name in names if name in known] + [name for name in names if name not in known]
        place = {name: number for number, name in enumerate(order)}
        targets = np.array([place[name] for name in names], dtype=np.int64)[table.targets]
        rows = np.flatnonzero((table.fold == "train") & (targets < len(known)))
        trusted = np.zeros(len(targets), dtype=bool)
        trusted[self._labelled(targets, rows)] = True
        return table._replace(targets=targets, class_names=order, trusted=trusted)

    def _labelled(self, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self.labelled == 1:
            return rows
        first = rows[np.unique(targets[rows], return_index=True)[1]]
        drawn = rows[split_rows(targets[rows], self.labelled, self.seed, argument="labelled")]
        lacking = ~np.isin(targets[first], targets[drawn])
        return np.r_[drawn, first[lacking]]


class PartlyLabelled(ImageDataModule):
    """Images of which few have labels: what a person has who wants to know which classes there are.

    - ``root/CLASS/...`` for labelled images; unlabelled ones lie in ``root`` itself, in ``root/unlabelled``, or in any
      other folder that ``unlabelled`` names.
    - any folder with a CSV table: columns ``image`` (path from the root) and ``label``, empty where there is none.

    All images are training images. Training draws half labelled, half unlabelled images (:class:`HalfLabelled`).

    Args:
        root: the folder; nothing is written into it.
        unlabelled: folder of unlabelled images, with all folders in it; by default ``root/unlabelled``.
        labels: the CSV table, instead of folders.
        num_classes: classes to look for, those with labels included; by default twice as many as have labels.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: no labelled or no unlabelled image, fewer classes than have labels, a table that names missing
            files or columns.
    """

    def __init__(
        self,
        root: str | Path,
        unlabelled: str | Path | None = None,
        labels: str | Path | None = None,
        num_classes: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self.sampling = HalfLabelled() if self.sampling is None else self.sampling
        self.predict_fold = "all"
        self.unlabelled, self.labels, self.wanted = unlabelled, labels, num_classes

    @property
    def known_names(self) -> list[str]:
        """Classes that have labels."""
        return self.table.class_names[:-1]

    @property
    def class_names(self) -> list[str]:
        """Known classes, and as many new ones as are to be looked for."""
        known = self.known_names
        wanted = 2 * len(known) if self.wanted is None else self.wanted
        if wanted < max(len(known), 2):
            raise ValueError(f"num_classes: found {wanted}, needed at least {max(len(known), 2)}: those with labels")
        return known + new_names(known, wanted - len(known))

    @property
    def num_classes(self) -> int:
        """Classes to look for."""
        return len(self.class_names)

    def read_table(self) -> ImageTable:
        """Labelled images, then unlabelled ones, whose class comes last."""
        if not self.root.is_dir():
            raise ValueError(f"root: {str(self.root)!r} is no folder, needed one that holds images")
        names, labels = self._listed() if self.labels else self._found()
        classes = sorted({label for label in labels if label})
        counts = {"labelled": sum(map(bool, labels)), "unlabelled": sum(not label for label in labels)}
        if not all(counts.values()):
            raise ValueError(f"{self.root}: found {counts} images, needed at least one of each")
        place = {name: number for number, name in enumerate(classes)}
        targets = np.array([place.get(label, len(classes)) for label in labels], dtype=np.int64)
        fold = np.full(len(names), "train", dtype="<U5")
        return ImageTable(names, targets, fold, [*classes, UNLABELLED], trusted=targets < len(classes))

    def _found(self) -> tuple[list[str], list[str]]:
        apart = None if self.unlabelled is None else Path(self.unlabelled).expanduser().resolve()
        if apart is not None and not apart.is_dir():
            raise ValueError(f"unlabelled: {str(self.unlabelled)!r} is no folder, needed one of images without labels")
        apart = (self.root / UNLABELLED).resolve() if apart is None else apart
        parts = [path for path in sorted(self.root.iterdir()) if path.is_dir() and path.name[0] != "."]
        found = [
            (image, path.name)
            for path, place in ((path, path.resolve()) for path in parts)
            for image in find_images(path)
            if not (place / image.relative_to(path)).is_relative_to(apart)
        ]
        found += [(image, "") for image in (find_images(apart) if apart.is_dir() else [])]
        found += [(image, "") for image in find_images(self.root) if image.parent == self.root]
        return [self._name(image) for image, _ in found], [label for _, label in found]

    def _name(self, image: Path) -> str:
        """Path from the root, or whole where an image lies elsewhere."""
        return (image.relative_to(self.root) if image.is_relative_to(self.root) else image.resolve()).as_posix()

    def _listed(self) -> tuple[list[str], list[str]]:
        path = Path(str(self.labels)).expanduser()
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"labels: {str(path)!r} cannot be read ({error})") from error
        if not table or not {"image", "label"} <= set(table[0]):
            found = list(table[0]) if table else []
            raise ValueError(f"labels: {str(path)!r} has columns {found}, needed image and label")
        names, labels = ([(row[column] or "").strip() for row in table] for column in ("image", "label"))
        missing = [name for name in names if not name or not (self.root / name).is_file()]
        if missing:
            raise ValueError(f"labels: {len(missing)} images of {path} are not in {self.root}, such as {missing[:3]}")
        if len(set(names)) < len(names):
            raise ValueError(f"labels: {path} names {len(names) - len(set(names))} images twice")
        return names, labels


def new_names(known: Sequence[str], count: int) -> list[str]:
    """Names for classes that have none: ``new 1`` and so on, none of them a known one.

    Example:
        >>> from proto_vision.data.discovery import new_names
        >>> new_names(["cat", "new 1"], 2)
        ['new 2', 'new 3']
    """
    free = (f"new {number}" for number in range(1, len(known) + count + 1))
    return [name for name in free if name not in set(known)][:count]
