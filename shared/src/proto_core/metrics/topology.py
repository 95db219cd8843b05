"""Does a mask have the right number of pieces and holes: Betti numbers and their errors, overlap, surface, centre line.

The measures of TopoMortar (BMVC 2025, arXiv 2503.03365): the foreground is 8-connected, the background 4-connected.
Unlike in the authors' code an empty mask has no component, and an empty prediction is infinitely far away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure, label
from skimage.morphology import skeletonize
from torch import Tensor
from torchmetrics import Metric

from proto_core.checks import check_positive

__all__ = ["BettiError", "betti_error", "betti_error_local", "betti_numbers", "cldice_score", "dice_score", "hd95"]

CROSS = generate_binary_structure(2, 1)
EIGHT = generate_binary_structure(2, 2)


def betti_numbers(mask: Shaped[Tensor, "H W"]) -> Int[Tensor, "2"]:
    """Number of components (8-connected) and of holes (4-connected background that does not reach the outside).

    Raises:
        ValueError: no ``[H, W]``.

    Example:
        >>> import torch
        >>> from proto_core.metrics import betti_numbers
        >>> ring = torch.ones(3, 3)
        >>> ring[1, 1] = 0
        >>> betti_numbers(ring)
        tensor([1, 1])
    """
    if mask.ndim != 2:
        raise ValueError(f"mask: found shape {tuple(mask.shape)}, needed [H, W]")
    return torch.from_numpy(_betti((mask != 0).cpu().numpy())).to(mask.device)


def betti_error(pred: Shaped[Tensor, "N H W"], target: Shaped[Tensor, "N H W"]) -> Int[Tensor, "N 2"]:
    """Absolute difference of the Betti numbers of each pair of masks.

    Raises:
        ValueError: shapes that differ or are not ``[N, H, W]``.

    Example:
        >>> import torch
        >>> from proto_core.metrics import betti_error
        >>> two = torch.tensor([[[1, 0, 1]]])
        >>> betti_error(two, torch.ones_like(two))
        tensor([[1, 0]])
    """
    one, two = _masks(pred, target)
    found = [np.abs(_betti(a) - _betti(b)) for a, b in zip(one, two)]
    return torch.from_numpy(np.stack(found)).to(pred.device)


def betti_error_local(
    pred: Shaped[Tensor, "N H W"], target: Shaped[Tensor, "N H W"], window: int = 128
) -> Float[Tensor, "N 2"]:
    """Mean of the Betti errors of windows of the masks; the last windows of a row or column may be smaller.

    Raises:
        ValueError: shapes that differ or are not ``[N, H, W]``, a window below 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import betti_error_local
        >>> two = torch.tensor([[[1, 0, 1, 1]]])
        >>> betti_error_local(two, torch.ones_like(two), window=2)
        tensor([[0., 0.]])
    """
    check_positive(window=window)
    one, two = _masks(pred, target)
    height, width = one.shape[1:]
    tiles = [
        (slice(None), slice(r, r + window), slice(c, c + window))
        for r in range(0, height, window)
        for c in range(0, width, window)
    ]
    errors = [[np.abs(_betti(a) - _betti(b)) for a, b in zip(one[tile], two[tile])] for tile in tiles]
    return torch.from_numpy(np.mean(errors, axis=0)).float().to(pred.device)


def dice_score(pred: Shaped[Tensor, "N H W"], target: Shaped[Tensor, "N H W"]) -> Float[Tensor, "N"]:
    """``2 |A and B| / (|A| + |B|)`` of each pair of masks; 1 where both are empty.

    Raises:
        ValueError: shapes that differ or are not ``[N, H, W]``.

    Example:
        >>> import torch
        >>> from proto_core.metrics import dice_score
        >>> dice_score(torch.tensor([[[1, 1, 0]]]), torch.tensor([[[0, 1, 0]]])).round(decimals=4)
        tensor([0.6667], dtype=torch.float64)
    """
    _check(pred, target)
    a, b = pred != 0, target != 0
    both, either = (a & b).sum(dim=(1, 2)).double(), (a.sum(dim=(1, 2)) + b.sum(dim=(1, 2))).double()
    return torch.where(either > 0, 2 * both / either.clamp_min(1), 1.0)


def hd95(
    pred: Shaped[Tensor, "N H W"], target: Shaped[Tensor, "N H W"], spacing: Sequence[float] = (1, 1)
) -> Float[Tensor, "N"]:
    """95th percentile of the distances between the surfaces of two masks, both directions pooled.

    The surface is what erosion by the 4-neighbour cross takes away. 0 where both masks are empty, infinite where one
    is.

    Args:
        pred: masks.
        target: masks.
        spacing: height and width of a pixel; the result has its unit.

    Raises:
        ValueError: shapes that differ or are not ``[N, H, W]``, spacing that is not two positive numbers.

    Example:
        >>> import torch
        >>> from proto_core.metrics import hd95
        >>> hd95(torch.tensor([[[1, 0, 0, 0]]]), torch.tensor([[[0, 0, 0, 1]]]), spacing=(1, 0.5))
        tensor([1.5000], dtype=torch.float64)
    """
    if len(spacing) != 2 or not all(size > 0 for size in spacing):
        raise ValueError(f"spacing: found {tuple(spacing)}, needed two positive numbers")
    one, two = _masks(pred, target)
    return torch.tensor([_hd95(a, b, spacing) for a, b in zip(one, two)], dtype=torch.float64, device=pred.device)


def cldice_score(pred: Shaped[Tensor, "N H W"], target: Shaped[Tensor, "N H W"]) -> Float[Tensor, "N"]:
    """Harmonic mean of how much of each mask's skeleton lies in the other mask; 1 where both are empty.

    Raises:
        ValueError: shapes that differ or are not ``[N, H, W]``.

    Source:
        clDice (arXiv 2003.07311), with scikit-image's skeletons.

    Example:
        >>> import torch
        >>> from proto_core.metrics import cldice_score
        >>> bar = torch.ones(1, 3, 9)
        >>> cldice_score(bar, bar)
        tensor([1.], dtype=torch.float64)
    """
    one, two = _masks(pred, target)
    return torch.tensor([_cldice(a, b) for a, b in zip(one, two)], dtype=torch.float64, device=pred.device)


class BettiError(Metric):
    """Mean Betti errors over all batches: ``"betti0"`` of components, ``"betti1"`` of holes; exact for any split.

    Args:
        window: measure windows of this side; ``None``: whole images.

    Raises:
        ValueError: a window below 1; on ``update``: shapes that do not fit; on ``compute``: no image.

    Example:
        >>> import torch
        >>> from proto_core.metrics import BettiError
        >>> metric = BettiError()
        >>> metric.update(torch.tensor([[[1, 0, 1]]]), torch.tensor([[[1, 1, 1]]]))
        >>> metric.compute()
        {'betti0': 1.0, 'betti1': 0.0}
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if window is not None:
            check_positive(window=window)
        self.window = window
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Shaped[Tensor, "N H W"], target: Shaped[Tensor, "N H W"]) -> None:
        """Add masks."""
        found = betti_error(pred, target) if self.window is None else betti_error_local(pred, target, self.window)
        self.total += found.double().sum(dim=0)
        self.images += len(found)

    def compute(self) -> dict[str, float]:
        """Both means."""
        if not bool(self.images > 0):
            raise ValueError("BettiError: found no image, needed one at least")
        components, holes = (self.total / self.images).tolist()
        return {"betti0": components, "betti1": holes}


def _check(pred: Tensor, target: Tensor) -> None:
    if pred.ndim != 3 or pred.shape != target.shape or len(pred) == 0:
        shapes = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred, target: found shapes {shapes}, needed [N, H, W] both, N at least 1")


def _masks(pred: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    _check(pred, target)
    return (pred != 0).cpu().numpy(), (target != 0).cpu().numpy()


def _betti(mask: np.ndarray) -> np.ndarray:
    components = label(mask, structure=EIGHT)[1]
    background = label(np.pad(~mask, 1, constant_values=True), structure=CROSS)[1]
    return np.array([components, background - 1], dtype=np.int64)


def _hd95(one: np.ndarray, two: np.ndarray, spacing: Sequence[float]) -> float:
    if not one.any() and not two.any():
        return 0.0
    if not one.any() or not two.any():
        return float("inf")
    surfaces = [mask ^ binary_erosion(mask, CROSS) for mask in (one, two)]
    away = [distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    return float(np.percentile(np.concatenate([away[1][surfaces[0]], away[0][surfaces[1]]]), 95))


def _cldice(one: np.ndarray, two: np.ndarray) -> float:
    if not one.any() and not two.any():
        return 1.0
    if not one.any() or not two.any():
        return 0.0
    skeletons = [skeletonize(mask) for mask in (one, two)]
    precision = (skeletons[0] & two).sum() / skeletons[0].sum()
    sensitivity = (skeletons[1] & one).sum() / skeletons[1].sum()
    both = precision + sensitivity
    return float(2 * precision * sensitivity / both) if both > 0 else 0.0
