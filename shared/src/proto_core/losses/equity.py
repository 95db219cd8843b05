"""Weigh samples by how rare their appearance is: likely ones less, unlikely ones fully.

DatasetEquity (ICCV 2023 Workshops, arXiv 2308.09878). Its "generalized focal loss" is not the loss of the same name for
dense detectors (Li et al., 2020). The likelihood of a sample is the size of its cluster over that of the largest; it
is computed once, before training. Unlike in the published detectors, where the weight is never applied, is taken from
the first image of a batch, or multiplies an already reduced loss, every sample has its own weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, readable
from proto_core.distributed import joint_mean
from proto_core.precision import full_precision

__all__ = ["GeneralizedFocalLoss", "dequity_weight"]


def dequity_weight(likelihood: Any, eta: float = 1.0, gamma: float = 5.0) -> Any:
    """``(eta + (1 - p)^gamma) / (eta + 1)``: 1 for p = 0, falling to ``eta / (eta + 1)`` for p = 1; 1 for gamma = 0.

    Args:
        likelihood: p in [0, 1], a number or a tensor; constant, it gets no gradient.
        eta: how much the likeliest keep.
        gamma: how fast the weight falls.

    Returns:
        A number for a number, a tensor (float32 at least) for a tensor.

    Raises:
        ValueError: p outside [0, 1] or NaN, negative eta or gamma.

    Source:
        DatasetEquity (arXiv 2308.09878).

    Example:
        >>> from proto_core.losses import dequity_weight
        >>> dequity_weight(0.0), dequity_weight(1.0)
        (1.0, 0.5)
    """
    _check(eta, gamma)
    if not isinstance(likelihood, Tensor):
        value = float(likelihood)
        if not 0 <= value <= 1:
            raise ValueError(f"likelihood: found {value}, needed 0 to 1")
        return (eta + (1 - value) ** gamma) / (eta + 1)
    p = full_precision(likelihood.detach())
    if readable(p) and not bool(((p >= 0) & (p <= 1)).all()):
        wrong = p[~((p >= 0) & (p <= 1))].reshape(-1)[0].item()
        raise ValueError(f"likelihood: found {wrong}, needed 0 to 1")
    return (eta + (1 - p).clamp(0, 1).pow(gamma)) / (eta + 1)


class GeneralizedFocalLoss(nn.Module):
    """``(1 / N) sum_i w(p_i) L_i`` with the weights of :func:`dequity_weight`.

    The mean is not divided by the sum of the weights unless asked for, so that the scale of the loss falls. In
    validation the weights do not belong: use the plain loss.

    Args:
        eta: see :func:`dequity_weight`; 0 means that the likeliest samples are never learnt, with a warning.
        gamma: see :func:`dequity_weight`.
        base_loss: ``(logits, targets) -> losses [N]``; ``None``: cross entropy.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalize: divide by the sum of the weights instead of N.
        gather_distributed: divide by the joint batch's count (or weights), so that the mean over ranks is the joint
            batch's loss also where ranks hold different numbers of samples.

    Raises:
        ValueError: negative eta or gamma, unknown reduction; likelihoods outside [0, 1] or of another number than the
            samples, an empty batch, a base loss that is not per sample.

    Example:
        >>> import torch
        >>> from proto_core.losses import GeneralizedFocalLoss
        >>> loss = GeneralizedFocalLoss(eta=0.5)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))  # log 4 x (1/3 + 1) / 2
        tensor(0.9242)
    """

    def __init__(
        self,
        eta: float = 1.0,
        gamma: float = 5.0,
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        reduction: str = "mean",
        normalize: bool = False,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check(eta, gamma)
        if eta == 0 and gamma > 0:
            warnings.warn("eta = 0: samples of likelihood 1 have weight 0 and are never learnt", stacklevel=2)
        self.eta = eta
        self.gamma = gamma
        self.base_loss = base_loss
        self.reduction = check_option("reduction", reduction, "mean", "sum", "none")
        self.normalize = normalize
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return f"eta={self.eta}, gamma={self.gamma}, reduction={self.reduction!r}, normalize={self.normalize}"

    def forward(
        self, logits: Float[Tensor, "N ..."], targets: Shaped[Tensor, "N ..."], likelihood: Float[Tensor, "N"]
    ) -> Float[Tensor, "..."]:
        """Loss of a batch."""
        if self.base_loss is None:
            check_class_targets(logits, targets)
            losses = F.cross_entropy(full_precision(logits), targets.long(), reduction="none")
        else:
            losses = self.base_loss(logits, targets)
            if losses.ndim == 0:
                raise ValueError("base_loss: found a scalar, needed one loss per sample (reduction='none')")
        return self.weight(losses, likelihood)

    def weight(self, losses: Float[Tensor, "N"], likelihood: Float[Tensor, "N"]) -> Float[Tensor, "..."]:
        """Weigh and reduce any losses per sample, as a detector's sum of terms per image."""
        if losses.ndim != 1 or losses.shape != likelihood.shape or len(losses) == 0:
            shapes = f"{tuple(losses.shape)} and {tuple(likelihood.shape)}"
            raise ValueError(f"losses, likelihood: found shapes {shapes}, needed [N] both, N at least 1")
        losses = full_precision(losses)
        weights = dequity_weight(likelihood, self.eta, self.gamma).to(losses)
        weighted = weights * losses
        if self.reduction == "none":
            return weighted
        if self.reduction == "sum":
            return weighted.sum()
        count = weights.sum() if self.normalize else torch.full_like(weights[0], len(weights))
        if self.gather_distributed:
            return joint_mean(weighted.sum(), count)
        return weighted.sum() / torch.where(count > 0, count, 1)


def _check(eta: float, gamma: float) -> None:
    for name, value in {"eta": eta, "gamma": gamma}.items():
        if not value >= 0 or math.isinf(value):
            raise ValueError(f"{name}: found {value}, needed at least 0")
