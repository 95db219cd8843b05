"""Harmonic loss: class probabilities from distances to class centres.

Base method: arXiv 2502.01628; with any distance: "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers"
(2026, arXiv 2603.10225). At distance 0 the probability is 1, so that the loss has finite minimisers where cross entropy
pushes weights to infinity. Most of the authors' vision heads take the negated similarity as a logit, which pushes
samples from their own centre; here it is log p everywhere, as in their language models.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, check_positive, readable
from proto_core.precision import full_precision
from proto_core.systems import Paper

__all__ = ["HarmonicLoss", "harmonic_log_probs"]


class HarmonicLoss(nn.Module):
    """``-log p_y`` with ``p_j`` proportional to ``(d_j + eps)^(-exponent)``.

    Exponent n on squared Euclidean distances is exponent 2n on Euclidean ones. Neither temperature nor bias: scaling
    all distances of a sample changes nothing (eps aside).

    Args:
        exponent: n.
        eps: added to distances.
        smoothing: a; probabilities become ``(p + a / K) / (1 + a)``.
        reduction: ``"mean"`` or ``"none"``.

    Raises:
        ValueError: exponent or eps not positive, a negative smoothing, an unknown reduction; shapes or types that do
            not fit, a target outside 0..K-1, negative distances (looked at on the CPU only).

    Example:
        >>> import torch
        >>> from proto_core.losses import HarmonicLoss
        >>> HarmonicLoss(eps=1e-8)(torch.tensor([[1.0, 3.0]]), torch.tensor([0])).round(decimals=4)
        tensor(0.2877)
    """

    paper: ClassVar[Paper] = Paper(
        title="Rethinking the Harmonic Loss via Non-Euclidean Distance Layers",
        year=2026,
        arxiv="2603.10225",
        code="maxwellmg/rethinking-harmonic-loss@895a9ec",
        evidence="code",
        summary="classification by distances to class centres, with any distance",
        claim="centres classify better than a linear head and stay small",
    )

    def __init__(
        self, exponent: float = 1.0, eps: float = 1e-4, smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        _check_settings(exponent, eps, smoothing)
        self.exponent = exponent
        self.eps = eps
        self.smoothing = smoothing
        self.reduction = check_option("reduction", reduction, "mean", "none")

    def extra_repr(self) -> str:
        """Settings."""
        return f"exponent={self.exponent}, eps={self.eps}, smoothing={self.smoothing}, reduction={self.reduction!r}"

    def forward(self, distances: Float[Tensor, "N K"], targets: Int[Tensor, "N"]) -> Float[Tensor, "..."]:
        """Loss of a batch of distances to the centres."""
        check_class_targets(distances, targets, "distances")
        log_probs = harmonic_log_probs(distances, self.exponent, self.eps, self.smoothing)
        return F.nll_loss(log_probs, targets.long(), reduction=self.reduction)


def harmonic_log_probs(
    distances: Float[Tensor, "*batch K"], exponent: float = 1.0, eps: float = 1e-4, smoothing: float = 0.0
) -> Float[Tensor, "*batch K"]:
    """``log softmax_j(-exponent log(d_j + eps))``: log-probabilities, which serve as logits (largest: nearest centre).

    Args:
        distances: to K centres, at least 0.
        exponent: n.
        eps: added to distances.
        smoothing: a; probabilities become ``(p + a / K) / (1 + a)``.

    Raises:
        ValueError: exponent or eps not positive, a negative smoothing, negative distances (looked at on the CPU only).

    Example:
        >>> import torch
        >>> from proto_core.losses import harmonic_log_probs
        >>> harmonic_log_probs(torch.tensor([1.0, 3.0]), eps=1e-8).exp()
        tensor([0.7500, 0.2500])
    """
    _check_settings(exponent, eps, smoothing)
    if readable(distances) and bool((distances < 0).any()):
        raise ValueError(f"distances: found {float(distances.min())}, needed at least 0")
    log_probs = (-exponent * (full_precision(distances) + eps).log()).log_softmax(dim=-1)
    if smoothing == 0:
        return log_probs
    floor = torch.full_like(log_probs, math.log(smoothing / log_probs.shape[-1]))
    return torch.logaddexp(log_probs, floor) - math.log1p(smoothing)


def _check_settings(exponent: float, eps: float, smoothing: float) -> None:
    check_positive(exponent=exponent, eps=eps)
    if not smoothing >= 0:
        raise ValueError(f"smoothing: found {smoothing}, needed at least 0")
