"""Noisy images from the web beside a small set of trusted ones: two folders, one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from proto_core.checks import check_positive
from proto_vision.data.dataset import ImageTable
from proto_vision.data.folder import ImageFolder
from proto_vision.data.module import ImageDataModule
from proto_vision.data.noise import draw_shots

__all__ = ["WebFolder"]


class WebFolder(ImageDataModule):
    """Images whose labels may be wrong, all for training, and images whose labels are right (``trusted``).

    Each of the two is a folder in one of the layouts of :class:`~proto_vision.data.folder.ImageFolder`. All images of
    the first train, whatever fold they lie in, except what it holds under ``test`` or ``val``, which is left out. Of
    the second, up to ``shots`` training images of each class train as trusted ones; its ``val`` and ``test`` images
    (or shares of each class, where it has no such folders) are what is measured. Further training images of it are left
    out.

    Args:
        root: folder of the images from the web; nothing is written into it.
        trusted: folder of the images with right labels, whose classes are all among those of ``root``.
        shots: trusted training images of each class; ``None``: all.
        labels: CSV table of ``root`` instead of folders per class.
        trusted_labels: CSV table of ``trusted``.
        val_fraction: share of each class of ``trusted`` for validation where it has no such split.
        test_fraction: share of each class of ``trusted`` for testing where it has no such split.
        seed: of shares and shots.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: what :class:`~proto_vision.data.folder.ImageFolder` refuses in either folder, fewer than one shot,
            trusted images of classes that ``root`` lacks, classes of ``root`` without a trusted training image.

    Source:
        arXiv 2212.00465, section 4 (web images with K-shot lists of the real training sets).
    """

    def __init__(
        self,
        root: str | Path,
        trusted: str | Path,
        shots: int | None = None,
        labels: str | Path | None = None,
        trusted_labels: str | Path | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.5,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        if shots is not None:
            check_positive(shots=shots)
        self.shots, self.seed = shots, seed
        self.web = ImageFolder(root, labels, val_fraction=0.0, test_fraction=0.0, seed=seed)
        self.real = ImageFolder(
            trusted, trusted_labels, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
        )

    def read_table(self) -> ImageTable:
        """Images from the web by their paths in ``root``, then trusted ones by their whole paths."""
        web, real = self.web.read_table(), self._real_table()
        names = web.class_names
        strange = [name for name in real.class_names if name not in set(names)]
        if strange:
            raise ValueError(f"trusted: {self.real.root} has classes that {self.root} lacks: {strange[:5]}")
        place = {name: number for number, name in enumerate(names)}
        targets = np.array([place[name] for name in real.class_names], dtype=np.int64)[real.targets]
        fold = real.fold.copy()
        train = np.flatnonzero(fold == "train")
        if self.shots is not None:
            chosen = train[draw_shots(targets[train], self.shots, self.seed)]
            fold[np.setdiff1d(train, chosen)] = ""
        lacking = [names[k] for k in np.setdiff1d(np.arange(len(names)), targets[fold == "train"])]
        if lacking:
            raise ValueError(
                f"trusted: {self.real.root} has no training image of {len(lacking)} classes, such as {lacking[:5]}"
            )
        trusted = np.r_[np.zeros(len(web.targets), dtype=bool), np.ones(len(targets), dtype=bool)]
        ids = [*web.record_ids, *((self.real.root / name).resolve().as_posix() for name in real.record_ids)]
        folds = np.r_[np.where(web.fold == "train", "train", ""), fold].astype("<U5")
        return ImageTable(ids, np.r_[web.targets, targets], folds, names, trusted=trusted)

    def _real_table(self) -> ImageTable:
        if not self.real.root.is_dir():
            raise ValueError(f"trusted: {str(self.real.root)!r} is no folder, needed one that holds images")
        return self.real.read_table()
