"""Losses of image restoration: a smooth L1, and one that looks at the pixels that are still wrong.

From "Event Camera Demosaicing via Swin Transformer and Pixel-focus Loss" (CVPR Workshop 2024, arXiv 2404.02731). The
formulas of its pixel-focus loss could not be had: what stands here is this project's definition, from what is known of
it (fine-tuning after Charbonnier's loss, stress on the long tail of the errors, a power and an exponential form).
"""

from __future__ import annotations

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.checks import check_option, check_positive
from proto_core.distributed import is_distributed, joint_mean
from proto_core.precision import full_precision

__all__ = ["CharbonnierLoss", "PixelFocusLoss"]


class CharbonnierLoss(nn.Module):
    """``mean of sqrt((pred - target)^2 + eps)``.

    Args:
        eps: inside the root; ``sqrt(eps)`` is the loss of identical images.

    Raises:
        ValueError: eps not positive; shapes that differ, no element.

    Example:
        >>> import torch
        >>> from proto_core.losses import CharbonnierLoss
        >>> CharbonnierLoss(eps=9.0)(torch.tensor([4.0]), torch.tensor([0.0]))
        tensor(5.)
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        check_positive(eps=eps)
        self.eps = eps

    def extra_repr(self) -> str:
        """Settings."""
        return f"eps={self.eps}"

    def forward(self, pred: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """Loss of a batch of any shape."""
        return _errors(pred, target, self.eps).mean()


class PixelFocusLoss(nn.Module):
    """``sum(w c) / sum(w)``, c the terms of Charbonnier's loss, w growing with them and without gradient.

    ``kind="power"``: ``w = c^gamma``; ``"exp"``: ``w = exp(gamma c)``. ``gamma = 0`` is Charbonnier's loss. This
    definition is the project's own, see the module.

    Args:
        kind: ``"power"`` or ``"exp"``.
        gamma: how much large errors count; about 1 for power, 5 for exp.
        eps: inside the root.
        gather_distributed: weights of the joint batch of all ranks.

    Raises:
        ValueError: unknown kind, a negative gamma, eps not positive; shapes that differ, no element.

    Example:
        >>> import torch
        >>> from proto_core.losses import PixelFocusLoss
        >>> PixelFocusLoss(eps=1e-12)(torch.tensor([1.0, 3.0]), torch.zeros(2))  # (1 + 9) / (1 + 3)
        tensor(2.5000)
    """

    def __init__(
        self, kind: str = "power", gamma: float = 1.0, eps: float = 1e-6, *, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        check_positive(eps=eps)
        if gamma < 0:
            raise ValueError(f"gamma: found {gamma}, needed at least 0")
        self.kind = check_option("kind", kind, "power", "exp")
        self.gamma = gamma
        self.eps = eps
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return f"kind={self.kind!r}, gamma={self.gamma}, eps={self.eps}"

    def forward(self, pred: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """Loss of a batch of any shape."""
        errors = _errors(pred, target, self.eps)
        weights = self._weights(errors.detach())
        total, count = (weights * errors).sum(), weights.sum()
        return joint_mean(total, count) if self.gather_distributed else total / count

    def _weights(self, errors: Tensor) -> Tensor:
        largest = errors.max()
        if self.gather_distributed and is_distributed():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        if self.kind == "power":  # a common factor does not count: no overflow, and no sum of zeros
            return (errors / largest) ** self.gamma
        return (self.gamma * (errors - largest)).exp()


def _errors(pred: Tensor, target: Tensor, eps: float) -> Tensor:
    if pred.shape != target.shape or pred.numel() == 0:
        shapes = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred, target: found shapes {shapes}, needed equal ones with an element")
    pred, target = full_precision(pred), full_precision(target)
    return ((pred - target).square() + eps).sqrt()
