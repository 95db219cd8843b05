"""Six changes of an image, each of one visible property: contrast, saturation, hue, shape, texture, brightness.

Source: "This Looks Like That, Because ... Explaining Prototypes for Interpretable Image Recognition", arXiv 2011.02863;
strengths are those of the authors' code, which has brightness beside the paper's five. Pixels are 8-bit RGB of the
original size and nothing is random. Difference from the authors' code: changed images stay in memory, while there they
are written as JPEG and read back, so that compression noise counts as a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

__all__ = ["CHARACTERISTICS", "check_characteristics", "perturb", "perturb_all", "require_opencv"]

CHARACTERISTICS: tuple[str, ...] = ("contrast", "saturation", "hue", "shape", "texture", "brightness")
"""The properties, in the order of every axis Q."""

_LUMA = (19595, 38470, 7471)


def perturb(
    image: UInt8[Tensor, "3 H W"], characteristic: str, *, strength: float | tuple[float, float] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """An image with one property changed; every result is cut to whole levels towards zero, as PIL does.

    - contrast (0.45): towards the grey of the image's mean luma, ``g + strength (v - g)``.
    - saturation (0.7): towards each pixel's luma, ``L + strength (v - L)``.
    - hue (0.1): turned by ``trunc(255 strength)`` of 256 steps, in PIL's 8-bit HSV.
    - shape (4, 0.05): rows, then columns, rolled by ``trunc(amplitude sin(pi i frequency))``.
    - texture (4): OpenCV's non-local means, ``h = hColor = strength``; smooths fine patterns away.
    - brightness (0.8): ``strength v``.

    Args:
        image: RGB in its original size.
        characteristic: one of :data:`CHARACTERISTICS`.
        strength: as named above; for shape the pair (amplitude, frequency). ``None``: the authors' value.

    Raises:
        ValueError: an unknown characteristic, an image of another type or shape, a strength that is negative, not
            finite or no number (a pair, for shape).
        ImportError: texture without OpenCV; names the extra that brings it.

    Source:
        arXiv 2011.02863, section 3.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import perturb
        >>> image = torch.tensor([200, 100, 0], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
        >>> perturb(image, "brightness")[:, 0, 0].tolist(), perturb(image, "saturation")[:, 0, 0].tolist()
        ([160, 80, 0], [175, 105, 35])
    """
    check_characteristics((characteristic,))
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image: found {found}, needed a uint8 tensor [3, H, W] (RGB)")
    if image.numel() == 0:
        raise ValueError(f"image: found shape {tuple(image.shape)}, needed one pixel at least")
    change, default = _CHANGES[characteristic]
    return change(image, _strength(characteristic, default if strength is None else strength, default))


def perturb_all(
    image: UInt8[Tensor, "3 H W"], characteristics: Sequence[str] = CHARACTERISTICS
) -> UInt8[Tensor, "Q 3 H W"]:
    """All changes of an image at their own strengths, in the order of ``characteristics``.

    Raises:
        ValueError: as :func:`perturb`; no characteristic, or one twice.
        ImportError: texture without OpenCV.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import perturb_all
        >>> perturb_all(torch.zeros(3, 8, 8, dtype=torch.uint8), ("hue", "shape")).shape
        torch.Size([2, 3, 8, 8])
    """
    return torch.stack([perturb(image, name) for name in check_characteristics(characteristics)])


def check_characteristics(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if each is known and none comes twice.

    Raises:
        ValueError: says which are not, and which there are.
    """
    unknown = [name for name in names if name not in CHARACTERISTICS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"characteristics: found {list(names)}, needed some of {list(CHARACTERISTICS)}, none twice")
    return tuple(names)


def require_opencv() -> Any:
    """The module ``cv2``.

    Raises:
        ImportError: it is not installed; names the extra that brings it.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("texture needs OpenCV: install the extra 'texture' of proto-vision") from error
    return cv2


def _strength(name: str, value: Any, default: Any) -> Any:
    """A number at least 0 (hue: any), or two of them."""
    wanted = len(default) if isinstance(default, tuple) else 1
    try:
        parts = [float(part) for part in (value if wanted > 1 else [value])]
    except (TypeError, ValueError):
        parts = []
    signed = name in ("hue", "shape")
    if len(parts) != wanted or not all(math.isfinite(part) and (signed or part >= 0) for part in parts):
        needed = "two numbers (amplitude, frequency)" if wanted > 1 else "a number" + ("" if signed else " at least 0")
        raise ValueError(f"strength: found {value!r} for {name}, needed {needed}")
    return tuple(parts) if wanted > 1 else parts[0]


def _luma(image: Tensor) -> Tensor:
    """Brightness of every pixel as PIL's mode L has it, ``[H, W]`` int64."""
    weights = torch.tensor(_LUMA, device=image.device)
    return ((image.long() * weights[:, None, None]).sum(0) + 32768) >> 16


def _towards(ground: Tensor, image: Tensor, share: float) -> Tensor:
    """``ground + share (image - ground)`` in float32 as PIL blends, cut to whole levels."""
    ground = ground.float()
    mixed = ground + torch.tensor(share, dtype=torch.float32, device=image.device) * (image.float() - ground)
    return mixed.clamp(0, 255).to(torch.uint8)


def _contrast(image: Tensor, strength: float) -> Tensor:
    luma = _luma(image)
    grey = int(luma.sum()) / luma.numel()
    return _towards(torch.tensor(int(grey + 0.5), device=image.device), image, strength)


def _saturation(image: Tensor, strength: float) -> Tensor:
    return _towards(_luma(image), image, strength)


def _brightness(image: Tensor, strength: float) -> Tensor:
    return _towards(torch.zeros((), device=image.device), image, strength)


def _hue(image: Tensor, strength: float) -> Tensor:
    hue, saturation, value = Image.fromarray(_pixels(image)).convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int64) + math.trunc(strength * 255)) % 256
    hue = Image.fromarray(turned.astype(np.uint8))
    return _tensor(np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB")), image)


def _shape(image: Tensor, strength: tuple[float, float]) -> Tensor:
    amplitude, frequency = strength
    height, width = image.shape[1:]
    rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)

    def steps(places: Tensor) -> Tensor:
        return (amplitude * torch.sin(math.pi * places.double() * frequency)).trunc().long()

    across = (columns - steps(rows)[:, None]) % width
    rolled = image.gather(2, across.expand(3, -1, -1))
    down = (rows[:, None] - steps(columns)) % height
    return rolled.gather(1, down.expand(3, -1, -1))


def _texture(image: Tensor, strength: float) -> Tensor:
    pixels = np.ascontiguousarray(_pixels(image)[:, :, ::-1])
    smooth = require_opencv().fastNlMeansDenoisingColored(pixels, None, strength, strength, 7, 21)
    return _tensor(smooth[:, :, ::-1], image)


def _pixels(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _tensor(pixels: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(pixels).transpose(2, 0, 1).copy()).to(like.device)


_CHANGES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any]] = {
    "contrast": (_contrast, 0.45),
    "saturation": (_saturation, 0.7),
    "hue": (_hue, 0.1),
    "shape": (_shape, (4.0, 0.05)),
    "texture": (_texture, 4.0),
    "brightness": (_brightness, 0.8),
}
