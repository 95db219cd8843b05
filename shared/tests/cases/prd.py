"""Supervised contrast, prototype pull and relation distillation of PRD."""

import torch
from torch import Tensor

from proto_core.losses import PrototypePullLoss, PrototypeRelationDistillationLoss, SupConLoss
from shared.tests.loss_case import LossCase


def rows(seed: int, count: int, dim: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def large() -> tuple[Tensor, Tensor]:
    return rows(0, 16_384, 128).float(), torch.arange(16_384) % 100


def relation(seed: int) -> tuple[Tensor, ...]:
    return rows(seed, 9), rows(seed + 1, 4), rows(seed + 2, 9), rows(seed + 3, 4)


CASES = [
    LossCase(
        "SupConLoss", SupConLoss, lambda s: (rows(s, 11), torch.arange(11) % 3), gathers=True, chunks=True, large=large
    ),
    LossCase(
        "SupConLoss[views]",
        lambda **k: SupConLoss(0.5, **k),
        lambda s: (rows(s, 18).reshape(9, 2, 5), torch.arange(9) % 4),
        gathers=True,
        chunks=True,
    ),
    LossCase(
        "PrototypePullLoss",
        lambda **k: PrototypePullLoss(stop_gradient=False, **k),
        lambda s: (rows(s, 9), torch.arange(9) % 4, rows(s + 1, 4)),
    ),
    LossCase(
        "PrototypeRelationDistillationLoss",
        PrototypeRelationDistillationLoss,
        relation,
        batch=(0, 2),
        detached=(2, 3),
        gathers=True,
    ),
    LossCase(
        "PrototypeRelationDistillationLoss[samples]",
        lambda **k: PrototypeRelationDistillationLoss(0.3, "samples", **k),
        relation,
        batch=(0, 2),
        detached=(2, 3),
        gathers=True,
    ),
]
