"""The trajectory term between two sets of outputs; the classes around it are stateful and stand in test_saf.py."""

import torch
from torch import Tensor, nn

from proto_core.optim import trajectory_kl
from shared.tests.loss_case import LossCase


class Trajectory(nn.Module):
    def forward(self, logits: Tensor, past_logits: Tensor) -> Tensor:
        return trajectory_kl(logits, past_logits)


def outputs(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(9, 4, generator=g, dtype=torch.float64) * 5, torch.randn(9, 4, generator=g, dtype=torch.float64)


CASES = [LossCase("trajectory_kl", Trajectory, outputs, detached=(1,), half_tolerance=(2e-2, 2e-2))]
