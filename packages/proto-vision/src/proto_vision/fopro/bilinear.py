"""Bilinear pooling: which pairs of channels light up together, wherever in the image."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.precision import full_precision, no_autocast

__all__ = ["BilinearPool"]


class BilinearPool(nn.Module):
    """``X X^T / (h w)`` of a map's channels, ``sqrt(x + 1e-5)`` of each entry, all to norm 1.

    Maps have to be 0 or more (the output of a ReLU).

    Shapes:
        ``[N, B, h, w]`` -> ``[N, B^2]``.

    Source:
        Bilinear CNN (arXiv 1504.07889), as arXiv 2212.00465 takes it for fine-grained classes.

    Example:
        >>> import torch
        >>> from proto_vision.fopro import BilinearPool
        >>> pooled = BilinearPool()(torch.ones(2, 3, 4, 4))
        >>> pooled.shape, round(float(pooled[0].norm()), 4)
        (torch.Size([2, 9]), 1.0)
    """

    def forward(self, maps: Float[Tensor, "N B h w"]) -> Float[Tensor, "N pairs"]:
        """The pooled features."""
        with no_autocast(maps):
            channels = full_precision(maps).flatten(2)
            pairs = channels @ channels.mT / channels.shape[2]
            return F.normalize((pairs + 1e-5).sqrt().flatten(1), dim=1)
