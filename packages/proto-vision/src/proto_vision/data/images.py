"""Reading image files of any kind as 8-bit RGB, with errors that name the file.

Grey images get three equal channels; 16-bit images keep their upper 8 bits; palettes are looked up; transparent pixels
are laid over white. Pixels stand as stored: an EXIF orientation is not applied, since boxes and part locations of
data sets count stored pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["IMAGE_SUFFIXES", "ArrayReader", "FileReader", "find_images", "read_image", "to_rgb"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
"""Endings of the files that count as images, in lower case."""


def read_image(path: str | os.PathLike[str] | BytesIO, box: Sequence[float] | None = None) -> Image.Image:
    """An image file as 8-bit RGB.

    Args:
        path: the file, or its bytes.
        box: ``(x1, y1, x2, y2)`` in pixels, to be cut out; parts outside the image are left out.

    Raises:
        ValueError: a missing, cut, corrupt or too large file, a box without a pixel; names the file.

    Example:
        >>> import tempfile, pathlib
        >>> import numpy as np
        >>> from PIL import Image
        >>> from proto_vision.data.images import read_image
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "deep.png"
        >>> Image.fromarray(np.full((2, 3), 257 * 9, np.uint16)).save(path)
        >>> image = read_image(path)
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (3, 2), (9, 9, 9))
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = to_rgb(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"image {str(path)!r}: not an image, or one of a kind that cannot be read") from error
    except FileNotFoundError as error:
        raise ValueError(f"image {str(path)!r}: no such file") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"image {str(path)!r}: cannot be read, the file is cut or corrupt ({reason})") from error
    if box is None:
        return image
    left, top = max(int(box[0]), 0), max(int(box[1]), 0)
    right, bottom = min(int(box[2]), image.width), min(int(box[3]), image.height)
    if right <= left or bottom <= top:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"image {str(path)!r}: box {tuple(map(float, box))} holds no pixel of its {size}")
    return image.crop((left, top, right, bottom))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"found grey values from {values.min()} to {values.max()}, needed 8 or 16 bits")
        deep = image.mode.startswith("I;16") or values.max() > 255  # mode I holds 8-bit and 16-bit files alike
        return Image.fromarray((values >> 8 if deep else values).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colours = image.convert("RGBA")
        ground = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, colours).convert("RGB")
    return image.convert("RGB")


def find_images(folder: Path) -> list[Path]:
    """The image files under a folder, by ending, sorted by path; hidden files are left out."""
    found = (Path(at) / name for at, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


class FileReader:
    """Row -> image of a data set that lies in files.

    Args:
        root: the data set's folder.
        ids: paths relative to the root.
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)`` to cut out, or ``None``.
    """

    def __init__(self, root: Path, ids: Sequence[str], boxes: np.ndarray | None = None) -> None:
        self.root, self.ids, self.boxes = root, np.asarray(ids), boxes

    def __call__(self, row: int) -> Image.Image:
        """The image of a row."""
        return read_image(self.root / str(self.ids[row]), None if self.boxes is None else self.boxes[row].tolist())


class ArrayReader:
    """Row -> image of a data set that lies in memory.

    Args:
        pixels: ``[N, H, W]`` grey or ``[N, H, W, 3]``, uint8.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (3,)):
            raise ValueError(f"pixels: found {pixels.dtype} {pixels.shape}, needed uint8 [N, H, W] or [N, H, W, 3]")
        self.pixels = pixels

    def __call__(self, row: int) -> Image.Image:
        """The image of a row."""
        return Image.fromarray(self.pixels[row]).convert("RGB")
