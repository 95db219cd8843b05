"""Protocols: what an experiment changes about a source of images before training, whatever the source.

A protocol takes the table of a source and gives another one: noisy labels, classes that training must not see, labels
that are kept from it. It is an argument of every data module (``--data.protocol``), so that none is written twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from proto_vision.data.dataset import ImageTable

__all__ = ["Protocol", "UnseenClasses"]


class Protocol(ABC):
    """A change of a source's table: same rows in the same order, other targets, folds, class order or trust."""

    @abstractmethod
    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table; the given one stays as it is.

        Classes with training images come first in ``class_names``: these are what a model learns.
        """


class UnseenClasses(Protocol):
    """Keep some classes out of training and validation: all their images are test images.

    The classes that stay come first, so that their targets are 0..K-1; the others follow. With ``seen_tested`` the test
    fold also holds the test images of seen classes (out-of-distribution detection), otherwise unseen classes alone
    (metric learning, few-shot learning, faces), and test images of seen classes train.

    Args:
        count: how many classes, the last ones in the order of names (of the seen order, for ``classes``).
        classes: their names, instead of ``count``.
        seen_tested: whether test images of seen classes stay test images.

    Raises:
        ValueError: neither or both of ``count`` and ``classes``; when called: unknown names, or no class that stays.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.protocols import UnseenClasses
        >>> data = Digits(image_size=8, protocol=UnseenClasses(4))
        >>> data.class_names, data.table.class_names[-1]
        (['0', '1', '2', '3', '4', '5'], '9')
    """

    def __init__(self, count: int | None = None, classes: list[str] | None = None, seen_tested: bool = False) -> None:
        if (count is None) == (classes is None):
            raise ValueError("count, classes: needed one of them")
        self.count, self.classes, self.seen_tested = count, classes, seen_tested

    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table."""
        names = table.class_names
        if self.classes is None:
            assert self.count is not None
            if not 0 < self.count < len(names):
                raise ValueError(f"count: found {self.count}, needed 1 to {len(names) - 1} of {len(names)} classes")
            hidden = set(names[-self.count :])
        else:
            hidden = set(self.classes)
            unknown = sorted(hidden - set(names))
            if unknown or len(hidden) in (0, len(names)):
                raise ValueError(f"classes: found {sorted(hidden)}, needed some, not all, of {names}")
        order = [name for name in names if name not in hidden] + [name for name in names if name in hidden]
        place = {name: number for number, name in enumerate(order)}
        targets = np.array([place[name] for name in names], dtype=np.int64)[table.targets]
        unseen = targets >= len(names) - len(hidden)
        fold = np.where(unseen & (table.fold != ""), "test", table.fold)
        if not self.seen_tested:
            fold = np.where(~unseen & (fold == "test"), "train", fold)
        return table._replace(targets=targets, fold=fold, class_names=order)
