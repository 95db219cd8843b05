"""Images with what is known about them: annotated parts and masks in the geometry of the model's input.

Parts and masks are those of CUB-200-2011 (:class:`~proto_vision.data.finegrained.CUB200`); any other source gives
images without them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from proto_core.metrics import rescale_part_locations
from proto_vision.data.finegrained import CUB200
from proto_vision.data.module import ImageDataModule

__all__ = ["AnnotatedBatch", "AnnotatedImages", "place_parts"]


class AnnotatedBatch(NamedTuple):
    """A batch, or without the leading ``N`` an image.

    Attributes:
        image: ``[N, channels, S, S]`` as in testing.
        target: ``[N]`` int64, class.
        row: ``[N]`` int64, row of the data set's table.
        parts: ``[N, M, 2]`` int64 ``(x, y)`` in pixels of the input; M is 0 where none are known.
        visible: ``[N, M]`` bool.
        mask: ``[N, S, S]`` bool, where the object is; ``[N, 0, 0]`` where that is not known.
    """

    image: Tensor
    target: Tensor
    row: Tensor
    parts: Tensor
    visible: Tensor
    mask: Tensor


class AnnotatedImages(Dataset[AnnotatedBatch]):
    """Rows of a data set as the model sees them, with parts and masks where the source has them.

    Args:
        data: the data set.
        rows: of its table.

    Attributes:
        part_names: of the M parts; empty where none are known.
        mask_kind: ``"silhouette"``, ``"box"``, or ``None``.

    Raises:
        ValueError: annotations that cannot be read.
    """

    def __init__(self, data: ImageDataModule, rows: Int[np.ndarray, " n"]) -> None:
        self.data, self.rows = data, rows
        self.read, self.transform = data.reader(), data.eval_transform()
        cub = data if isinstance(data, CUB200) else None
        known = cub is not None and (cub.root / "parts").is_dir()
        self.table = cub.parts() if cub is not None and known else None
        self.part_names = [] if self.table is None else self.table.names
        self.mask_kind = None if cub is None else cub.mask_kind()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> AnnotatedBatch:
        row, size = int(self.rows[position]), self.data.image_size
        image = self.read(row)
        parts, visible = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
        mask = torch.zeros(0, 0, dtype=torch.bool)
        if self.table is not None:
            boxes = self.data.table.boxes
            box = (0, 0, *image.size) if boxes is None else tuple(boxes[row].tolist())
            places, seen = (torch.from_numpy(values[row]) for values in (self.table.locations, self.table.visible))
            parts, inside = place_parts(places, box, size, self.data.resize)
            visible = seen & inside
        if self.mask_kind is not None:
            assert isinstance(self.data, CUB200)
            grey = F.pil_to_tensor(self.data.geometry()(self.data.mask(row)))
            mask = grey[0] >= 128
        target = torch.tensor(int(self.data.table.targets[row]))
        return AnnotatedBatch(self.transform(image), target, torch.tensor(row), parts, visible, mask)


def place_parts(
    parts: Int[Tensor, "M 2"], box: tuple[int, ...], size: int, resize: str = "stretch"
) -> tuple[Int[Tensor, "M 2"], Tensor]:
    """Where parts of a stored image come to lie in the model's input.

    Args:
        parts: ``(x, y)`` in pixels of the stored image.
        box: ``(x1, y1, x2, y2)`` that is cut out of it.
        size: S, width and height of the input.
        resize: of the data module: both sides ``"stretch"`` to S, or the shorter one to 256/224 S, then the middle.

    Returns:
        ``(x, y)`` in pixels of the input, and which parts it can show: all where nothing is cut off.

    Example:
        >>> import torch
        >>> from proto_vision.quality.samples import place_parts
        >>> place_parts(torch.tensor([[15, 30]]), (10, 20, 20, 40), 224)[0]
        tensor([[112, 112]])
        >>> parts = torch.tensor([[0, 50], [100, 50]])  # at the left edge, and in the middle
        >>> place_parts(parts, (0, 0, 200, 100), 224, "crop")
        (tensor([[-144,  112],
                [ 112,  112]]), tensor([False,  True]))
    """
    corners = torch.tensor(box)
    if resize == "stretch":
        placed = rescale_part_locations(parts[None], corners[None], size)[0]
        return placed, torch.ones(len(parts), dtype=torch.bool)
    width, height = int(corners[2] - corners[0]), int(corners[3] - corners[1])
    short = round(size * 256 / 224)
    long = int(short * max(width, height) / min(width, height))
    whole = torch.tensor([long, short] if width > height else [short, long])
    margin = ((whole - size) / 2).round().long()
    extent = torch.tensor([width, height])
    placed = ((parts - corners[:2]).double() / extent * whole).trunc().long() - margin
    return placed, ((placed >= 0) & (placed < size)).all(1)
