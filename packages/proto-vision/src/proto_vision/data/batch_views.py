"""Augmented views of a whole batch at once, each image changed in its own way, on the device where the batch is.

The steps of SimCLR (ICML 2020, arXiv 2002.05709) as tensor expressions: the data modules' augmentations work image by
image in loader processes, which is what keeps a small network on a few cores waiting. Unlike theirs, a crop keeps the
image's aspect ratio, the order of the colour changes is fixed, and there is no change of hue.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["random_views"]

_GREY = (0.2989, 0.587, 0.114)


def random_views(
    images: Float[Tensor, "N channels S S"],
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    jitter: float = 0.4,
    jittered: float = 0.8,
    grey: float = 0.2,
    flip: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N channels S S"]:
    """Random crops back at full size, flipped, changed in brightness, contrast and saturation, or made grey.

    Args:
        images: pixel values in [0, 1]; 3 channels (RGB) or 1.
        scale: least and greatest share of the image's area in a crop, in (0, 1].
        jitter: each factor of brightness, contrast and saturation is drawn from ``1 - jitter`` to ``1 + jitter``.
        jittered: share of the images whose colours are changed.
        grey: share of the images without colour.
        flip: share of the images that are mirrored left to right.
        generator: of the draws, on the CPU.

    Returns:
        Pixel values in [0, 1].

    Raises:
        ValueError: another number of channels, a scale outside (0, 1] or upside down, shares outside [0, 1].

    Source:
        arXiv 2002.05709, appendix A.

    Example:
        >>> import torch
        >>> from proto_vision.data.batch_views import random_views
        >>> random_views(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: found shape {tuple(images.shape)}, needed [N, 1 or 3, S, S]")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: found {scale}, needed two shares of an area in (0, 1], the smaller first")
    for name, share in {"jitter": jitter, "jittered": jittered, "grey": grey, "flip": flip}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: found {share}, needed a number in [0, 1]")
    count = len(images)
    if not count:
        return images
    draws = torch.rand(9, count, generator=generator).to(images)

    side = (scale[0] + (scale[1] - scale[0]) * draws[0]).sqrt()
    mirrored = torch.where(draws[1] < flip, -1.0, 1.0).to(images)
    affine = images.new_zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = side * mirrored, side
    affine[:, :, 2] = ((2 * draws[2:4] - 1) * (1 - side)).T
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def factor(row: int) -> Tensor:
        change = 1 + jitter * (2 * draws[row] - 1)
        return torch.where(draws[7] < jittered, change, torch.ones_like(change)).reshape(-1, 1, 1, 1)

    views = (views * factor(4)).clamp(0, 1)
    middle = _brightness(views).mean(dim=(2, 3), keepdim=True)
    views = (middle + (views - middle) * factor(5)).clamp(0, 1)
    bright = _brightness(views)
    views = (bright + (views - bright) * factor(6)).clamp(0, 1)
    return torch.where((draws[8] < grey).reshape(-1, 1, 1, 1), _brightness(views).clamp(0, 1), views)


def _brightness(images: Tensor) -> Tensor:
    """``[N, 1, S, S]``."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(_GREY).reshape(3, 1, 1)).sum(1, keepdim=True) / math.fsum(_GREY)
