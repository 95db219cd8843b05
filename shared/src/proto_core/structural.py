"""Structural similarity (SSIM) of two images, place by place: what the loss and the metric share.

Wang et al. (2004), in the form of BASNet (arXiv 2101.04704): a Gaussian window, zeros beyond the border, population
statistics, values in [0, 1].
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from proto_core.precision import full_precision, no_autocast

__all__ = ["ssim_map"]


def ssim_map(
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B C H W"],
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    c1: float = 1e-4,
    c2: float = 9e-4,
) -> Float[Tensor, "B C H W"]:
    """``(2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2))`` at every place, each channel by itself.

    The variance is ``E[x^2] - E[x]^2`` and may be negative by rounding.

    Args:
        x: images.
        y: images of the same shape.
        window_size: side of the window, odd.
        sigma: of the window's Gaussian, in pixels.
        c1: guard of the means.
        c2: guard of the variances.

    Raises:
        ValueError: shapes that differ, an even window, sigma not positive.

    Example:
        >>> import torch
        >>> from proto_core.structural import ssim_map
        >>> x = torch.rand(1, 1, 16, 16)
        >>> ssim_map(x, x).mean().round(decimals=4)
        tensor(1.)
    """
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"x, y: found shapes {tuple(x.shape)} and {tuple(y.shape)}, needed [B, C, H, W] both")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size: found {window_size}, needed an odd number")
    if not sigma > 0:
        raise ValueError(f"sigma: found {sigma}, needed a positive number")
    x, y = full_precision(x), full_precision(y)
    y = y.to(x)
    offsets = torch.arange(window_size, dtype=x.dtype, device=x.device) - window_size // 2
    weights = (-offsets.square() / (2 * sigma**2)).exp()
    weights = weights / weights.sum()
    with no_autocast(x):
        moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2).unsqueeze(1)
        half = window_size // 2
        rows = F.conv2d(moments, weights[None, None, :, None], padding=(half, 0))
        both = F.conv2d(rows, weights[None, None, None, :], padding=(0, half))
    mx, my, xx, yy, xy = both.reshape(5, *x.shape)
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
