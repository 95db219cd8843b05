"""How well a heat map meets the object: inside against outside of a mask, and what deleting its peaks costs.

The four measures of ST-ProtoPNet (ICCV 2023, arXiv 2301.04011). A heat map is one that was scaled to [0, 1] and
brought to the size of the mask; several maps of one size are measured at once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from proto_core.precision import full_precision

__all__ = ["content_heatmap", "deletion_auc", "heatmap_iou", "outside_inside_ratio"]


def content_heatmap(
    heatmap: Float[Tensor, "*batch H W"], mask: Shaped[Tensor, "*batch H W"]
) -> Float[Tensor, "*batch"]:
    """Mean heat inside the mask (CH); higher is better.

    Raises:
        ValueError: shapes that differ, a mask without a pixel.

    Example:
        >>> import torch
        >>> from proto_core.metrics import content_heatmap
        >>> content_heatmap(torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([[1, 1], [0, 0]]))
        tensor(0.7500)
    """
    heat, inside = _pair(heatmap, mask)
    return _mean(heat, inside, "inside")


def outside_inside_ratio(
    heatmap: Float[Tensor, "*batch H W"], mask: Shaped[Tensor, "*batch H W"]
) -> Float[Tensor, "*batch"]:
    """Mean heat outside the mask over the mean inside (OIRR); lower is better, infinite without heat inside,
    not a number without any heat.

    Raises:
        ValueError: shapes that differ, a mask without a pixel inside or outside.

    Example:
        >>> import torch
        >>> from proto_core.metrics import outside_inside_ratio
        >>> outside_inside_ratio(torch.tensor([[1.0, 0.5], [0.3, 0.0]]), torch.tensor([[1, 1], [0, 0]]))
        tensor(0.2000)
    """
    heat, inside = _pair(heatmap, mask)
    return _mean(heat, ~inside, "outside") / _mean(heat, inside, "inside")


def heatmap_iou(
    heatmap: Float[Tensor, "*batch H W"], mask: Shaped[Tensor, "*batch H W"], threshold: float = 0.5
) -> Float[Tensor, "*batch"]:
    """Overlap of the hot area, ``heat >= threshold``, with the mask: intersection over (union + 1e-8).

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> import torch
        >>> from proto_core.metrics import heatmap_iou
        >>> heatmap_iou(torch.tensor([[1.0, 0.5], [0.3, 0.0]]), torch.tensor([[1, 0], [0, 0]]))
        tensor(0.5000)
    """
    heat, inside = _pair(heatmap, mask)
    hot = heat >= threshold
    shared, either = (hot & inside).sum(dim=(-2, -1)), (hot | inside).sum(dim=(-2, -1))
    return shared.to(heat) / (either.to(heat) + 1e-8)


def deletion_auc(scores: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch"]:
    """Area under the class's score while the hottest pixels are deleted step by step (DAUC); lower is better.

    The trapezoidal rule on steps of equal width, on an axis from 0 (nothing deleted) to 1.

    Raises:
        ValueError: fewer than two scores.

    Example:
        >>> import torch
        >>> from proto_core.metrics import deletion_auc
        >>> deletion_auc(torch.tensor([1.0, 0.5, 0.0]))
        tensor(0.5000)
    """
    if scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(f"scores: found shape {tuple(scores.shape)}, needed [..., S] with S at least 2")
    return torch.trapezoid(full_precision(scores), dim=-1) / (scores.shape[-1] - 1)


def _pair(heatmap: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if heatmap.ndim < 2 or heatmap.shape != mask.shape:
        shapes = f"{tuple(heatmap.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"heatmap, mask: found shapes {shapes}, needed [..., H, W] both")
    return full_precision(heatmap), mask != 0


def _mean(heat: Tensor, where: Tensor, side: str) -> Tensor:
    count = where.sum(dim=(-2, -1))
    empty = int((count == 0).sum())
    if empty:
        raise ValueError(f"mask: found {empty} of {count.numel()} without a pixel {side}, needed one at least")
    return heat.masked_fill(~where, 0).sum(dim=(-2, -1)) / count
