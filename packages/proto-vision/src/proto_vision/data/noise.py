"""Wrong labels on purpose, and few labels that are known to be right: what experiments with label noise start from.

Source of the settings: DivideMix (arXiv 2002.07394) for symmetric and asymmetric noise on CIFAR, FoPro
(arXiv 2212.00465) for few trusted shots. Only training images get wrong labels: what is measured stays right.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from proto_core.checks import check_positive
from proto_vision.data.dataset import ImageTable
from proto_vision.data.protocols import Protocol

__all__ = ["CIFAR10_CONFUSIONS", "AsymmetricNoise", "SymmetricNoise", "TrustedShots"]

CIFAR10_CONFUSIONS = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}
"""Classes of CIFAR-10 that are taken for another."""


class _Noise(Protocol):
    """Labels of some training rows change; the right ones stand in ``true_targets``."""

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate: found {rate}, needed a share in [0, 1]")
        self.rate, self.seed = rate, seed

    def _drawn(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A share ``rate`` of rows, rounded to the nearest number."""
        return random.permutation(rows)[: round(self.rate * len(rows))]

    @staticmethod
    def _changed(table: ImageTable, rows: np.ndarray, labels: np.ndarray) -> ImageTable:
        targets = table.targets.copy()
        targets[rows] = labels
        train = table.fold == "train"
        size = len(table.class_names)
        before, after = (np.bincount(part[train], minlength=size) > 0 for part in (table.targets, targets))
        if (lost := np.flatnonzero(before & ~after)).size:
            names = [table.class_names[k] for k in lost[:5]]
            raise ValueError(f"rate: the noise leaves no training image to {names}, needed one at least of each class")
        true = table.targets if table.true_targets is None else table.true_targets
        return table._replace(targets=targets, true_targets=true)


class SymmetricNoise(_Noise):
    """A share of the training labels is drawn anew, each class being as likely as the others.

    Args:
        rate: share of the training images whose label is drawn.
        true_class: whether the right class may be drawn too (as in DivideMix: of 10 classes and a rate of 0.5 some 45 %
            of the labels are then wrong), or only the others are (``rate`` of the labels are wrong).
        seed: of the draws.

    Raises:
        ValueError: a rate outside [0, 1]; when called: a class that is left without a training image, other classes
            only where there is but one.

    Source:
        arXiv 2002.07394, section 4.1.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.noise import SymmetricNoise
        >>> table = Digits(image_size=8, protocol=SymmetricNoise(0.4, true_class=False)).table
        >>> wrong = table.targets != table.true_targets
        >>> float(wrong[table.fold == "train"].mean().round(2)), bool(wrong[table.fold == "test"].any())
        (0.4, False)
    """

    def __init__(self, rate: float = 0.4, true_class: bool = True, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.true_class = true_class

    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table."""
        random = np.random.default_rng(self.seed)
        train = np.flatnonzero(table.fold == "train")
        classes = np.unique(table.targets[train])
        rows = self._drawn(train, random)
        if self.true_class:
            return self._changed(table, rows, random.choice(classes, len(rows)))
        if len(classes) < 2 and len(rows):
            raise ValueError(f"true_class: found {len(classes)} class, needed two to draw a wrong one")
        place = np.searchsorted(classes, table.targets[rows])
        step = random.integers(1, max(len(classes), 2), len(rows))
        return self._changed(table, rows, classes[(place + step) % len(classes)])


class AsymmetricNoise(_Noise):
    """A share of the training images of some classes has the label of the class that each is taken for.

    Args:
        rate: share of the training images of each such class.
        confusions: class -> class that it is taken for, by name; ``None``: those of CIFAR-10 (truck for automobile,
            bird for airplane, deer for horse, cat and dog for each other). ``{}``: each class for the next one, the
            last for the first.
        seed: of the draws.

    Raises:
        ValueError: a rate outside [0, 1]; when called: a name that is no class, a class that is left without a
            training image.

    Source:
        arXiv 2002.07394, section 4.1.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.noise import AsymmetricNoise
        >>> table = Digits(image_size=8, protocol=AsymmetricNoise(0.4, {"7": "1"})).table
        >>> wrong = table.targets != table.true_targets
        >>> set(table.true_targets[wrong].tolist()), set(table.targets[wrong].tolist())
        ({7}, {1})
    """

    def __init__(self, rate: float = 0.4, confusions: Mapping[str, str] | None = None, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.confusions = dict(CIFAR10_CONFUSIONS if confusions is None else confusions)

    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table."""
        names = table.class_names
        unknown = sorted({*self.confusions, *self.confusions.values()} - set(names))
        if unknown:
            raise ValueError(f"confusions: found {unknown}, needed classes such as {names[:5]}")
        random = np.random.default_rng(self.seed)
        train = np.flatnonzero(table.fold == "train")
        trained = [names[k] for k in np.unique(table.targets[train])]
        pairs = self.confusions or dict(zip(trained, trained[1:] + trained[:1]))
        place = {name: number for number, name in enumerate(names)}
        parts = [(self._drawn(train[table.targets[train] == place[a]], random), place[b]) for a, b in pairs.items()]
        rows = np.concatenate([part for part, _ in parts])
        return self._changed(table, rows, np.concatenate([np.full(len(part), label) for part, label in parts]))


class TrustedShots(Protocol):
    """A few training images of each class have labels known to be right (``trusted``); the others' may be wrong.

    Args:
        shots: trusted images of each class; a class with fewer has all of its images trusted.
        noise: what makes other labels wrong, or ``None`` where they already are. Shots are drawn by the right class and
            keep it.
        seed: of the draw.

    Raises:
        ValueError: no shot.

    Source:
        arXiv 2212.00465, section 4 (K-shot).

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.data.noise import SymmetricNoise, TrustedShots
        >>> table = Digits(image_size=8, protocol=TrustedShots(4, SymmetricNoise(0.6))).table
        >>> int(table.trusted.sum()), bool((table.targets == table.true_targets)[table.trusted].all())
        (40, True)
    """

    def __init__(self, shots: int = 16, noise: Protocol | None = None, seed: int = 0) -> None:
        check_positive(shots=shots)
        self.shots, self.noise, self.seed = shots, noise, seed

    def __call__(self, table: ImageTable) -> ImageTable:
        """The changed table."""
        if self.noise is not None:
            table = self.noise(table)
        true = table.targets if table.true_targets is None else table.true_targets
        train = np.flatnonzero(table.fold == "train")
        trusted = np.zeros(len(true), dtype=bool)
        trusted[train[draw_shots(true[train], self.shots, self.seed)]] = True
        targets = np.where(trusted, true, table.targets)
        return table._replace(targets=targets, trusted=trusted)


def draw_shots(targets: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Sorted places of up to ``shots`` random entries of each class.

    Example:
        >>> import numpy as np
        >>> from proto_vision.data.noise import draw_shots
        >>> draw_shots(np.array([7, 7, 7, 7, 2]), 2, seed=0).tolist()
        [2, 3, 4]
    """
    order = np.random.default_rng(seed).permutation(len(targets))
    grouped = order[np.argsort(targets[order], kind="stable")]
    _, start, count = np.unique(targets[grouped], return_index=True, return_counts=True)
    return np.sort(grouped[np.arange(len(grouped)) - np.repeat(start, count) < shots])
