"""Segmentation losses that look at shape: by region, by centre line, by skeleton and thickness.

The five differentiable losses of TopoMortar (BMVC 2025, arXiv 2503.03365) with two classes, from logits: cross entropy
and Dice, RegionWise, clDice, Skeleton Recall, cbDice. Dice is negative (-1 is perfect), as in the authors' code, so
that sums can be below 0. A map without a zero pixel has distance 1 everywhere.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from proto_core.checks import check_positive, readable
from proto_core.precision import full_precision
from proto_core.skeleton import euler_skeleton, soft_skeleton, tubed_skeleton
from proto_core.systems import Paper

__all__ = ["CBDiceLoss", "CEDiceLoss", "CESkeletonRecallLoss", "CLDiceLoss", "RegionWiseLoss", "SegmentationLoss"]

TINY = 1e-15


class SegmentationLoss(nn.Module):
    """What losses of two classes share: checks, softmax, one-hot target, weighted cross entropy and Dice.

    Args:
        weights: of the two classes in cross entropy and Dice; ``None``: 1.

    Raises:
        ValueError: other than two weights, a negative one; logits that are not ``[B, 2, H, W]``, a target that is not
            ``[B, 1, H, W]`` of integers 0 and 1.
    """

    weights: Tensor | None

    def __init__(self, weights: Any = None) -> None:
        super().__init__()
        given = None if weights is None else torch.as_tensor(weights, dtype=torch.float64).clone()
        if given is not None and (tuple(given.shape) != (2,) or bool((given < 0).any())):
            raise ValueError(f"weights: found {given.tolist()}, needed two numbers of at least 0")
        self.register_buffer("weights", given)

    def _read(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and one-hot target, ``[B, 2, H, W]``."""
        check_segmentation(logits, target, channels=2)
        p = full_precision(logits).softmax(dim=1)
        return p, torch.cat([1 - target, target], dim=1).to(p)

    def _weight(self, like: Tensor) -> Tensor:
        return like.new_ones(2) if self.weights is None else self.weights.to(like)

    def cross_entropy(self, p: Tensor, t: Tensor) -> Tensor:
        """``-sum_c w_c mean(t log(p + 1e-15))``."""
        return -(self._weight(p) * (t * (p + TINY).log()).mean(dim=(0, 2, 3))).sum()

    def dice(self, p: Tensor, t: Tensor) -> Tensor:
        """``-mean over images and classes of w_c (2 sum p t + 1e-5) / (sum t + sum p + 1e-5)``."""
        both, either = (p * t).sum(dim=(2, 3)), t.sum(dim=(2, 3)) + p.sum(dim=(2, 3))
        return -(self._weight(p) * (2 * both + 1e-5) / (either + 1e-5).clamp_min(1e-8)).mean()


class CEDiceLoss(SegmentationLoss):
    """``lambda_ce CE + lambda_dice Dice``; -1 is perfect.

    Args:
        lambda_ce: weight of cross entropy.
        lambda_dice: weight of Dice.
        weights: of the two classes; ``None``: 1.

    Example:
        >>> import torch
        >>> from proto_core.losses import CEDiceLoss
        >>> target = torch.tensor([[[[0, 1]]]])
        >>> CEDiceLoss()(100.0 * torch.cat([1 - target, target], dim=1), target)
        tensor(-1.)
    """

    def __init__(self, lambda_ce: float = 1, lambda_dice: float = 1, weights: Any = None) -> None:
        super().__init__(weights)
        self.lambda_ce = lambda_ce
        self.lambda_dice = lambda_dice

    def extra_repr(self) -> str:
        """Settings."""
        return f"lambda_ce={self.lambda_ce}, lambda_dice={self.lambda_dice}"

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch."""
        p, t = self._read(logits, target)
        return self.lambda_ce * self.cross_entropy(p, t) + self.lambda_dice * self.dice(p, t)


class RegionWiseLoss(SegmentationLoss):
    """``mean of p R``: R is 1 outside a class and, inside, minus the distance to its border over the largest one.

    Example:
        >>> import torch
        >>> from proto_core.losses import RegionWiseLoss
        >>> target = torch.tensor([[[[0, 1]]]])
        >>> RegionWiseLoss()(100.0 * torch.cat([1 - target, target], dim=1), target)  # as good as it gets
        tensor(-0.5000)
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch; distances are computed on the host."""
        p, t = self._read(logits, target)
        inside = distance_to_background(t)
        largest = inside.amax(dim=(2, 3), keepdim=True)
        return (p * torch.where(t == 0, 1, -inside / (largest + TINY))).mean()


class CLDiceLoss(SegmentationLoss):
    """``(1 - alpha) Dice + alpha (1 - 2 tprec tsens / (tprec + tsens))`` with soft skeletons S.

    ``tprec = (sum S(p) t + smooth) / (sum S(p) + smooth)``, ``tsens`` the same with p and t exchanged; sums over the
    whole batch.

    Args:
        iterations: of the soft skeleton.
        alpha: weight of the centre-line term.
        smooth: added to both sums.
        weights: of the two classes in Dice; ``None``: 1.

    Source:
        clDice (arXiv 2003.07311), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.losses import CLDiceLoss
        >>> CLDiceLoss()(torch.randn(1, 2, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.long)).ndim
        0
    """

    paper: ClassVar[Paper] = Paper(
        title="TopoMortar: A dataset to evaluate image segmentation methods focused on topology accuracy",
        year=2025,
        arxiv="2503.03365",
        code="jmlipman/TopoMortar@f709b3c",
        evidence="code",
        summary="eight segmentation losses of topology, skeletons, Betti errors",
        claim="of the topology losses only clDice leaves fewer wrong pieces than cross entropy and Dice",
    )

    def __init__(
        self,
        iterations: int = 3,
        alpha: float = 0.5,
        smooth: float = 1.0,
        weights: Any = None,
    ) -> None:
        super().__init__(weights)
        if iterations < 0:
            raise ValueError(f"iterations: found {iterations}, needed at least 0")
        self.iterations = iterations
        self.alpha = alpha
        self.smooth = smooth

    def extra_repr(self) -> str:
        """Settings."""
        return f"iterations={self.iterations}, alpha={self.alpha}, smooth={self.smooth}"

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch."""
        p, t = self._read(logits, target)
        q, y = p[:, 1:], t[:, 1:]
        sq, sy = soft_skeleton(q, self.iterations), soft_skeleton(y, self.iterations)
        precision = ((sq * y).sum() + self.smooth) / (sq.sum() + self.smooth)
        sensitivity = ((sy * q).sum() + self.smooth) / (sy.sum() + self.smooth)
        lines = 1 - 2 * precision * sensitivity / (precision + sensitivity)
        return (1 - self.alpha) * self.dice(p, t) + self.alpha * lines


class CESkeletonRecallLoss(SegmentationLoss):
    """Cross entropy minus ``lambd`` times the recall of the target's tubed skeleton.

    Args:
        lambd: weight of the recall.
        weights: of the two classes in cross entropy; ``None``: 1.

    Source:
        Skeleton Recall (arXiv 2404.03010), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.losses import CESkeletonRecallLoss
        >>> CESkeletonRecallLoss()(torch.randn(1, 2, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.long)).ndim
        0
    """

    def __init__(self, lambd: float = 1.0, weights: Any = None) -> None:
        super().__init__(weights)
        self.lambd = lambd

    def extra_repr(self) -> str:
        """Settings."""
        return f"lambd={self.lambd}"

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch; skeletons are computed on the host."""
        p, t = self._read(logits, target)
        wanted = t[:, 1:] * tubed_skeleton(target).to(p)
        found = (p[:, 1:] * wanted).sum(dim=(2, 3)) + 1e-5
        recall = found / (wanted.sum(dim=(2, 3)) + 1e-5).clamp_min(1e-8)
        return self.cross_entropy(p, t) - self.lambd * recall.mean()


class CBDiceLoss(SegmentationLoss):
    """``0.5 CE + alpha / (2 (alpha + beta)) Dice + beta / (2 (alpha + beta)) CB``: centre line and thickness at once.

    CB is minus the harmonic mean of a topological precision and sensitivity whose terms are weighted by the radius of
    the object along its skeleton, so that thin and thick parts count alike.

    Args:
        alpha: share of Dice.
        beta: share of CB.
        smooth: added to all sums.
        iterations: of the skeleton.
        weights: of the two classes in cross entropy and Dice; ``None``: 1.

    Source:
        cbDice (arXiv 2407.01517), as in TopoMortar (arXiv 2503.03365).

    Example:
        >>> import torch
        >>> from proto_core.losses import CBDiceLoss
        >>> CBDiceLoss()(torch.randn(1, 2, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.long)).ndim
        0
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        smooth: float = 1.0,
        iterations: int = 5,
        weights: Any = None,
    ) -> None:
        super().__init__(weights)
        check_positive(shares=alpha + beta)
        self.alpha = alpha
        self.beta = beta
        self.smooth = smooth
        self.iterations = iterations

    def extra_repr(self) -> str:
        """Settings."""
        return f"alpha={self.alpha}, beta={self.beta}, smooth={self.smooth}, iterations={self.iterations}"

    def forward(self, logits: Float[Tensor, "B 2 H W"], target: Int[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """Loss of a batch; distances are computed on the host."""
        p, t = self._read(logits, target)
        q, y = p[:, 1:], t[:, 1:]
        sq, sy = (euler_skeleton((m > 0.5).long(), self.iterations).to(p) for m in (q.detach(), y))
        dq, rq, iq = self._radii(q.detach(), sq)
        dy, ry, iy = self._radii(y, sy)
        vl, slvl, sl = dy * y, ry * y, iy * sy
        vp, spvp, sp = dq * q, rq * q, iq * sq * q
        precision = ((sp * vl).sum() + self.smooth) / (_join(spvp, slvl, sp).sum() + self.smooth)
        sensitivity = ((sl * vp).sum() + self.smooth) / (_join(slvl, spvp, sl).sum() + self.smooth)
        both = -2 * precision * sensitivity / (precision + sensitivity)
        share = 2 * (self.alpha + self.beta)
        return 0.5 * self.cross_entropy(p, t) + self.alpha / share * self.dice(p, t) + self.beta / share * both

    def _radii(self, mask: Tensor, skeleton: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distance, radius along the skeleton, and its inverse, in units of the image's largest radius."""
        distance = distance_to_background((mask > 0.5).to(mask))
        on = skeleton > 0.5
        radius = torch.where(on, distance, 0)
        largest = radius.amax(dim=(2, 3), keepdim=True).clamp_min(1)
        distance, radius = distance.minimum(largest) / largest, radius / largest
        return distance, radius, torch.where(on, (1 + 1e-7) / (radius + 1e-7), 0)


def _join(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.where((a != 0) & (b == 0), a, b) * x


def check_segmentation(logits: Tensor, target: Tensor, channels: int) -> None:
    """Refuse anything but ``[B, channels, H, W]`` with an integer target ``[B, 1, H, W]`` of 0 and 1."""
    fits = logits.ndim == 4 and logits.shape[1] == channels and target.ndim == 4 and target.shape[1] == 1
    if not fits or logits.shape[0] != target.shape[0] or logits.shape[2:] != target.shape[2:] or target.numel() == 0:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"logits, target: found shapes {shapes}, needed [B, {channels}, H, W] and [B, 1, H, W]")
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"target: found {target.dtype}, needed integers 0 and 1")
    if readable(target):
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"target: found values from {low} to {high}, needed 0 and 1")


@torch.no_grad()
def distance_to_background(mask: Tensor) -> Tensor:
    """Euclidean distance of every pixel to the nearest zero pixel of its map; 1 everywhere in a map without one."""
    planes = (mask != 0).flatten(0, -3).cpu().numpy()
    found = [np.ones(plane.shape) if plane.all() else distance_transform_edt(plane) for plane in planes]
    return torch.from_numpy(np.stack(found)).reshape(mask.shape).to(mask)
