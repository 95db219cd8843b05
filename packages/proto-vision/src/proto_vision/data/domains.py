"""Images of several domains (photographs, drawings, ...) in folders, such as PACS: one domain is left out for the test.

Source: the protocol of "Deeper, Broader and Artier Domain Generalization", ICCV 2017, arXiv 1710.03077. Difference: the
validation share is drawn by a seed, not read from lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import find_images
from proto_vision.data.module import ImageDataModule

__all__ = ["DomainFolder"]


class DomainFolder(ImageDataModule):
    """``root/DOMAIN/CLASS/...``: all images of one domain are the test fold, the others train and validate.

    PACS has the domains ``art_painting``, ``cartoon``, ``photo`` and ``sketch`` of seven classes.

    Args:
        root: the folder of the domains; nothing is written into it.
        test_domain: the domain that is left out.
        domains: folders that are domains, if not all are.
        val_fraction: share of each class of each training domain held out for validation.
        seed: of that share.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: no folder, fewer than two domains, an unknown domain, a domain that lacks a class of another, a
            class without an image; names the folder.

    Source:
        arXiv 1710.03077, section 4.
    """

    def __init__(
        self,
        root: str | Path,
        test_domain: str,
        domains: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self.test_domain, self.domains = test_domain, domains
        self.val_fraction, self.seed = val_fraction, seed

    def read_table(self) -> ImageTable:
        """Images by their paths, domain by domain and class by class."""
        if not self.root.is_dir():
            raise ValueError(f"root: {str(self.root)!r} is no folder, needed one that holds a folder for each domain")
        there = _folders(self.root)
        names = there if self.domains is None else list(self.domains)
        if unknown := sorted({self.test_domain, *names} - set(there)):
            raise ValueError(f"test_domain, domains: found {unknown}, needed folders of {self.root}: {there}")
        if self.test_domain not in names or len(set(names)) < max(len(names), 2):
            found = f"{self.test_domain!r} and {names}"
            raise ValueError(f"test_domain, domains: found {found}, needed one of two domains or more, none twice")
        classes = {name: _folders(self.root / name) for name in names}
        every = sorted(set().union(*classes.values()))
        lacking = {name: sorted(set(every) - set(own)) for name, own in classes.items() if len(own) < len(every)}
        if lacking or not every:
            raise ValueError(f"{self.root}: found domains that lack classes, {lacking}, needed the same in all domains")
        ids: list[str] = []
        groups: list[int] = []
        for number, folder in enumerate(self.root / name / label for name in names for label in every):
            images = find_images(folder)
            if not images:
                raise ValueError(f"{folder}: found no image, needed at least one")
            ids += [image.relative_to(self.root).as_posix() for image in images]
            groups += [number] * len(images)
        group = np.array(groups, dtype=np.int64)
        fold = np.where(group // len(every) == names.index(self.test_domain), "test", "train").astype("<U5")
        train = np.flatnonzero(fold == "train")
        fold[train[split_rows(group[train], self.val_fraction, self.seed, argument="val_fraction")]] = "val"
        return ImageTable(ids, group % len(every), fold, every)


def _folders(place: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
