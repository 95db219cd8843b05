"""Harmonic loss, plain and smoothed."""

import torch
from torch import Tensor

from proto_core.losses import HarmonicLoss
from shared.tests.loss_case import LossCase


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.rand(9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), torch.arange(9) % 4


CASES = [
    LossCase("HarmonicLoss", lambda: HarmonicLoss(2.0), batch, half_tolerance=(1e-2, 1e-2)),
    LossCase("HarmonicLoss[smoothed]", lambda: HarmonicLoss(3.0, smoothing=0.1), batch, half_tolerance=(1e-2, 1e-2)),
]
