"""Area under the ROC curve of every score against every outcome, from one sorting of the scores.

Outcomes with missing rows (a person neither case nor control) need ranks among the rows that remain; a running count
over the sorted rows gives them without sorting again.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real

from .arrays import Array, float_matrix, label_matrix

__all__ = ["phecode_auc"]

CHUNK = 1 << 22
"""Entries of one ``[prototypes, rows]`` array: bounds memory at a few times 32 MB."""


def missing_patterns(labels: np.ndarray) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """Outcomes grouped by which rows they have: pairs of a row mask ``[N]`` (``None``: all rows) and columns."""
    if not np.issubdtype(labels.dtype, np.floating):
        return [(None, np.arange(labels.shape[1]))]
    groups: dict[bytes, list[int]] = {}
    for column in range(labels.shape[1]):
        groups.setdefault(np.packbits(np.isnan(labels[:, column])).tobytes(), []).append(column)
    patterns: list[tuple[np.ndarray | None, np.ndarray]] = []
    for columns in groups.values():
        present = ~np.isnan(labels[:, columns[0]])
        patterns.append((None if present.all() else present, np.array(columns)))
    return patterns


def chunk_auc(
    scores: np.ndarray, labels: np.ndarray, patterns: list[tuple[np.ndarray | None, np.ndarray]]
) -> np.ndarray:
    """AUC ``[P, K]`` of scores ``[P, N]`` against outcomes ``[N, K]``: ``(R - n1 (n1 + 1) / 2) / (n1 n0)``.

    ``R`` is the sum of the cases' mid-ranks.
    """
    width = scores.shape[1]
    order = np.argsort(scores, axis=1)
    ordered = np.take_along_axis(scores, order, axis=1)
    new = np.ones_like(ordered, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    last = np.ones_like(new)
    last[:, :-1] = new[:, 1:]
    place = np.arange(width)
    first_of_tie = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    end_of_tie = np.minimum.accumulate(np.where(last, place + 1, width)[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty_like(ordered)
    auc = np.full((len(scores), labels.shape[1]), np.nan)
    for present, columns in patterns:
        if present is None:
            middle = (first_of_tie + end_of_tie + 1) / 2
        else:
            count = np.zeros((len(scores), width + 1))
            np.cumsum(present[order], axis=1, out=count[:, 1:])
            middle = np.take_along_axis(count, first_of_tie, axis=1)
            middle += np.take_along_axis(count, end_of_tie, axis=1)
            middle += 1.0
            middle /= 2.0
        np.put_along_axis(ranks, order, middle, axis=1)
        cases = (labels[:, columns] == 1).astype(np.float64)
        n_cases = cases.sum(axis=0)
        n_controls = (width if present is None else present.sum()) - n_cases
        with np.errstate(invalid="ignore", divide="ignore"):
            auc[:, columns] = (ranks @ cases - n_cases * (n_cases + 1) / 2) / (n_cases * n_controls)
    return auc


def phecode_auc(activations: Real[Array, "N P"], phecodes: Real[Array, "N K"]) -> Float[np.ndarray, "P K"]:
    """Probability that a random case has the larger activation than a random control, ties counting half.

    Args:
        activations: ``[N, P]``, finite.
        phecodes: ``[N, K]`` in {0, 1, NaN}; NaN rows are dropped phecode by phecode.

    Returns:
        ``[P, K]`` in [0, 1], not flipped below 0.5; NaN where a phecode has one class only.

    Raises:
        ValueError: another number of rows, an empty axis, a NaN activation, or an outcome outside {0, 1, NaN}.

    Source:
        arXiv 2508.01521 as its card reads it, step 9.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import phecode_auc
        >>> phecode_auc(np.array([[0.1], [0.4], [0.35], [0.8]]), np.array([[0], [0], [1], [1]])).tolist()
        [[0.75]]
    """
    scores = float_matrix(activations, "activations", "N P")
    labels = label_matrix(phecodes, len(scores))
    patterns = missing_patterns(labels)
    step = max(1, CHUNK // len(scores))
    return np.concatenate(
        [
            chunk_auc(np.ascontiguousarray(scores[:, start : start + step].T), labels, patterns)
            for start in range(0, scores.shape[1], step)
        ]
    )
