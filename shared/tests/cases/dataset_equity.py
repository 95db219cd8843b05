"""The loss weighted by rarity."""

from typing import Any

import torch
from torch import Tensor

from proto_core.losses import GeneralizedFocalLoss
from shared.tests.loss_case import LossCase


def samples(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    likelihood = torch.rand(7, generator=g, dtype=torch.float64).bfloat16().double()
    return torch.randn(7, 4, generator=g, dtype=torch.float64), torch.arange(7) % 4, likelihood


def normalized(**keywords: Any) -> GeneralizedFocalLoss:
    return GeneralizedFocalLoss(eta=0.3, gamma=2.0, normalize=True, **keywords)


CASES = [
    LossCase("GeneralizedFocalLoss", GeneralizedFocalLoss, samples, batch=(0, 1, 2), gathers=True, detached=(2,)),
    LossCase("GeneralizedFocalLoss[normalize]", normalized, samples, batch=(0, 1, 2), gathers=True, detached=(2,)),
]
