"""Segmentation losses that count: warping, persistent components, and connectivity of windows.

The three losses of TopoMortar (BMVC 2025, arXiv 2503.03365) whose topological part is found on the host and held
constant: Warping (homotopy warping), TopoLoss (persistent homology of dimension 0), TopoWin (TOPO there: regression of
distances with a connectivity term, MALIS). The authors' code takes the background for the truth in the first two, has
components of both kinds 8-connected, applies softmax twice and leaves out offsets of tiles; the formulas here are the
corrected ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import binary_dilation, generate_binary_structure, label
from torch import Tensor, nn

from proto_core.checks import check_positive
from proto_core.losses.segmentation import TINY, SegmentationLoss, check_segmentation, distance_to_background
from proto_core.losses.spanning import component_pairs, spanning_pairs
from proto_core.precision import full_precision

__all__ = ["TopoLoss", "TopoWinLoss", "WarpingLoss"]

CROSS = generate_binary_structure(2, 1)
EIGHT = generate_binary_structure(2, 2)


class WarpingLoss(SegmentationLoss):
    """Dice, and cross entropy at the pixels where prediction and truth differ in topology.

    The hard prediction is changed pixel by pixel towards the truth wherever that leaves the topology as it is, and the
    truth towards the prediction; where a difference stays, the pixel is critical:
    ``Dice + lambd * (-mean of critical * sum_c t log(p + 1e-15))``. Minutes per thousand images of 512 x 512: switch it
    on late (``active``).

    Args:
        lambd: weight of the critical pixels.
        weights: of the two classes in Dice; ``None``: 1.

    Attributes:
        active: ``False``: Dice alone.

    Source:
        Homotopy warping (arXiv 2112.07812), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.losses import WarpingLoss
        >>> WarpingLoss()(torch.randn(1, 2, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.long)).ndim
        0
    """

    def __init__(self, lambd: float = 0.1, weights: Any = None) -> None:
        super().__init__(weights)
        self.lambd = lambd
        self.active = True

    def extra_repr(self) -> str:
        """Settings."""
        return f"lambd={self.lambd}, active={self.active}"

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch; critical pixels are found on the host."""
        p, t = self._read(logits, target)
        loss = self.dice(p, t)
        if not self.active:
            return loss
        hard, true = (p[:, 1] > p[:, 0]).cpu().numpy(), (target[:, 0] == 1).cpu().numpy()
        critical = np.stack([_critical(one, two) for one, two in zip(hard, true)])
        wrong = -(t * (p + TINY).log()).sum(dim=1)
        return loss + self.lambd * (wrong * torch.from_numpy(critical).to(p)).mean()


class TopoLoss(SegmentationLoss):
    """Cross entropy, and a pull on the pixels where superfluous components begin and end.

    In each tile the components of the foreground probability q appear and merge as a threshold falls (persistent
    homology of dimension 0). The most persistent ones, as many as the truth has, are kept apart; the others, from
    ``persistence_threshold`` on, are merged: ``CE + lambd * mean (q w - r)^2`` with constant w and r.

    Args:
        lambd: weight of the topological term.
        topo_size: side of a tile.
        persistence_threshold: components below are left alone.
        weights: of the two classes in cross entropy; ``None``: 1.

    Attributes:
        active: ``False``: cross entropy alone.

    Raises:
        ValueError: a tile smaller than 1.

    Source:
        TopoLoss (arXiv 1906.05404), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.losses import TopoLoss
        >>> TopoLoss()(torch.randn(1, 2, 16, 16), torch.eye(16, dtype=torch.long)[None, None]).ndim
        0
    """

    def __init__(
        self,
        lambd: float = 100.0,
        topo_size: int = 50,
        persistence_threshold: float = 0.03,
        weights: Any = None,
    ) -> None:
        super().__init__(weights)
        check_positive(topo_size=topo_size)
        self.lambd = lambd
        self.topo_size = topo_size
        self.persistence_threshold = persistence_threshold
        self.active = True

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"lambd={self.lambd}, topo_size={self.topo_size}, "
            f"persistence_threshold={self.persistence_threshold}, active={self.active}"
        )

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch; components are found on the host."""
        p, t = self._read(logits, target)
        loss = self.cross_entropy(p, t)
        if not self.active:
            return loss
        q = p[:, 1]
        values, true = q.detach().cpu().numpy(), (target[:, 0] == 1).cpu().numpy()
        weight, reference = np.zeros_like(values), np.zeros_like(values)
        for image in range(len(values)):
            for tile in _tiles(values[image], self.topo_size):
                self._mark(values[image][tile], true[image][tile], weight[image][tile], reference[image][tile])
        pull = (q * torch.from_numpy(weight).to(q) - torch.from_numpy(reference).to(q)).square().mean()
        return loss + self.lambd * pull

    def _mark(self, q: np.ndarray, true: np.ndarray, weight: np.ndarray, reference: np.ndarray) -> None:
        """Write weights and references of one tile in place."""
        if q.min() == 1 or q.max() == 0 or true.all() or not true.any():
            return
        wanted = label(true, structure=EIGHT)[1] - 1
        if wanted < 1:
            return
        birth, death = component_pairs(1 - q)
        if len(birth) == 0:
            return
        flat, w, r = q.reshape(-1), weight, reference
        persistence = (1 - flat)[death] - (1 - flat)[birth]
        order = np.argsort(-persistence, kind="stable")
        width = q.shape[1]
        for rank, pair in enumerate(order):
            b, d = divmod(int(birth[pair]), width), divmod(int(death[pair]), width)
            if rank < wanted:
                if persistence[pair] > 0.99:
                    continue
                w[b], r[b], w[d], r[d] = 1, 0, 1, 1
            elif persistence[pair] > self.persistence_threshold:
                w[b], r[b], w[d], r[d] = 1, q[d], 1, q[b]


class TopoWinLoss(nn.Module):
    """Regression of the distance to the background, and of what must connect or be cut in each window.

    ``u = relu(out)``, ``d = min(distance, d_max)``: ``alpha * sum (u - d)^2``, plus ``sum u^2 W-`` where a ridge joins
    two regions that are apart in the truth, plus ``beta * sum (d_max - u)^2 W+`` where one region is cut. An edge
    weighs as many pairs of pixels as it joins in a maximum spanning forest. A mask at inference is ``u > 1e-5``.

    Args:
        alpha: weight of the regression.
        beta: weight of what must connect.
        window: side of a window.
        d_max: largest distance.
        d_min: distance below which nothing must be cut.

    Raises:
        ValueError: sizes not positive; an output that is not ``[B, 1, H, W]``, a target that is not of 0 and 1.

    Source:
        Structured loss of road tracing (arXiv 2009.07011) with MALIS, "TOPO" in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.losses import TopoWinLoss
        >>> TopoWinLoss()(torch.rand(1, 1, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.long)).ndim
        0
    """

    def __init__(
        self, alpha: float = 1e-3, beta: float = 0.1, window: int = 64, d_max: float = 20, d_min: float = 10
    ) -> None:
        super().__init__()
        check_positive(window=window, d_max=d_max, d_min=d_min)
        self.alpha = alpha
        self.beta = beta
        self.window = window
        self.d_max = d_max
        self.d_min = d_min

    def extra_repr(self) -> str:
        """Settings."""
        return f"alpha={self.alpha}, beta={self.beta}, window={self.window}, d_max={self.d_max}, d_min={self.d_min}"

    def forward(self, logits: Float[Tensor, "B 1 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch: the network's output and masks; connectivity is found on the host."""
        check_segmentation(logits, target, channels=1)
        u = full_precision(logits).relu()
        d = distance_to_background(target.to(u)).clamp_max(self.d_max)
        costs, truths = u.detach()[:, 0].cpu().double().numpy(), d[:, 0].cpu().double().numpy()
        masks = (target[:, 0] == 1).cpu().numpy()
        cut, join = np.zeros_like(costs), np.zeros_like(costs)
        for image in range(len(costs)):
            for tile in _tiles(costs[image], self.window):
                cut[image][tile], join[image][tile] = self._pairs(
                    costs[image][tile], truths[image][tile], masks[image][tile]
                )
        apart = (u[:, 0].square() * torch.from_numpy(cut).to(u)).sum()
        together = ((self.d_max - u[:, 0]).square() * torch.from_numpy(join).to(u)).sum()
        return self.alpha * (u - d).square().sum() + apart + self.beta * together

    def _pairs(self, u: np.ndarray, d: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the pixels of one window: what must be cut, what must connect."""
        regions = label(~binary_dilation(~mask, CROSS, iterations=5), structure=CROSS)[0].reshape(-1)
        index = np.arange(u.size).reshape(u.shape)
        one = np.concatenate([index[:, :-1].reshape(-1), index[:-1].reshape(-1)])
        two = np.concatenate([index[:, 1:].reshape(-1), index[1:].reshape(-1)])
        cost, truth = (x.reshape(-1)[one] + x.reshape(-1)[two] for x in (u, d))
        apart = spanning_pairs(one, two, np.where(truth > self.d_max, self.d_max, cost), regions)[1]
        together = spanning_pairs(one, two, np.where(truth < self.d_min, 0, cost), regions)[0]
        found = []
        for pairs, void in ((apart, truth >= self.d_min), (together, truth < self.d_max)):
            weight = pairs / pairs.sum() if pairs.sum() > 0 else pairs
            weight = np.where(void, 0, weight)
            pixels = np.bincount(one, weight, u.size) + np.bincount(two, weight, u.size)
            found.append(pixels.reshape(u.shape))
        return found[0], found[1]


def _tiles(image: np.ndarray, size: int) -> Iterator[tuple[slice, slice]]:
    height, width = image.shape
    for row in range(0, height, size):
        for column in range(0, width, size):
            yield slice(row, min(row + size, height)), slice(column, min(column + size, width))


def _critical(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pixels in which the two masks differ by topology."""
    false, missed = predicted & ~true, true & ~predicted
    warped_true = _warp(true, [(missed, _distance(true)), (false, _distance(~true))])
    warped_predicted = _warp(predicted, [(false, _distance(predicted)), (missed, _distance(~predicted))])
    return (predicted != warped_true) | (true != warped_predicted)


def _distance(mask: np.ndarray) -> np.ndarray:
    return distance_to_background(torch.from_numpy(mask)[None].double())[0].numpy()


def _warp(mask: np.ndarray, visits: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Flip the pixels asked for, nearest to the border first, where that leaves the topology as it is."""
    height, width = mask.shape
    state = mask.astype(np.int64).reshape(-1).tolist()
    neighbours = [-width - 1, -width, -width + 1, -1, 0, 1, width - 1, width, width + 1]
    for wanted, distance in visits:
        key = (distance * wanted).reshape(-1)
        order = np.argsort(-key, kind="stable")[: int((key > 0).sum())][::-1]
        for place in order.tolist():
            row, column = divmod(place, width)
            if 0 < row < height - 1 and 0 < column < width - 1:
                code = 0
                for bit, offset in enumerate(neighbours):
                    code |= state[place + offset] << bit
                if SIMPLE[code]:
                    state[place] ^= 1
    return np.array(state, dtype=bool).reshape(height, width)


def _simple(code: int) -> bool:
    """Whether a 3 x 3 patch has one 4-connected foreground and one 8-connected background component."""
    patch = np.array([code >> bit & 1 for bit in range(9)]).reshape(3, 3)
    return bool(label(patch, structure=CROSS)[1] == 1 and label(1 - patch, structure=EIGHT)[1] == 1)


SIMPLE = [_simple(code) for code in range(512)]
"""By the bits of a patch, row by row."""
