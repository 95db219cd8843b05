"""The hybrid loss on probabilities, on logits, and with several outputs."""

import torch
from torch import Tensor

from proto_core.losses import HybridSegmentationLoss
from shared.tests.loss_case import LossCase


def probabilities(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = (torch.rand(4, 1, 12, 14, generator=g) < 0.4).double()
    return torch.rand(4, 1, 12, 14, generator=g, dtype=torch.float64) * 0.75 + 0.125, target


def logits(seed: int) -> tuple[Tensor, Tensor]:
    p, target = probabilities(seed)
    return p.logit() * 2, target


CASES = [
    LossCase("HybridSegmentationLoss", HybridSegmentationLoss, probabilities, detached=(1,)),
    LossCase("HybridSegmentationLoss[logits]", lambda: HybridSegmentationLoss(from_logits=True), logits, detached=(1,)),
]
