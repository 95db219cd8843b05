"""Where similarity maps are highest once they are enlarged to the image, without enlarging all of each map.

Bicubic enlargement is linear along either axis, so that a bound of every block of pixels is cheap: of each row of the
map the largest and the smallest value in the block's columns, combined with the positive and the negative weights of
the other axis. Only the most promising blocks are computed; a map whose others are not clearly below the best pixel
(one that is flat, say) is computed whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from proto_core.checks import CACHED, check_positive
from proto_core.precision import full_precision, no_autocast

__all__ = ["map_peaks"]

BLOCK = 16
"""Side of a block, in pixels."""
KEPT = 8
"""Blocks of a map that are computed at first."""


def map_peaks(maps: Float[Tensor, "N K h w"], img_size: int) -> Int[Tensor, "N K 2"]:
    """Where each map is highest, as ``(x, y)`` in pixels of the image: the first maximum row by row.

    Maps are brought to the size of the image by bicubic interpolation (a = -0.75, half-pixel centres). Pixels that
    differ by no more than the rounding of that interpolation are equal.

    Args:
        maps: similarity maps.
        img_size: width and height of the image.

    Raises:
        ValueError: maps that are not ``[N, K, h, w]`` with a place, a size below 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import map_peaks
        >>> maps = torch.zeros(1, 1, 4, 4)
        >>> maps[0, 0, 0, 3] = 1.0
        >>> map_peaks(maps, 4)
        tensor([[[3, 0]]])
    """
    check_positive(img_size=img_size)
    if maps.ndim != 4 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: found shape {tuple(maps.shape)}, needed [N, K, h, w]")
    single = full_precision(maps).flatten(0, 1)
    single = single - single.amax(dim=(1, 2), keepdim=True)  # rounding is then that of the contrast, not of the level
    coarse = max(maps.shape[2:]) * 4 <= img_size
    cached = CACHED.get(maps.device.type, CACHED["cuda"])
    at_once = max(1, cached // (img_size * (BLOCK if coarse else img_size)))
    find = _found_in_blocks if coarse else _found_whole
    with no_autocast(single):
        places = [find(part, img_size) for part in single.split(at_once)]
    peak = torch.cat(places).view(maps.shape[:2])
    return torch.stack([peak % img_size, peak // img_size], dim=-1)


def _slack(maps: Tensor) -> Float[Tensor, " B"]:
    """What rounding can make of a pixel."""
    return maps.abs().amax(dim=(1, 2)) * 4 * torch.finfo(maps.dtype).eps


def _found_whole(maps: Float[Tensor, "B h w"], size: int) -> Int[Tensor, " B"]:
    """The peak's place, row by row, of maps that are enlarged whole."""
    large = F.interpolate(maps[:, None], (size, size), mode="bicubic", align_corners=False).flatten(1)
    tied = large >= (large.amax(1) - _slack(maps))[:, None]
    return tied.to(torch.uint8).argmax(1)


def _weights(length: int, size: int, like: Tensor) -> Float[Tensor, "pixels length"]:
    """What each value of a line adds to each pixel of the enlarged line; pixels beyond the last block's end are 0."""
    unit = torch.eye(length, dtype=like.dtype, device=like.device)[None, None]
    weights = F.interpolate(unit, (size, length), mode="bicubic", align_corners=False)[0, 0]
    return F.pad(weights, (0, 0, 0, -size % BLOCK))


def _found_in_blocks(maps: Float[Tensor, "B h w"], size: int) -> Int[Tensor, " B"]:
    """The same, block by block where that can be told from the bounds."""
    down, across = _weights(maps.shape[1], size, maps), _weights(maps.shape[2], size, maps)
    blocks = len(down) // BLOCK
    rows = (maps @ across.T).unflatten(2, (blocks, BLOCK))  # [B, h, blocks, BLOCK]: the map's rows, enlarged
    high, low = rows.amax(3), rows.amin(3)
    ends = torch.cat([high, low], 1).transpose(0, 1).flatten(1)  # [2 h, B blocks]
    bound = torch.cat([down.clamp_min(0), down.clamp_max(0)], 1) @ ends  # [pixel rows, B blocks]
    bound = bound.unflatten(0, (blocks, BLOCK)).amax(1).unflatten(1, (len(maps), blocks)).transpose(0, 1).flatten(1)
    best = bound.topk(min(KEPT + 1, blocks**2), dim=1)
    chosen = best.indices[:, :KEPT]
    line, column = chosen // blocks, chosen % blocks
    each = torch.arange(len(maps), device=maps.device)[:, None]
    strips = rows.transpose(1, 2)[each, column]  # [B, KEPT, h, BLOCK]
    parts = down.unflatten(0, (blocks, BLOCK))[line]  # [B, KEPT, BLOCK, h]
    values = parts @ strips  # [B, KEPT, BLOCK, BLOCK]
    inside = torch.arange(BLOCK, device=maps.device, dtype=torch.int32)
    line, column = line.int(), column.int()
    y, x = line[:, :, None] * BLOCK + inside, column[:, :, None] * BLOCK + inside
    if size % BLOCK:
        values = values.masked_fill(((y >= size)[:, :, :, None] | (x >= size)[:, :, None, :]), -torch.inf)
    slack = _slack(maps)
    top = values.amax(dim=(1, 2, 3))
    place = y[:, :, :, None] * size + x[:, :, None, :]
    tied = values >= (top - slack)[:, None, None, None]
    found = place.masked_fill(~tied, size**2).flatten(1).amin(1).long()
    rest = best.values[:, KEPT:].amax(1) if best.values.shape[1] > KEPT else top.new_full(top.shape, -torch.inf)
    unsure = ~(rest < top - 8 * slack)
    if bool(unsure.any()):
        found[unsure] = _found_whole(maps[unsure], size)
    return found
