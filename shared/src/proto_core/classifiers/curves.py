"""How many samples a classifier needs: its error as a function of their number.

The curve and the simulation of "Revisiting Discriminative vs. Generative Classifiers" (ICML 2023, arXiv 2302.02334).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from proto_core.checks import check_class_targets, check_option, check_positive

__all__ = ["make_gaussian_mixture", "sample_complexity_curve", "samples_to_reach"]


def sample_complexity_curve(
    make_head: Callable[[], Any],
    x_train: Float[Tensor, "N D"],
    y_train: Int[Tensor, "N"],
    x_test: Float[Tensor, "M D"],
    y_test: Int[Tensor, "M"],
    sizes: Sequence[int],
    *,
    repeats: int = 5,
    seed: int = 0,
) -> Float[Tensor, "repeats sizes"]:
    """Test errors of a head fitted on random subsets that hold every class.

    Args:
        make_head: makes a head with ``fit(x, y)`` and ``predict(x)``.
        x_train: pool that subsets are drawn from.
        y_train: its classes.
        x_test: test samples.
        y_test: their classes.
        sizes: sizes of the subsets.
        repeats: subsets of each size.
        seed: subset r of size s comes from ``(seed, r, s)``.

    Returns:
        Share of wrong predictions, float64.

    Raises:
        ValueError: a size below the number of classes or above the pool, no size, fewer than 1 repeat.

    Example:
        >>> import torch
        >>> from proto_core.classifiers import GaussianNaiveBayes, make_gaussian_mixture, sample_complexity_curve
        >>> x, y = make_gaussian_mixture(20, 2, 200)
        >>> head = lambda: GaussianNaiveBayes(20, 2)
        >>> sample_complexity_curve(head, x, y, x, y, [4, 100], repeats=2).shape
        torch.Size([2, 2])
    """
    check_class_targets(x_train, y_train, "x_train", classes=int(y_train.max()) + 1 if len(y_train) else 1)
    check_class_targets(x_test, y_test, "x_test", classes=int(y_test.max()) + 1 if len(y_test) else 1)
    classes = y_train.unique()
    if len(sizes) == 0 or min(sizes) < len(classes) or max(sizes) > len(y_train):
        needed = f"{len(classes)} (the classes) to {len(y_train)} (the pool)"
        raise ValueError(f"sizes: found {list(sizes)}, needed {needed}")
    if repeats < 1:
        raise ValueError(f"repeats: found {repeats}, needed at least 1")
    labels = y_train.cpu().numpy()
    errors = torch.empty(repeats, len(sizes), dtype=torch.float64)
    for repeat in range(repeats):
        for column, size in enumerate(sizes):
            rng = np.random.default_rng((seed, repeat, size))
            rows = torch.from_numpy(_subset(labels, size, rng)).to(y_train.device)
            head = make_head()
            head.fit(x_train[rows], y_train[rows])
            errors[repeat, column] = (head.predict(x_test) != y_test).double().mean()
    return errors


def _subset(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random rows with every class: one of each first, the rest from all others."""
    order = rng.permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    others = np.delete(order, first)
    return np.concatenate([order[first], others[: size - len(first)]])


def samples_to_reach(errors: Float[Tensor, "repeats sizes"], sizes: Sequence[int], threshold: float) -> int | None:
    """First size whose mean error is below the threshold; ``None`` if there is none.

    Args:
        errors: of :func:`sample_complexity_curve`.
        sizes: in rising order.
        threshold: error to get below.

    Raises:
        ValueError: another number of sizes than columns.

    Example:
        >>> import torch
        >>> from proto_core.classifiers import samples_to_reach
        >>> samples_to_reach(torch.tensor([[0.5, 0.1], [0.3, 0.1]]), [10, 20], 0.2)
        20
    """
    errors = torch.as_tensor(errors)
    if errors.ndim != 2 or errors.shape[1] != len(sizes):
        raise ValueError(f"errors: found shape {tuple(errors.shape)}, needed [repeats, {len(sizes)}]")
    below = (errors.double().mean(dim=0) < threshold).tolist()
    return next((int(size) for size, enough in zip(sizes, below) if enough), None)


def make_gaussian_mixture(
    n: int, num_classes: int, samples_per_class: int, *, mode: str = "easy", seed: int = 0
) -> tuple[Float[Tensor, "N n"], Int[Tensor, "N"]]:
    """The simulation of the paper: classes at -1, 1, 2, 4, ... times the ones vector, half of the features noisy.

    ``easy``: independent features, the first ``n // 2`` of variance n, the others of variance 1. ``hard``: covariance
    ``A^T A`` with that diagonal, A uniform in [-1, 1), one fixed draw for each n; what is not positive is cut.

    Args:
        n: features.
        num_classes: classes.
        samples_per_class: samples of each.
        mode: ``"easy"`` or ``"hard"``.
        seed: of the samples.

    Returns:
        Samples in class order (float32) and their classes.

    Raises:
        ValueError: a count below 1, an unknown mode.

    Example:
        >>> from proto_core.classifiers import make_gaussian_mixture
        >>> x, y = make_gaussian_mixture(4, 3, 1000)
        >>> x[y == 2].mean(0).round().tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    check_positive(n=n, num_classes=num_classes, samples_per_class=samples_per_class)
    check_option("mode", mode, "easy", "hard")
    scales = np.concatenate([[-1.0], 2.0 ** np.arange(num_classes - 1)])
    variances = np.where(np.arange(n) < n // 2, float(n), 1.0)
    labels = np.repeat(np.arange(num_classes), samples_per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), n))
    if mode == "easy":
        noise = noise * np.sqrt(variances)
    else:
        mixing = 2 * np.random.default_rng(n).random((n, n)) - 1
        covariance = mixing.T @ mixing
        np.fill_diagonal(covariance, variances)
        values, vectors = np.linalg.eigh(covariance)
        noise = noise @ (vectors * np.sqrt(values.clip(min=0))).T
    return torch.from_numpy((scales[labels, None] + noise).astype(np.float32)), torch.from_numpy(labels)
