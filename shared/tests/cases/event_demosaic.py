"""Charbonnier and pixel focus."""

import torch
from torch import Tensor

from proto_core.losses import CharbonnierLoss, PixelFocusLoss
from shared.tests.loss_case import LossCase


def images(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    one, two = torch.rand(2, 6, 3, 4, 5, generator=g, dtype=torch.float64)
    return one, two


CASES = [
    LossCase("CharbonnierLoss", CharbonnierLoss, images),
    LossCase("PixelFocusLoss", PixelFocusLoss, images, gathers=True),
    LossCase("PixelFocusLoss[exp]", lambda **k: PixelFocusLoss("exp", 5.0, **k), images, gathers=True),
]
