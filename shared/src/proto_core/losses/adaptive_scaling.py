"""Losses that stop pulling once an error is below what the labels themselves are wrong by.

TALS of TokenHMR (CVPR 2024, arXiv 2404.16752): a term counts fully while its error is above a threshold and only with a
small factor below it; trusted terms always count fully. Unlike in the authors' code inputs are never changed, and a
weight of 0 is 0 also for trusted samples.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from proto_core.checks import readable
from proto_core.precision import full_precision

__all__ = ["ThresholdAdaptiveLossScaling"]


class ThresholdAdaptiveLossScaling(nn.Module):
    """``sum of weight * f * loss``, ``f = 1`` where trusted or error > threshold, else ``scale``.

    There is no gradient through error and f.

    Args:
        scale: factor of terms that are within the threshold.

    Raises:
        ValueError: a scale outside [0, 1]; a negative threshold; shapes that do not broadcast to that of the loss.

    Source:
        TokenHMR (arXiv 2404.16752), section on threshold-adaptive loss scaling.

    Example:
        >>> import torch
        >>> from proto_core.losses import ThresholdAdaptiveLossScaling
        >>> error = torch.tensor([0.1, 0.3])
        >>> ThresholdAdaptiveLossScaling(scale=0.5)(loss=error, error=error, threshold=torch.tensor(0.2))
        tensor(0.3500)
    """

    def __init__(self, scale: float = 0.05) -> None:
        super().__init__()
        if not 0 <= scale <= 1:
            raise ValueError(f"scale: found {scale}, needed 0 to 1")
        self.scale = scale

    def extra_repr(self) -> str:
        """Settings."""
        return f"scale={self.scale}"

    def forward(
        self,
        loss: Float[Tensor, "*shape"],
        error: Shaped[Tensor, "..."],
        threshold: Shaped[Tensor, "..."],
        weight: Shaped[Tensor, "..."] | None = None,
        trusted: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum over all terms; everything broadcasts to the shape of ``loss``."""
        threshold = torch.as_tensor(threshold, device=loss.device)
        given = {"error": error, "threshold": threshold, "weight": weight, "trusted": trusted}
        for name, value in given.items():
            if value is not None and not _fits(value.shape, loss.shape):
                raise ValueError(
                    f"{name}: found shape {tuple(value.shape)}, needed one that broadcasts to {tuple(loss.shape)}"
                )
        if readable(threshold) and bool((threshold < 0).any()):
            raise ValueError(f"threshold: found {float(threshold.min())}, needed at least 0")
        loss, error = full_precision(loss), error.detach()
        full = (
            error.double() > threshold.double() if error.dtype == torch.float64 else error.float() > threshold.float()
        )
        if trusted is not None:
            full = full | (trusted != 0)
        factor = torch.full_like(loss, self.scale).masked_fill(full, 1.0)
        if weight is not None:
            factor = factor * weight.to(loss)
        return (factor * loss).sum()


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(target))
    return len(shape) <= len(target) and all(one in (1, two) for one, two in pairs)
