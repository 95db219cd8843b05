"""Comp-sum losses over their range of tau, and the smooth adversarial form."""

import torch
from torch import Tensor

from proto_core.losses import CompSumLoss, SmoothAdversarialCompSumLoss
from shared.tests.loss_case import LossCase


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), torch.arange(9) % 4


def adversarial(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = batch(seed)
    return logits, targets, batch(seed + 1)[0]


CASES = [
    LossCase(f"CompSumLoss[{tau}]", lambda tau=tau: CompSumLoss(tau), batch, half_tolerance=(1e-2, 1e-2))
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0)
] + [LossCase("SmoothAdversarialCompSumLoss", SmoothAdversarialCompSumLoss, adversarial, batch=(0, 1, 2))]
