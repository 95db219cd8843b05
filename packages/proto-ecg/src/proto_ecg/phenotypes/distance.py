"""What classes say about their prototypes: class activation, spread within a class, and whether spread goes with
prototypes that disagree about a phecode ("mixed significance").

"Prototype Learning to Create Refined Interpretable Digital Phenotypes from ECGs" (2025, arXiv 2508.01521).
Distance and test are our reading of the abstract; no code of the authors exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Real, Shaped
from scipy.special import ndtr
from scipy.stats import rankdata

from .arrays import Array, float_array, float_matrix, membership

__all__ = [
    "DistanceTest",
    "class_activation",
    "intra_class_distance",
    "intra_class_distance_test",
    "mixed_significance",
]


def class_activation(
    activations: Real[Array, "N P"], prototype_class: Shaped[Array, "P C"], reduce: str = "max"
) -> Float[np.ndarray, "N C"]:
    """Activation of the broader prototype class: the largest or the mean activation of the class's prototypes.

    Args:
        activations: ``[N, P]``, finite.
        prototype_class: ``[P, C]`` of zeros and ones: which prototype is of which class.
        reduce: ``"max"`` or ``"mean"``.

    Returns:
        ``[N, C]``; NaN for a class that has no prototype.

    Raises:
        ValueError: sizes differ, membership other than 0 and 1, or an unknown ``reduce``.

    Source:
        arXiv 2508.01521 as its card reads it, step 6.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import class_activation
        >>> class_activation(np.array([[0.1, 0.7, 0.2]]), np.array([[1, 0], [1, 0], [0, 1]])).tolist()
        [[0.7, 0.2]]
    """
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce: found {reduce!r}, needed 'max' or 'mean'")
    scores = float_matrix(activations, "activations", "N P")
    member = membership(prototype_class, scores.shape[1])
    counts = member.sum(axis=0)
    if reduce == "mean":
        with np.errstate(invalid="ignore"):
            return (scores @ member) / np.where(counts > 0, counts, np.nan)
    columns = [scores[:, own].max(axis=1) if own.any() else np.full(len(scores), np.nan) for own in member.T]
    return np.stack(columns, axis=1)


def intra_class_distance(
    prototypes: Real[Array, "P *D"], prototype_class: Shaped[Array, "P C"], metric: str = "cosine"
) -> Float[np.ndarray, " C"]:
    """Mean distance over the unordered pairs of prototypes of a class.

    Prototypes of different branches live in different spaces: call this once per branch.

    Args:
        prototypes: ``[P, D]``; further axes (parts) are flattened into ``D``.
        prototype_class: ``[P, C]`` of zeros and ones.
        metric: ``"cosine"`` (one minus the cosine) or ``"euclidean"``.

    Returns:
        ``[C]``; NaN for a class with fewer than two prototypes.

    Raises:
        ValueError: sizes differ, a NaN, an unknown metric, or a prototype of length 0 under ``"cosine"``.

    Source:
        arXiv 2508.01521 as its card reads it, step 7.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import intra_class_distance
        >>> points = np.array([[0.0, 1.0], [3.0, 5.0], [1.0, 1.0]])
        >>> intra_class_distance(points, np.array([[1, 0], [1, 0], [0, 1]]), "euclidean").tolist()
        [5.0, nan]
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric: found {metric!r}, needed 'cosine' or 'euclidean'")
    values = float_array(prototypes, "prototypes")
    if values.ndim < 2:
        raise ValueError(f"prototypes: found shape {list(values.shape)}, needed [P D]")
    points = float_matrix(values.reshape(len(values), -1), "prototypes", "P D")
    member = membership(prototype_class, len(points))
    if metric == "cosine":
        length = np.linalg.norm(points, axis=1, keepdims=True)
        if (length == 0).any():
            raise ValueError(f"prototypes: found length 0 at row {int(np.argmin(length))}, needed a direction")
        points = points / length
    distances = np.full(member.shape[1], np.nan)
    for column, own in enumerate(member.T):
        count = int(own.sum())
        if count < 2:
            continue
        of_class = points[own]
        rows, columns = np.triu_indices(count, 1)
        if metric == "cosine":
            distances[column] = 1.0 - (of_class @ of_class.T)[rows, columns].mean()
        else:
            distances[column] = np.linalg.norm(of_class[rows] - of_class[columns], axis=1).mean()
    return distances


def mixed_significance(
    significant: Shaped[Array, "P K"], prototype_class: Shaped[Array, "P C"]
) -> Int[np.ndarray, "C K"]:
    """How many of a class's prototypes are significant for a phecode.

    Args:
        significant: ``[P, K]`` of zeros and ones (or booleans).
        prototype_class: ``[P, C]`` of zeros and ones.

    Returns:
        int64 ``[C, K]``: -1 fewer than two prototypes, 0 none significant, 1 some ("mixed"), 2 all.

    Raises:
        ValueError: sizes differ, or entries other than 0 and 1.

    Source:
        arXiv 2508.01521 as its card reads it, step 8.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import mixed_significance
        >>> mixed_significance(np.array([[1, 0], [0, 0], [1, 1]]), np.array([[1, 0], [1, 0], [0, 1]])).tolist()
        [[1, 0], [-1, -1]]
    """
    flags = membership_flags(significant)
    member = membership(prototype_class, len(flags))
    total = member.sum(axis=0)[:, None]
    hits = member.T.astype(np.int64) @ flags.astype(np.int64)
    status = np.where(hits == 0, 0, np.where(hits == total, 2, 1))
    return np.where(total < 2, -1, status).astype(np.int64)


def membership_flags(significant: Array) -> np.ndarray:
    """``significant`` as booleans ``[P, K]``."""
    flags = float_matrix(significant, "significant", "P K")
    wrong = ~np.isin(flags, (0.0, 1.0))
    if wrong.any():
        raise ValueError(f"significant: found {flags[wrong][0]:g}, needed booleans (0 or 1)")
    return flags > 0


@dataclass(frozen=True, slots=True)
class DistanceTest:
    """Mann-Whitney test of the intra-class distance, mixed against uniform cells; NaN if a group is empty.

    Attributes:
        statistic: U of the mixed group.
        p_value: one-sided, alternative "mixed is greater".
        mean_mixed: mean distance of the mixed cells.
        mean_uniform: mean distance of the uniform cells.
        n_mixed: number of mixed cells.
        n_uniform: number of uniform cells.
    """

    statistic: float
    p_value: float
    mean_mixed: float
    mean_uniform: float
    n_mixed: int
    n_uniform: int


def intra_class_distance_test(distances: Real[Array, " C"], mixed: Real[Array, "C K"]) -> DistanceTest:
    """Do classes whose prototypes disagree about a phecode have prototypes further apart?

    One-sided Mann-Whitney U over the (class, phecode) cells with a status of at least 0, the value of a cell being
    its class's distance; normal approximation with tie and continuity correction. The cells of a class share their
    value, so the p-value is optimistic: report the class-level test (one column: mixed anywhere) beside it.

    Args:
        distances: ``[C]`` of :func:`intra_class_distance`.
        mixed: ``[C, K]`` of :func:`mixed_significance`.

    Returns:
        U of the mixed group, its p-value, and both groups' means and sizes.

    Raises:
        ValueError: sizes differ, or a status other than -1, 0, 1, 2.

    Source:
        arXiv 2508.01521 as its card reads it, step 8.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import intra_class_distance_test
        >>> test = intra_class_distance_test(np.array([0.1, 0.2, 0.9]), np.array([[0, 2], [0, 0], [1, 1]]))
        >>> test.statistic, test.n_mixed, test.n_uniform
        (8.0, 2, 4)
    """
    values = float_array(distances, "distances")
    status = float_array(mixed, "mixed")
    if values.ndim != 1 or status.ndim != 2 or len(status) != len(values):
        raise ValueError(
            f"mixed: found shape {list(status.shape)} beside distances {list(values.shape)}, needed [C K] and [C]"
        )
    wrong = ~np.isin(status, (-1, 0, 1, 2))
    if wrong.any():
        raise ValueError(f"mixed: found the status {status[wrong][0]:g}, needed -1, 0, 1 or 2 (see mixed_significance)")
    cells = np.broadcast_to(values[:, None], status.shape)
    usable = (status >= 0) & np.isfinite(cells)
    in_mixed = cells[usable & (status == 1)]
    in_uniform = cells[usable & (status != 1)]
    first, second = len(in_mixed), len(in_uniform)
    if first == 0 or second == 0:
        means = [float(group.mean()) if len(group) else float("nan") for group in (in_mixed, in_uniform)]
        return DistanceTest(float("nan"), float("nan"), means[0], means[1], first, second)
    total = first + second
    pooled = np.concatenate([in_mixed, in_uniform])
    statistic = rankdata(pooled)[:first].sum() - first * (first + 1) / 2
    ties = np.unique(pooled, return_counts=True)[1].astype(np.float64)
    spread = np.sqrt(first * second / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1))))
    excess = statistic - first * second / 2 - 0.5
    p_value = float(ndtr(-excess / spread)) if spread > 0 else 1.0
    return DistanceTest(float(statistic), p_value, float(in_mixed.mean()), float(in_uniform.mean()), first, second)
