"""Dice and the detection terms."""

import torch
from torch import Tensor

from proto_core.losses import DiceLoss, HeatmapFocalLoss, MaskedBCELoss, MaskedSmoothL1Loss
from shared.tests.loss_case import LossCase


def masks(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 3, 5, 4, generator=g, dtype=torch.float64)
    return logits, (torch.rand(6, 3, 5, 4, generator=g) < 0.4).double()


def heat(seed: int) -> tuple[Tensor, Tensor]:
    logits, target = masks(seed)
    return logits.sigmoid().clamp(0.05, 0.95), target * 0.75 + 0.25 * (target * (torch.arange(4) == 1))


def places(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    map = torch.rand(6, 2, 5, 4, generator=g, dtype=torch.float64) * 0.8 + 0.1
    index = torch.randint(0, 20, (6, 3), generator=g)
    mask = torch.rand(6, 3, generator=g) < 0.6
    mask[0, 0] = True
    return map, index, mask, (torch.rand(6, 3, 2, generator=g) < 0.5).double()


CASES = [
    LossCase("DiceLoss", DiceLoss, masks, gathers=True, detached=(1,)),
    LossCase("DiceLoss[HoP]", lambda **k: DiceLoss(0.0, 1e-5, 1e-4, **k), masks, gathers=True, detached=(1,)),
    LossCase("HeatmapFocalLoss", HeatmapFocalLoss, heat, gathers=True, detached=(1,)),
    LossCase("MaskedSmoothL1Loss", MaskedSmoothL1Loss, places, batch=(0, 1, 2, 3), gathers=True, detached=(3,)),
    LossCase("MaskedBCELoss", MaskedBCELoss, places, batch=(0, 1, 2, 3), gathers=True, detached=(3,)),
]
