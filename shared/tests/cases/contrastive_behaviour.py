"""InfoNCE, the hard and the simple contrastive loss, with negatives of the batch and of a bank."""

import torch
from torch import Tensor

from proto_core.losses import HardContrastiveLoss, InfoNCELoss, SimpleContrastiveLoss
from shared.tests.loss_case import LossCase


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(9, 5, generator=g, dtype=torch.float64), torch.randn(9, 5, generator=g, dtype=torch.float64)


def banked(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed + 1)
    return *pairs(seed), torch.randn(14, 5, generator=g, dtype=torch.float64)


def large() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(16_384, 128, generator=g), torch.randn(16_384, 128, generator=g)


CASES = [
    LossCase("InfoNCELoss", lambda **k: InfoNCELoss(0.2, **k), pairs, gathers=True, chunks=True, large=large),
    LossCase("InfoNCELoss[bank]", lambda **k: InfoNCELoss(0.2, **k), banked, gathers=True, chunks=True),
    LossCase(
        "InfoNCELoss[symmetric]", lambda **k: InfoNCELoss(0.2, symmetric=True, **k), pairs, gathers=True, chunks=True
    ),
    LossCase(
        "HardContrastiveLoss",
        lambda **k: HardContrastiveLoss(0.5, 0.3, **k),
        pairs,
        gathers=True,
        chunks=True,
        large=large,
    ),
    LossCase(
        "HardContrastiveLoss[bank]", lambda **k: HardContrastiveLoss(0.5, 0.3, **k), banked, gathers=True, chunks=True
    ),
    LossCase("SimpleContrastiveLoss", lambda **k: SimpleContrastiveLoss(0.5, **k), pairs, gathers=True, chunks=True),
    LossCase(
        "SimpleContrastiveLoss[hard]",
        lambda **k: SimpleContrastiveLoss(0.5, 0.3, **k),
        pairs,
        gathers=True,
        chunks=True,
    ),
]
