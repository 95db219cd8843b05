"""Dice loss for segmentation, and why it is calmer than regression losses on large objects under noise.

SeaBird (CVPR 2024, arXiv 2403.20318): the gradient of a loss under noise of the target has a variance; that of the dice
loss of two segments of length L falls with ``1 / L^2``. The authors' plotting script tests the error without its
absolute value; here it is ``|error|``. Its detection terms (heat map, masked regression) go back to CenterNet.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_option, check_positive, readable
from proto_core.distributed import gather_with_grad, joint_mean
from proto_core.precision import full_precision
from proto_core.systems import Paper

__all__ = [
    "DiceLoss",
    "HeatmapFocalLoss",
    "MaskedBCELoss",
    "MaskedSmoothL1Loss",
    "gather_map",
    "gradient_variance",
    "regression_gradient",
]


class DiceLoss(nn.Module):
    """``1 - mean over classes of (2 sum p y + a) / (sum p + sum y + b)``, sums over batch and space together.

    Several classes may be true at one place: p is a sigmoid per class, kept in ``[clip, 1 - clip]`` (no gradient where
    it is cut). The sums are those of the whole batch, so that the value is no mean over samples.

    Args:
        numerator_smooth: a.
        denominator_smooth: b.
        clip: smallest probability.
        from_logits: input are logits; otherwise probabilities.
        gather_distributed: sums over the joint batch of all ranks.

    Raises:
        ValueError: negative smoothing, a clip outside [0, 0.5); shapes that differ, targets outside [0, 1].

    Example:
        >>> import torch
        >>> from proto_core.losses import DiceLoss
        >>> target = torch.tensor([[[1.0, 0.0]]])
        >>> DiceLoss(clip=0.0)(100 * (target - 0.5), target)
        tensor(0.)
    """

    paper: ClassVar[Paper] = Paper(
        title="SeaBird: Segmentation in Bird's View with Dice Loss Improves Monocular 3D Detection of Large Objects",
        year=2024,
        arxiv="2403.20318",
        code="abhi1kumar/SeaBird@325c59c",
        evidence="code",
        summary="dice loss, the variance of its gradient under noise, detection terms by centres",
        claim="the gradient of the dice loss varies less under noise than those of regression losses",
    )

    def __init__(
        self,
        numerator_smooth: float = 1.0,
        denominator_smooth: float = 1.0,
        clip: float = 1e-3,
        from_logits: bool = True,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"numerator_smooth": numerator_smooth, "denominator_smooth": denominator_smooth}.items():
            if not value >= 0:
                raise ValueError(f"{name}: found {value}, needed at least 0")
        if not 0 <= clip < 0.5:
            raise ValueError(f"clip: found {clip}, needed 0 to below 0.5")
        self.numerator_smooth = numerator_smooth
        self.denominator_smooth = denominator_smooth
        self.clip = clip
        self.from_logits = from_logits
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"numerator_smooth={self.numerator_smooth}, denominator_smooth={self.denominator_smooth}, "
            f"clip={self.clip}, from_logits={self.from_logits}"
        )

    def forward(self, input: Float[Tensor, "B C *space"], target: Float[Tensor, "B C *space"]) -> Float[Tensor, ""]:
        """Loss of a batch: logits (or probabilities) and targets in [0, 1]."""
        if input.ndim < 2 or input.shape != target.shape or input.numel() == 0:
            shapes = f"{tuple(input.shape)} and {tuple(target.shape)}"
            raise ValueError(f"input, target: found shapes {shapes}, needed [B, C, ...] both, not empty")
        _check_share("target", target)
        p, y = full_precision(input), target.to(full_precision(input))
        p = p.sigmoid() if self.from_logits else p
        p = p.clamp(self.clip, 1 - self.clip) if self.clip else p
        places = [0, *range(2, p.ndim)]
        sums = torch.stack([(p * y).sum(places), p.sum(places) + y.sum(places)])
        if self.gather_distributed:
            sums = gather_with_grad(sums.unsqueeze(0)).sum(dim=0)
        below = sums[1] + self.denominator_smooth
        score = (2 * sums[0] + self.numerator_smooth) / torch.where(below > 0, below, 1)
        return 1 - score.mean()


class HeatmapFocalLoss(nn.Module):
    """``-[sum over y = 1 of (1 - p)^2 log p + sum over y < 1 of (1 - y)^4 p^2 log(1 - p)] / number of y = 1``.

    Not divided where there is no centre. Probabilities are kept a rounding away from 0 and 1.

    Args:
        gather_distributed: divide by the joint batch's number of centres.

    Raises:
        ValueError: shapes that differ, targets outside [0, 1].

    Source:
        CornerNet's loss, as SeaBird (arXiv 2403.20318) uses it.

    Example:
        >>> import torch
        >>> from proto_core.losses import HeatmapFocalLoss
        >>> HeatmapFocalLoss()(torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[1.0, 0.0]]]]))  # 2 x 0.25 log 2
        tensor(0.3466)
    """

    def __init__(self, *, gather_distributed: bool = False) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed

    def forward(self, prob: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
        """Loss of a batch: probabilities, and targets that are 1 at centres and fall around them."""
        if prob.shape != target.shape or prob.numel() == 0:
            shapes = f"{tuple(prob.shape)} and {tuple(target.shape)}"
            raise ValueError(f"prob, target: found shapes {shapes}, needed [B, C, H, W] both, not empty")
        _check_share("target", target)
        p = _inner(full_precision(prob))
        y = target.to(p)
        centre = y == 1
        near = torch.where(centre, (1 - p).square() * p.log(), 0)
        far = torch.where(centre, 0, (1 - y) ** 4 * p.square() * (1 - p).log())
        total, count = -(near + far).sum(), centre.sum()
        return joint_mean(total, count) if self.gather_distributed else total / count.clamp_min(1)


def gather_map(map: Float[Tensor, "B C H W"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M C"]:
    """The map's values at M places of each image; a place is ``row * W + column``.

    Raises:
        ValueError: shapes that do not fit, places outside the map.

    Example:
        >>> import torch
        >>> from proto_core.losses import gather_map
        >>> gather_map(torch.arange(6.0).reshape(1, 1, 2, 3), torch.tensor([[4, 0]]))[0, :, 0]
        tensor([4., 0.])
    """
    if map.ndim != 4 or index.ndim != 2 or len(map) != len(index):
        shapes = f"{tuple(map.shape)} and {tuple(index.shape)}"
        raise ValueError(f"map, index: found shapes {shapes}, needed [B, C, H, W] and [B, M]")
    places = map.shape[2] * map.shape[3]
    if readable(index) and index.numel() and not bool(((index >= 0) & (index < places)).all()):
        low, high = int(index.min()), int(index.max())
        raise ValueError(f"index: found values from {low} to {high}, needed 0 to {places - 1}")
    return map.flatten(2).gather(2, index.long().unsqueeze(1).expand(-1, map.shape[1], -1)).transpose(1, 2)


class MaskedSmoothL1Loss(nn.Module):
    """Mean smooth L1 (beta 1) between a map and targets at chosen places; exactly 0 where none is chosen.

    Args:
        gather_distributed: divide by the joint batch's number of places.

    Raises:
        ValueError: shapes that do not fit, places outside the map.

    Example:
        >>> import torch
        >>> from proto_core.losses import MaskedSmoothL1Loss
        >>> map, index = torch.zeros(1, 2, 3, 3), torch.tensor([[0, 4]])
        >>> MaskedSmoothL1Loss()(map, index, torch.tensor([[True, False]]), torch.ones(1, 2, 2))
        tensor(0.5000)
    """

    def __init__(self, *, gather_distributed: bool = False) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed

    def forward(
        self,
        map: Float[Tensor, "B C H W"],
        index: Int[Tensor, "B M"],
        mask: Bool[Tensor, "B M"],
        target: Float[Tensor, "B M C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch: map, places, which of them count, and targets."""
        found, wanted = _at_places(map, index, mask, target)
        return self._mean(F.smooth_l1_loss(found, wanted, reduction="none"), mask)

    def _mean(self, losses: Tensor, mask: Tensor) -> Tensor:
        total = losses.masked_fill(~mask.bool().unsqueeze(-1), 0).sum()
        count = mask.bool().sum() * losses.shape[-1]
        return joint_mean(total, count) if self.gather_distributed else total / count.clamp_min(1)


class MaskedBCELoss(MaskedSmoothL1Loss):
    """Mean binary cross entropy between a map of probabilities and targets at chosen places; 0 where none is chosen.

    Probabilities are kept a rounding away from 0 and 1.

    Args:
        gather_distributed: divide by the joint batch's number of places.

    Raises:
        ValueError: shapes that do not fit, places outside the map.

    Example:
        >>> import torch
        >>> from proto_core.losses import MaskedBCELoss
        >>> map, index = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[3]])
        >>> MaskedBCELoss()(map, index, torch.tensor([[True]]), torch.ones(1, 1, 1))
        tensor(0.6931)
    """

    def forward(
        self,
        map: Float[Tensor, "B C H W"],
        index: Int[Tensor, "B M"],
        mask: Bool[Tensor, "B M"],
        target: Float[Tensor, "B M C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch: probabilities, places, which of them count, and targets."""
        found, wanted = _at_places(map, index, mask, target)
        p = _inner(found)
        return self._mean(-(wanted * p.log() + (1 - wanted) * (1 - p).log()), mask)


LOSSES = ("l1", "l2", "smooth_l1", "dice")


def regression_gradient(error: Float[Tensor, "*shape"], loss: str, length: float | None = None) -> Tensor:
    """Gradient of a loss by the error of an object of given length on a line.

    ``l1``: ``sign(e)``; ``l2``: e; ``smooth_l1`` (beta 1): e for ``|e| <= 1``, else its sign; ``dice``: ``sign(e) / L``
    for ``|e| <= L``, else 0.

    Raises:
        ValueError: unknown loss; a length that is not positive, ``dice`` without one.

    Source:
        SeaBird (arXiv 2403.20318), noise analysis.

    Example:
        >>> import torch
        >>> from proto_core.losses import regression_gradient
        >>> regression_gradient(torch.tensor([-0.5, 3.0, 9.0]), "dice", length=4.0)
        tensor([-0.2500,  0.2500,  0.0000])
    """
    size = _length(loss, length)
    error = full_precision(error)
    if loss == "l1":
        return error.sign()
    if loss == "l2":
        return error.clone()
    if loss == "smooth_l1":
        return error.clamp(-1, 1)
    return torch.where(error.abs() <= size, error.sign() / size, 0)


def gradient_variance(sigma: Float[Tensor, "*shape"], loss: str, length: float | None = None) -> Tensor:
    """Variance of :func:`regression_gradient` for an error from N(0, sigma^2).

    ``l1``: 1; ``l2``: ``sigma^2``; ``dice``: ``erf(L / (sqrt 2 sigma)) / L^2``; ``smooth_l1``, with ``a = 1 / sigma``:
    ``sigma^2 (erf(a / sqrt 2) - sqrt(2 / pi) a exp(-a^2 / 2)) + 1 - erf(a / sqrt 2)``.

    The dice loss is calmer than L1 for L > 1, and than L2 from a sigma of about ``1 / L`` on: the larger an object, the
    more its dice gradient can be trusted.

    Args:
        sigma: standard deviations, positive; a tensor or a number.
        loss: ``"l1"``, ``"l2"``, ``"smooth_l1"`` or ``"dice"``.
        length: L, for ``dice``.

    Raises:
        ValueError: unknown loss, sigma not positive; a length that is not positive, ``dice`` without one.

    Source:
        SeaBird (arXiv 2403.20318), noise analysis; the variance of smooth L1 was derived here.

    Example:
        >>> import torch
        >>> from proto_core.losses import gradient_variance
        >>> sigma = torch.tensor(1.0)
        >>> [round(gradient_variance(sigma, name, length=4.0).item(), 4) for name in ("l1", "smooth_l1", "dice")]
        [1.0, 0.5161, 0.0625]
    """
    size = _length(loss, length)
    sigma = full_precision(torch.as_tensor(sigma))
    if readable(sigma) and not bool((sigma > 0).all()):
        raise ValueError(f"sigma: found {float(sigma.min())}, needed positive numbers")
    if loss == "l1":
        return torch.ones_like(sigma)
    if loss == "l2":
        return sigma.square()
    if loss == "dice":
        return (size / (math.sqrt(2) * sigma)).erf() / size**2
    a = 1 / sigma
    inside = (a / math.sqrt(2)).erf()
    return sigma.square() * (inside - math.sqrt(2 / math.pi) * a * (-a.square() / 2).exp()) + 1 - inside


def _length(loss: str, length: float | None) -> float:
    check_option("loss", loss, *LOSSES)
    if length is None and loss == "dice":
        raise ValueError("length: found None, needed a positive number for dice")
    if length is not None:
        check_positive(length=length)
    return 1.0 if length is None else float(length)


def _at_places(map: Tensor, index: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if mask.shape != index.shape or tuple(target.shape) != (*index.shape, map.shape[1]):
        shapes = f"{tuple(index.shape)}, {tuple(mask.shape)} and {tuple(target.shape)}"
        raise ValueError(f"index, mask, target: found shapes {shapes}, needed [B, M] twice and [B, M, {map.shape[1]}]")
    found = gather_map(full_precision(map), index)
    return found, target.to(found)


def _inner(p: Tensor) -> Tensor:
    """Probabilities a rounding away from 0 and 1."""
    eps = torch.finfo(p.dtype).eps
    return p.clamp(eps, 1 - eps)


def _check_share(name: str, values: Tensor) -> None:
    if readable(values):
        low, high = (float(value) for value in values.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name}: found values from {low:g} to {high:g}, needed 0 to 1")
