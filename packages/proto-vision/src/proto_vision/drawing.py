"""Pictures of matches for a web page: an image with the matching part framed, its heat map, and the part alone.

Pictures are PNG in the page itself. Small images are enlarged in whole steps, so that every pixel stays a square.
"""

from __future__ import annotations

import base64
import io
from typing import Literal

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from PIL import Image, ImageDraw
from torch.nn import functional as F

__all__ = ["draw_heat", "draw_image", "draw_part", "embed"]

Location = tuple[tuple[int, int], tuple[int, int]]
SIDE = 224
FRAME = (255, 214, 0)
EDGE = (20, 20, 20)


def embed(image: Image.Image, alt: str, kind: Literal["png", "jpeg"] = "png") -> Markup:
    """An image as markup that holds its bytes; the text for those who cannot see it is escaped."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True)
    words = {"data": base64.b64encode(buffer.getvalue()).decode("ascii"), "kind": kind, "alt": alt}
    tag = Markup('<img src="data:image/{kind};base64,{data}" alt="{alt}" width="{w}" height="{h}">')
    return tag.format(w=image.width, h=image.height, **words)


def draw_image(image: Image.Image, box: Location | None, alt: str) -> Markup:
    """The image, with a frame around the part.

    Args:
        image: RGB.
        box: ``(start, length)`` of rows and of columns, in the image's pixels; ``None`` draws no frame.
        alt: what the picture shows.
    """
    scale = _scale(image)
    large = _enlarged(image, scale)
    return embed(_framed(large, box, scale) if box is not None else large, alt)


def draw_heat(image: Image.Image, heat: Float[torch.Tensor, "h w"], box: Location | None, alt: str) -> Markup:
    """The image under a map of similarities, from its lowest to its highest value, with a frame around the part."""
    scale = _scale(image)
    large = _enlarged(image, scale)
    values = F.interpolate(
        heat.detach().float().cpu()[None, None], size=(large.height, large.width), mode="bicubic", align_corners=False
    )[0, 0]
    low, high = values.min(), values.max()
    share = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).numpy()
    colours = (matplotlib.colormaps["viridis"](share)[..., :3] * 255).astype(np.uint8)
    grey = large.convert("L").convert("RGB")
    mixed = Image.blend(grey, Image.fromarray(colours), 0.55)
    return embed(_framed(mixed, box, scale) if box is not None else mixed, alt)


def draw_part(image: Image.Image, box: Location, alt: str) -> Markup:
    """The part alone, enlarged."""
    (top, height), (left, width) = box
    part = image.crop((left, top, left + max(width, 1), top + max(height, 1)))
    return embed(_enlarged(part, _scale(part, SIDE // 2)), alt)


def _scale(image: Image.Image, side: int = SIDE) -> int:
    """How many times an image is enlarged so that its longer side is about ``side``."""
    return max(1, round(side / max(image.size)))


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return image.convert("RGB")
    return image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _framed(image: Image.Image, box: Location, scale: int) -> Image.Image:
    framed = image.copy()
    (top, height), (left, width) = box
    corners = [left * scale, top * scale, (left + width) * scale - 1, (top + height) * scale - 1]
    brush = ImageDraw.Draw(framed)
    brush.rectangle(corners, outline=EDGE, width=5)
    brush.rectangle([corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1], outline=FRAME, width=3)
    return framed
