"""Changes of training images by name. Each takes an 8-bit RGB image and gives one of the model's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

__all__ = ["AUGMENTATIONS", "Augmentation", "augmentation"]

Augmentation = Literal[
    "none",
    "flip",
    "affine",
    "crop",
    "trivial",
    "shift",
    "simclr",
    "contrast",
    "strong",
    "window",
    "tilt",
    "jitter",
    "wide",
    "zoom",
]

_SIMCLR_JITTER = (0.4, 0.4, 0.4, 0.1)
_STRONG_JITTER = (0.4, 0.4, 0.4, 0.4)


def _crop(size: int, scale: tuple[float, float] = (0.08, 1.0)) -> list[Any]:
    return [v2.RandomResizedCrop(size, scale=scale, antialias=True), v2.RandomHorizontalFlip()]


def _lit(image: Image.Image) -> Image.Image:
    """Every pixel brighter or darker by one value, up to a fifth of the range."""
    shift = round(255 * (0.4 * float(torch.rand(())) - 0.2))
    return image.point(lambda value: min(max(value + shift, 0), 255))


_STEPS: dict[str, Callable[[list[Any], int], list[Any]]] = {
    "none": lambda geometry, size: geometry,
    "flip": lambda geometry, size: [*geometry, v2.RandomHorizontalFlip()],
    "affine": lambda geometry, size: [
        *geometry,
        v2.RandomAffine(25, shear=(-15, 15, -15, 15)),
        v2.RandomHorizontalFlip(),
    ],
    "crop": lambda geometry, size: _crop(size),
    "trivial": lambda geometry, size: [*geometry, v2.TrivialAugmentWide(), v2.RandomHorizontalFlip()],
    "shift": lambda geometry, size: [*geometry, v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()],
    "simclr": lambda geometry, size: [
        *_crop(size, (0.2, 1.0)),
        v2.RandomApply([v2.ColorJitter(*_SIMCLR_JITTER)], p=0.8),
        v2.RandomGrayscale(0.2),
    ],
    "contrast": lambda geometry, size: [
        *_crop(size),
        v2.RandomApply([v2.ColorJitter(*_SIMCLR_JITTER)], p=0.8),
        v2.RandomGrayscale(0.2),
    ],
    "strong": lambda geometry, size: [
        *_crop(size, (0.2, 1.0)),
        v2.RandomGrayscale(0.2),
        v2.ColorJitter(*_STRONG_JITTER),
    ],
    "window": lambda geometry, size: [
        v2.Resize(round(size * 8 / 7), interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomCrop(size),
        v2.RandomHorizontalFlip(),
    ],
    "jitter": lambda geometry, size: [
        *geometry,
        v2.RandomCrop(size, padding=size // 8),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(*_SIMCLR_JITTER[:3]),
    ],
    "wide": lambda geometry, size: _crop(size, (0.16, 1.0)),
    "zoom": lambda geometry, size: [
        *geometry,
        v2.Pad(max(size // 8, 1), padding_mode="edge"),
        v2.RandomAffine(0, scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR),
        v2.CenterCrop(size),
        v2.Lambda(_lit),
    ],
    "tilt": lambda geometry, size: [
        *geometry,
        v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR),
    ],
}
AUGMENTATIONS: tuple[str, ...] = tuple(_STEPS)
"""The names that :func:`augmentation` knows."""


def augmentation(name: str, geometry: Sequence[Any], size: int) -> list[Any]:
    """The steps of a training image: ``geometry`` brings it to the model's size as in testing.

    Args:
        name: ``"none"``; ``"flip"`` (horizontal); ``"affine"`` (turns of 25 and shears of 15 degrees, flip);
            ``"crop"`` (random resized crop of 8 % to all of the area, flip); ``"trivial"`` (TrivialAugment, flip);
            ``"shift"`` (padded by an eighth and cropped back, flip: CIFAR's usual one); ``"simclr"`` (crop of 20 % to
            all, flip, colour jitter of 0.4, 0.4, 0.4, 0.1 with probability 0.8, grey with 0.2);
            ``"contrast"`` (the same with crops of 8 % to all); ``"strong"`` (crop of 20 % to all, flip, grey with 0.2,
            colour jitter of 0.4 in all four); ``"window"`` (shorter side to 8/7 of
            the size, random crop, flip: ProtoGCD's); ``"tilt"`` (turns of 10 degrees, shifts and scales of 10 %, no
            flip: for characters); ``"jitter"`` (as ``"shift"``, then brightness, contrast and saturation of
            0.4: OPL's); ``"wide"`` (random resized crop of 16 % to all, flip: metric learning's); ``"zoom"`` (scales of
            10 %, brightness shifted by up to a fifth of the range, no flip: Prob-PSENN's for colour).
        geometry: steps of a test image.
        size: height and width of the result, in pixels.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _STEPS:
        raise ValueError(f"augment: found {name!r}, needed one of {AUGMENTATIONS}")
    return _STEPS[name](list(geometry), size)
