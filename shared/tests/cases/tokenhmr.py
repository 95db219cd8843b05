"""Scaling below a threshold."""

import torch
from torch import Tensor

from proto_core.losses import ThresholdAdaptiveLossScaling
from shared.tests.loss_case import LossCase


def terms(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    loss = torch.rand(6, 4, generator=g, dtype=torch.float64)
    error = (torch.rand(6, 4, generator=g) < 0.5).double() + 0.5 * (torch.arange(4) / 8)
    return loss, error, torch.full((4,), 0.5, dtype=torch.float64)


CASES = [LossCase("ThresholdAdaptiveLossScaling", ThresholdAdaptiveLossScaling, terms, detached=(1, 2))]
