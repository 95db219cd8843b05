"""Folds with classes of their own: no class of validation or test is trained on (few-shot and metric learning)."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np

from proto_vision.data.dataset import FOLDS, ImageTable
from proto_vision.data.protocols import Protocol

__all__ = ["ClassSplit", "by_fold"]


def by_fold(table: ImageTable) -> ImageTable:
    """The table with its classes in the order training, validation, test, each in the order in which they stood.

    A class counts to the first of these folds that has an image of it; one without any comes last.
    """
    place = np.full(len(table.class_names), len(FOLDS))
    for number, fold in reversed(list(enumerate(FOLDS))):
        place[table.targets[table.fold == fold]] = number
    order = np.argsort(place, kind="stable")
    target_of = np.empty(len(order), dtype=np.int64)
    target_of[order] = np.arange(len(order))
    names = [table.class_names[c] for c in order]
    return table._replace(targets=target_of[table.targets], class_names=names)


class ClassSplit(Protocol):
    """Give whole classes, with all their images, to validation and to test; all other classes train.

    Args:
        val: classes of validation: how many, or their names or patterns of names (``Korean/*``).
        test: classes of the test, likewise.
        seed: counted classes are drawn by it; ``None``: they are the last ones in the order of the classes, first those
            of validation, then those of the test.

    Raises:
        ValueError: a negative number; when called: a pattern that fits no class, a class in both, no class that stays.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.class_split import ClassSplit
        >>> data = Digits(image_size=8, protocol=ClassSplit(val=2, test=["0", "3"]))
        >>> data.class_names, data.table.class_names[6:]
        (['1', '2', '4', '5', '6', '7'], ['8', '9', '0', '3'])
    """

    def __init__(self, val: int | list[str] = 0, test: int | list[str] = 0, seed: int | None = None) -> None:
        for name, value in (("val", val), ("test", test)):
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name}: found {value}, needed 0 or more classes")
        self.val, self.test, self.seed = val, test, seed

    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table."""
        names = table.class_names
        fold_of = np.full(len(names), "train", dtype="<U5")
        for held_fold, wanted in (("val", self.val), ("test", self.test)):
            if not isinstance(wanted, int):
                chosen = self._named(held_fold, wanted, names)
                if (taken := chosen[fold_of[chosen] != "train"]).size:
                    raise ValueError(f"val, test: found {names[int(taken[0])]!r} in both, needed classes for one fold")
                fold_of[chosen] = held_fold
        free = np.flatnonzero(fold_of == "train")
        if self.seed is not None:
            free = np.random.default_rng(self.seed).permutation(free)
        counts = [value if isinstance(value, int) else 0 for value in (self.val, self.test)]
        if sum(counts) >= len(free):
            raise ValueError(
                f"val, test: found {sum(counts)} of {len(free)} classes to hold out, needed some that stay"
            )
        held = free[len(free) - sum(counts) :]
        fold_of[held[: counts[0]]], fold_of[held[counts[0] :]] = "val", "test"
        fold = np.where(table.fold == "", "", fold_of[table.targets])
        return by_fold(table._replace(fold=fold))

    @staticmethod
    def _named(fold: str, patterns: list[str], names: list[str]) -> np.ndarray:
        fits = [[place for place, name in enumerate(names) if fnmatchcase(name, pattern)] for pattern in patterns]
        if missing := [pattern for pattern, found in zip(patterns, fits) if not found]:
            raise ValueError(f"{fold}: found {missing}, which fit no class such as {names[:5]}")
        return np.array(sorted(set().union(*fits)), dtype=np.int64)
