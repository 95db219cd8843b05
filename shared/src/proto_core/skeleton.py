"""Skeletons of masks: soft (differentiable), by Euler characteristic, and thickened to a tube.

What the topology losses and measures share, in the forms of TopoMortar (BMVC 2025, arXiv 2503.03365): the soft skeleton
of clDice, the skeleton of cbDice (the two-dimensional case of Menten et al.), the tube of Skeleton Recall.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from scipy.ndimage import binary_dilation, generate_binary_structure
from skimage.morphology import skeletonize
from torch import Tensor
from torch.nn import functional as F

__all__ = ["euler_skeleton", "soft_skeleton", "tubed_skeleton"]

CROSS = generate_binary_structure(2, 1)


def soft_skeleton(prob: Float[Tensor, "B C H W"], iterations: int) -> Float[Tensor, "B C H W"]:
    """What erosion and opening leave of a probability map, with gradient; 1 on the middle line of a thick stroke.

    Args:
        prob: values in [0, 1].
        iterations: erosions; half the width of the thickest stroke.

    Raises:
        ValueError: no four axes, negative iterations.

    Source:
        clDice (arXiv 2003.07311), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.skeleton import soft_skeleton
        >>> bar = torch.zeros(1, 1, 7, 9)
        >>> bar[..., 2:5, 1:8] = 1
        >>> soft_skeleton(bar, 2)[0, 0, 3].tolist()
        [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    if prob.ndim != 4 or iterations < 0:
        raise ValueError(
            f"prob, iterations: found shape {tuple(prob.shape)} and {iterations}, needed [B, C, H, W], 0.."
        )
    skeleton = (prob - _dilate(_erode(prob))).relu()
    for _ in range(iterations):
        prob = _erode(prob)
        rest = (prob - _dilate(_erode(prob))).relu()
        skeleton = skeleton + (rest - skeleton * rest).relu()
    return skeleton


def _erode(x: Tensor) -> Tensor:
    return torch.minimum(-F.max_pool2d(-x, (3, 1), 1, (1, 0)), -F.max_pool2d(-x, (1, 3), 1, (0, 1)))


def _dilate(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


@torch.no_grad()
def euler_skeleton(mask: Shaped[Tensor, "B 1 H W"], iterations: int = 5) -> Shaped[Tensor, "B 1 H W"]:
    """Peel simple pixels off a mask, sparing end points; components and holes stay.

    In each iteration, with the end points (at most one of 8 neighbours set) as they were at its start, four passes over
    the pixels of one parity of row and column each take all simple pixels away at once. A pixel is simple where the
    number of empty 4-neighbours minus the number of 2 x 2 squares whose other three pixels are empty is 1.

    Args:
        mask: zero is background, outside too.
        iterations: layers to peel.

    Returns:
        0 and 1 in the mask's type.

    Raises:
        ValueError: no ``[B, 1, H, W]``, negative iterations.

    Example:
        >>> import torch
        >>> from proto_core.skeleton import euler_skeleton
        >>> bar = torch.zeros(1, 1, 7, 9, dtype=torch.long)
        >>> bar[..., 2:5, 1:8] = 1
        >>> int(euler_skeleton(bar).sum()) < int(bar.sum())
        True
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or iterations < 0:
        raise ValueError(
            f"mask, iterations: found shape {tuple(mask.shape)} and {iterations}, needed [B, 1, H, W], 0.."
        )
    state = F.pad((mask != 0)[:, 0], (1, 1, 1, 1))
    rows = (torch.arange(mask.shape[2], device=mask.device) + 1) % 2
    columns = (torch.arange(mask.shape[3], device=mask.device) + 1) % 2
    for _ in range(iterations):
        end = sum(n.long() for n in _ring(state)) <= 1
        for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
            ring = [~n for n in _ring(state)]  # from the upper left, clockwise
            straight = sum(n.long() for n in ring[1::2])
            squares = sum((ring[i - 1] & ring[i] & ring[(i + 1) % 8]).long() for i in range(0, 8, 2))
            turn = (rows == row).unsqueeze(1) & (columns == column)
            gone = (straight - squares == 1) & ~end & turn
            state[:, 1:-1, 1:-1] &= ~gone
    return state[:, 1:-1, 1:-1].unsqueeze(1).to(mask.dtype)


def _ring(state: Tensor) -> list[Tensor]:
    """The eight neighbours of the inner pixels, from the upper left, clockwise."""
    height, width = state.shape[1] - 2, state.shape[2] - 2
    places = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
    return [state[:, r : r + height, c : c + width] for r, c in places]


def tubed_skeleton(target: Int[Tensor, "B 1 H W"]) -> Int[Tensor, "B 1 H W"]:
    """The thinned mask (Zhang and Suen), dilated twice by the 4-neighbour cross, within the mask.

    Computed on the host.

    Raises:
        ValueError: no ``[B, 1, H, W]``.

    Source:
        Skeleton Recall (arXiv 2404.03010), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.skeleton import tubed_skeleton
        >>> tubed_skeleton(torch.zeros(1, 1, 4, 4, dtype=torch.long)).sum()
        tensor(0)
    """
    if target.ndim != 4 or target.shape[1] != 1:
        raise ValueError(f"target: found shape {tuple(target.shape)}, needed [B, 1, H, W]")
    masks = (target != 0)[:, 0].cpu().numpy()
    tubes = [binary_dilation(skeletonize(mask), CROSS, iterations=2) & mask for mask in masks]
    return torch.stack([torch.from_numpy(tube) for tube in tubes]).unsqueeze(1).to(target)
