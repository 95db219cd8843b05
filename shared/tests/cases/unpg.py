"""UNPG over the three margins, with and without its filter and its pairs."""

from typing import Any

import torch
from torch import Tensor

from proto_core.losses import UNPGLoss
from shared.tests.loss_case import LossCase


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=g, dtype=torch.float64) * 9, torch.arange(12) % 4


def large() -> tuple[Tensor, Tensor]:
    return torch.randn(16_384, 128, generator=torch.Generator().manual_seed(0)), torch.arange(16_384) % 4


def build(dim: int = 5, **settings: Any) -> UNPGLoss:
    loss = UNPGLoss(dim, 4, s=16.0, **settings)
    with torch.no_grad():
        loss.weight.copy_(torch.randn(4, dim, generator=torch.Generator().manual_seed(1)))
    return loss


CASES = [
    LossCase(f"UNPGLoss[{margin}]", lambda margin=margin, **k: build(margin=margin, **k), labelled, gathers=True)
    for margin in ("arcface", "cosface", "magface")
] + [
    LossCase("UNPGLoss[blocks]", lambda **k: build(whisker=0.5, **k), labelled, gathers=True, chunks=True),
    LossCase("UNPGLoss[no filter]", lambda **k: build(whisker=None, **k), labelled, gathers=True, chunks=True),
    LossCase("UNPGLoss[class]", lambda **k: build(negatives="class", **k), labelled, gathers=True),
    LossCase(
        "UNPGLoss[large]",
        lambda **k: build(128, **k),
        lambda seed: (torch.randn(6, 128, generator=torch.Generator().manual_seed(seed)).double(), torch.arange(6) % 4),
        large=large,
    ),
]
