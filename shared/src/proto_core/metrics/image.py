"""How alike two images are: peak signal-to-noise ratio and structural similarity, values in [0, 1]."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from proto_core.precision import full_precision
from proto_core.structural import ssim_map

__all__ = ["psnr", "ssim"]


def psnr(pred: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"], eps: float = 1e-10) -> Float[Tensor, ""]:
    """``-10 log10(mean of (pred - target)^2 + eps)`` over the whole tensor, in decibel.

    Args:
        pred: values in [0, 1].
        target: values in [0, 1].
        eps: added to the mean; 100 dB is the most at the default.

    Raises:
        ValueError: shapes that differ, no element.

    Example:
        >>> import torch
        >>> from proto_core.metrics import psnr
        >>> psnr(torch.zeros(2), torch.full((2,), 0.1)).round(decimals=3)
        tensor(20.)
    """
    if pred.shape != target.shape or pred.numel() == 0:
        shapes = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred, target: found shapes {shapes}, needed equal ones with an element")
    error = (full_precision(pred) - full_precision(target)).square().mean()
    return -10 * (error + eps).log10()


def ssim(pred: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Mean structural similarity: Gaussian window of 11 and sigma 1.5, zeros beyond the border, every channel alike.

    Not the form that cuts the border off (scikit-image).

    Raises:
        ValueError: shapes that differ or are not ``[B, C, H, W]``.

    Example:
        >>> import torch
        >>> from proto_core.metrics import ssim
        >>> x = torch.rand(1, 3, 16, 16)
        >>> ssim(x, x).round(decimals=4)
        tensor(1.)
    """
    return ssim_map(pred, target).mean()
