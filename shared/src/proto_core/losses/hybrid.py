"""Segmentation by pixel, by patch and by map at once: binary cross entropy, structural similarity, overlap.

BASNet (2021, arXiv 2101.04704; CVPR 2019), its hybrid loss. Unlike in the authors' code an image without foreground in
prediction and target has overlap term 0, not NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import readable
from proto_core.precision import full_precision, no_autocast
from proto_core.structural import ssim_map

__all__ = ["HybridSegmentationLoss"]


class HybridSegmentationLoss(nn.Module):
    """``BCE + (1 - SSIM) + (1 - IoU)`` of probability maps; several maps (deep supervision) are summed.

    BCE is the mean over pixels, logarithms cut at -100; SSIM the mean of :func:`proto_core.structural.ssim_map`; IoU
    per image ``sum(g p) / (sum g + sum p - sum(g p))``, mean over the batch, and 1 where both are empty.

    Args:
        bce_weight: weight of BCE.
        ssim_weight: weight of 1 - SSIM.
        iou_weight: weight of 1 - IoU.
        window_size: side of the SSIM window, odd.
        sigma: of the window's Gaussian.
        from_logits: predictions are logits, not probabilities.

    Attributes:
        terms: ``"bce"``, ``"ssim"`` (1 - SSIM) and ``"iou"`` (1 - IoU) of the last forward's first map, detached.

    Raises:
        ValueError: negative weights, an even window; no prediction, shapes that differ or are not ``[B, 1, H, W]``,
            targets or probabilities outside [0, 1].

    Example:
        >>> import torch
        >>> from proto_core.losses import HybridSegmentationLoss
        >>> target = (torch.rand(2, 1, 32, 32) > 0.5).float()
        >>> loss = HybridSegmentationLoss()
        >>> loss(target, target).abs().round(decimals=4), sorted(loss.terms)
        (tensor(0.), ['bce', 'iou', 'ssim'])
    """

    def __init__(
        self,
        bce_weight: float = 1.0,
        ssim_weight: float = 1.0,
        iou_weight: float = 1.0,
        window_size: int = 11,
        sigma: float = 1.5,
        from_logits: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"bce_weight": bce_weight, "ssim_weight": ssim_weight, "iou_weight": iou_weight}.items():
            if not value >= 0:
                raise ValueError(f"{name}: found {value}, needed at least 0")
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size: found {window_size}, needed an odd number")
        if not sigma > 0:
            raise ValueError(f"sigma: found {sigma}, needed a positive number")
        self.bce_weight = bce_weight
        self.ssim_weight = ssim_weight
        self.iou_weight = iou_weight
        self.window_size = window_size
        self.sigma = sigma
        self.from_logits = from_logits
        self.terms: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"bce_weight={self.bce_weight}, ssim_weight={self.ssim_weight}, iou_weight={self.iou_weight}, "
            f"window_size={self.window_size}, sigma={self.sigma}, from_logits={self.from_logits}"
        )

    def forward(
        self, pred: Float[Tensor, "B 1 H W"] | Sequence[Float[Tensor, "B 1 H W"]], target: Float[Tensor, "B 1 H W"]
    ) -> Float[Tensor, ""]:
        """Loss of a batch: one map, or one per output of the network, and targets in [0, 1]."""
        maps = [pred] if isinstance(pred, Tensor) else list(pred)
        self._check(maps, target)
        found = [self._of_one(full_precision(one), target) for one in maps]
        self.terms = {name: value.detach() for name, value in found[0].items()}
        weights = {"bce": self.bce_weight, "ssim": self.ssim_weight, "iou": self.iou_weight}
        return torch.stack([sum(weights[n] * v for n, v in one.items()) for one in found]).sum()  # type: ignore[misc]

    def _of_one(self, values: Tensor, target: Tensor) -> dict[str, Tensor]:
        g = target.to(values)
        if self.from_logits:
            logs = F.logsigmoid(values).clamp_min(-100), F.logsigmoid(-values).clamp_min(-100)
            bce = -(g * logs[0] + (1 - g) * logs[1]).mean()
            p = values.sigmoid()
        else:
            p = values
            with no_autocast(p):
                bce = F.binary_cross_entropy(p, g)
        ssim = 1 - ssim_map(p, g, window_size=self.window_size, sigma=self.sigma).mean()
        shared = (g * p).sum(dim=(1, 2, 3))
        either = g.sum(dim=(1, 2, 3)) + p.sum(dim=(1, 2, 3)) - shared
        iou = torch.where(either > 0, 1 - shared / torch.where(either > 0, either, 1), 0).mean()
        return {"bce": bce, "ssim": ssim, "iou": iou}

    def _check(self, maps: list[Tensor], target: Tensor) -> None:
        if not maps:
            raise ValueError("pred: found an empty sequence, needed one map at least")
        for one in maps:
            if one.shape != target.shape or one.ndim != 4 or one.shape[1] != 1 or one.numel() == 0:
                shapes = f"{tuple(one.shape)} and {tuple(target.shape)}"
                raise ValueError(f"pred, target: found shapes {shapes}, needed [B, 1, H, W] both")
        named = [("target", target), *(("pred", one) for one in maps if not self.from_logits)]
        for name, values in named:
            if readable(values) and not bool(((values >= 0) & (values <= 1)).all()):
                low, high = float(values.min()), float(values.max())
                raise ValueError(f"{name}: found values from {low:g} to {high:g}, needed 0 to 1")
