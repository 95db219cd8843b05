"""Correction of p-values for many tests: Bonferroni, and the step-up procedure of Benjamini and Hochberg (1995)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real

from .arrays import Array, float_array

__all__ = ["CORRECTIONS", "adjust_p_values", "check_correction"]

CORRECTIONS = ("bonferroni", "fdr_bh")


def check_correction(method: str, argument: str = "correction") -> None:
    """Refuse an unknown correction.

    Raises:
        ValueError: names ``argument`` and what there is.
    """
    if method not in CORRECTIONS:
        raise ValueError(f"{argument}: found {method!r}, needed one of {list(CORRECTIONS)}")


def adjust_p_values(p: Real[Array, "*shape"], method: str = "bonferroni") -> Float[np.ndarray, "*shape"]:
    """p-values corrected jointly over all finite entries; NaN stays NaN and is not counted.

    With ``m`` finite entries, Bonferroni gives ``min(1, m p)``; Benjamini-Hochberg gives for the ``r``-th smallest
    ``min over s >= r of m p_(s) / s``.

    Args:
        p: p-values of any shape.
        method: ``"bonferroni"`` or ``"fdr_bh"``.

    Returns:
        Adjusted p-values of the same shape.

    Raises:
        ValueError: an unknown method, or values outside [0, 1].

    Source:
        arXiv 2508.01521 as its card reads it, step 5; Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995).

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import adjust_p_values
        >>> adjust_p_values(np.array([0.01, np.nan, 0.5, 0.03]), "fdr_bh").round(3).tolist()
        [0.03, nan, 0.5, 0.045]
    """
    check_correction(method, "method")
    values = float_array(p, "p")
    adjusted = np.full(values.shape, np.nan)
    counted = np.isfinite(values)
    found = values[counted]
    if ((found < 0) | (found > 1)).any() or np.isinf(values).any():
        raise ValueError(f"p: found values from {np.nanmin(values)} to {np.nanmax(values)}, needed 0 to 1 or NaN")
    if method == "bonferroni":
        adjusted[counted] = np.minimum(1.0, found * len(found))
        return adjusted
    order = np.argsort(found, kind="stable")
    scaled = found[order] * (len(found) / np.arange(1, len(found) + 1))
    result = np.empty_like(found)
    result[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    adjusted[counted] = result
    return adjusted
