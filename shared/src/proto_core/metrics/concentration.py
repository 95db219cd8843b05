"""How few directions hold an embedding's variance, and whether it lies on a circle (arXiv 2603.10225, 2502.01628)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["circularity", "pca_concentration"]


def pca_concentration(
    features: Float[Tensor, "N D"], n_components: int = 50, standardize: bool = True
) -> dict[str, Any]:
    """Explained variance ratios of a PCA and what is read off them; ratios are of the TOTAL variance.

    Args:
        features: rows.
        n_components: components kept, at most; m is that, N or D, whichever is smallest.
        standardize: give every feature variance 1 first (population standard deviation; constant ones stay).

    Returns:
        ``explained_variance_ratio`` and ``cumulative`` ``[m]`` (float64), ``intrinsic_dim_90`` and
        ``intrinsic_dim_95`` (components until the share is reached, m if never), ``effective_rank``
        ``exp(-sum q log q)`` with q the ratios + 1e-12 divided by their sum, ``participation_ratio``
        ``1 / sum ratio^2``.

    Raises:
        ValueError: not ``[N, D]`` with at least two rows, no component, NaN, features that are all constant.

    Example:
        >>> import torch
        >>> from proto_core.metrics import pca_concentration
        >>> found = pca_concentration(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> found["intrinsic_dim_90"], round(found["participation_ratio"], 4)
        (2, 2.0)
    """
    x = _centred("features", features)
    if n_components < 1:
        raise ValueError(f"n_components: found {n_components}, needed at least 1")
    if standardize:
        spread = x.square().mean(dim=0).sqrt()
        x = x / torch.where(spread > 0, spread, 1)
    total = x.square().sum()
    if not bool(total > 0):
        raise ValueError("features: found no variance at all, needed rows that differ")
    kept = min(n_components, *x.shape)
    ratio = (torch.linalg.svdvals(x).square() / total)[:kept]
    cumulative = ratio.cumsum(0)
    share = (ratio + 1e-12) / (ratio + 1e-12).sum()

    def reached(level: float) -> int:
        return min(int((cumulative < level).sum()) + 1, kept)

    return {
        "explained_variance_ratio": ratio,
        "cumulative": cumulative,
        "intrinsic_dim_90": reached(0.90),
        "intrinsic_dim_95": reached(0.95),
        "effective_rank": float((-(share * share.log()).sum()).exp()),
        "participation_ratio": float(1 / ratio.square().sum()),
    }


def circularity(reps: Float[Tensor, "N D"]) -> float:
    """Spread of the distances from the centre in the plane of the first two components; 0 for a circle.

    Both scores are scaled to [0, 1]; the population standard deviation of the distances from their centroid is divided
    by the mean distance.

    Args:
        reps: rows.

    Raises:
        ValueError: fewer than two rows or features, NaN, no variance in two directions.

    Example:
        >>> import math, torch
        >>> from proto_core.metrics import circularity
        >>> angle = torch.arange(12) * math.pi / 6
        >>> circularity(torch.stack([angle.cos(), angle.sin()], dim=1)) < 1e-6
        True
    """
    x = _centred("reps", reps)
    if x.shape[1] < 2:
        raise ValueError(f"reps: found {x.shape[1]} feature, needed at least 2")
    _, values, axes = torch.linalg.svd(x, full_matrices=False)
    if len(values) < 2 or not bool(values[1] > 1e-12 * values[0]):
        raise ValueError("reps: found variance in fewer than two directions")
    scores = x @ axes[:2].T
    scores = (scores - scores.amin(dim=0)) / (scores.amax(dim=0) - scores.amin(dim=0))
    distance = torch.linalg.vector_norm(scores - scores.mean(dim=0), dim=1)
    return float(distance.std(correction=0) / distance.mean())


def _centred(name: str, rows: Tensor) -> Tensor:
    if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] < 1:
        raise ValueError(f"{name}: found shape {tuple(rows.shape)}, needed [N, D] with at least two rows")
    wide = rows.detach().double()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name}: found NaN or infinite entries, needed numbers")
    x = wide - wide.mean(dim=0)
    # a constant feature's mean is off by rounding: what is left of it is no spread
    rounding = torch.finfo(x.dtype).eps * len(x) * wide.abs().amax(dim=0)
    return torch.where(x.square().mean(dim=0).sqrt() > rounding, x, 0)
