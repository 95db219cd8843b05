"""Multi-Similarity Loss with and without mining."""

import torch
from torch import Tensor

from proto_core.losses import MultiSimilarityLoss
from shared.tests.loss_case import LossCase


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(12, 4, generator=g, dtype=torch.float64), torch.arange(12) % 3


def large() -> tuple[Tensor, Tensor]:
    return torch.randn(16_384, 128, generator=torch.Generator().manual_seed(0)), torch.arange(16_384) % 100


CASES = [
    LossCase("MultiSimilarityLoss", MultiSimilarityLoss, labelled, gathers=True, chunks=True, large=large),
    LossCase(
        "MultiSimilarityLoss[all pairs]",
        lambda **k: MultiSimilarityLoss(mining=False, duplicate_eps=None, **k),
        labelled,
        gathers=True,
        chunks=True,
    ),
]
