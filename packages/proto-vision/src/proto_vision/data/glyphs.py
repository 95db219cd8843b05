"""Printed letters of five alphabets, slanted and turned: 142 classes that need no download, for learning from few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from proto_vision.data.dataset import ImageTable, split_rows
from proto_vision.data.images import ArrayReader
from proto_vision.data.module import ImageDataModule

__all__ = ["Glyphs"]

_LETTERS = {
    "Armenian": "".join(chr(code) for code in range(0x561, 0x587)),
    "Cyrillic": "бвгджзийклнптцчшщъыьэюя",
    "Georgian": "".join(chr(code) for code in range(0x10D0, 0x10F1)),
    "Greek": "αβγδεζηθκλμνξπρστυφχψω",
    "Latin": "abcdefghijklmnopqrstuvwxyz",
}
_FONTS = [
    f"DejaVu{family}.ttf"
    for family in (
        *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "Serif", "Serif-Bold", "Serif-Italic"),
        *("Serif-BoldItalic", "SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
    )
]
_SIDE = 64
"""Pixels of a letter before it is brought to the model's size."""


class Glyphs(ImageDataModule):
    """Small letters in the twelve DejaVu fonts of matplotlib; each image has its own font, turn, slant, size and noise.

    Classes are named ``ALPHABET/LETTER``, so that :class:`~proto_vision.data.class_split.ClassSplit` can hold whole
    alphabets out. Without a protocol half of each class trains and half tests.

    Args:
        image_size: height and width of the model's input.
        in_channels: 1 (grey) or 3 (three equal channels).
        per_class: images of each letter.
        val_fraction: share of the training half that is held out for validation.
        seed: of the images and of the split.
        **settings: see :class:`~proto_vision.data.module.ImageDataModule`.

    Raises:
        ValueError: fewer than two images of a letter.

    Example:
        >>> from proto_vision import Glyphs
        >>> data = Glyphs(per_class=4)
        >>> len(data.class_names), data.class_names[-1], data.train_set[0].image.shape
        (142, 'Latin/z', torch.Size([1, 28, 28]))
    """

    def __init__(
        self,
        image_size: int = 28,
        in_channels: int = 1,
        per_class: int = 20,
        val_fraction: float = 0.2,
        seed: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(
            "letters of DejaVu", image_size=image_size, in_channels=in_channels, batch_size=batch_size, **settings
        )
        if per_class < 2:
            raise ValueError(f"per_class: found {per_class}, needed 2 or more")
        self.per_class, self.val_fraction, self.seed = per_class, val_fraction, seed
        self._pixels: np.ndarray | None = None

    def read_table(self) -> ImageTable:
        """Ids such as ``Greek/α/03``."""
        names = [f"{alphabet}/{letter}" for alphabet, letters in _LETTERS.items() for letter in letters]
        targets = np.repeat(np.arange(len(names)), self.per_class)
        fold = np.full(len(targets), "train", dtype="<U5")
        fold[split_rows(targets, 0.5, self.seed)] = "test"
        train = np.flatnonzero(fold == "train")
        fold[train[split_rows(targets[train], self.val_fraction, self.seed, argument="val_fraction")]] = "val"
        ids = [f"{name}/{number:02d}" for name in names for number in range(self.per_class)]
        return ImageTable(ids, targets, fold, names)

    def reader(self) -> ArrayReader:
        """Row -> 64 x 64 image, dark on light; all are drawn on first use."""
        if self._pixels is None:
            rng = np.random.default_rng(self.seed)
            fonts = _fonts()
            letters = [letter for letters in _LETTERS.values() for letter in letters for _ in range(self.per_class)]
            self._pixels = np.stack([_drawn(letter, fonts[rng.integers(len(fonts))], rng) for letter in letters])
        return ArrayReader(self._pixels)


def _fonts() -> list[Any]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [ImageFont.truetype(str(folder / name), _SIDE // 2) for name in _FONTS]


def _drawn(letter: str, font: Any, rng: np.random.Generator) -> np.ndarray:
    """A letter about the middle, through a random affine map, with noise; ``[64, 64]`` uint8."""
    middle = _SIDE / 2
    image = Image.new("L", (_SIDE, _SIDE), 255)
    ImageDraw.Draw(image).text((middle, middle), letter, fill=0, font=font, anchor="mm")
    turn, slant = np.radians(rng.uniform(-25, 25)), rng.uniform(-0.4, 0.4)
    scale = rng.uniform(0.6, 1.1, 2)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = turned @ np.array([[1, slant], [0, 1]]) * scale
    offset = middle - linear @ (middle + rng.uniform(-6, 6, 2))
    rows = (*linear[0], offset[0], *linear[1], offset[1])
    moved = image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR, fillcolor=255)
    return np.clip(np.asarray(moved) + rng.normal(0, 25, (_SIDE, _SIDE)), 0, 255).astype(np.uint8)
