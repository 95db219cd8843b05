"""Orthogonal projection: the pair form in both readings and with every option, the learned centres, distillation."""

from typing import Any

import torch
from torch import Tensor

from proto_core.losses import OPLDistillationLoss, OrthogonalProjectionLoss, PerpetualOrthogonalProjectionLoss
from shared.tests.loss_case import LossCase


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(10, 6, generator=g, dtype=torch.float64), torch.arange(10) % 3


def large() -> tuple[Tensor, Tensor]:
    return torch.randn(16_384, 128, generator=torch.Generator().manual_seed(0)), torch.arange(16_384) % 100


def two(seed: int) -> tuple[Tensor, Tensor]:
    x, _ = labelled(seed)
    return x, x[:, :4].cos()


def perpetual(**keywords: Any) -> PerpetualOrthogonalProjectionLoss:
    loss = PerpetualOrthogonalProjectionLoss(3, 6, **keywords)
    with torch.no_grad():
        loss.centers.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    return loss


CASES = [
    LossCase("OrthogonalProjectionLoss", OrthogonalProjectionLoss, labelled, gathers=True, chunks=True, large=large),
    LossCase(
        "OrthogonalProjectionLoss[abs_mean]",
        lambda **k: OrthogonalProjectionLoss(negative="abs_mean", **k),
        labelled,
        gathers=True,
        chunks=True,
    ),
    LossCase(
        "OrthogonalProjectionLoss[attention]",
        lambda **k: OrthogonalProjectionLoss(attention=True, **k),
        labelled,
        gathers=True,
        chunks=True,
    ),
    LossCase(
        "OrthogonalProjectionLoss[raw]",
        lambda **k: OrthogonalProjectionLoss(normalize=False, **k),
        labelled,
        gathers=True,
        chunks=True,
    ),
    LossCase("PerpetualOrthogonalProjectionLoss", perpetual, labelled),
    LossCase("OPLDistillationLoss", OPLDistillationLoss, two, detached=(1,)),
]
