"""Sinkhorn divergence for both costs, and the alignment with prototypes."""

import torch
from torch import Tensor

from proto_core.losses import SinkhornLoss, UncertaintyPrototypeAlignmentLoss
from shared.tests.loss_case import LossCase

STOPS = "iterates until the marginals are met, which takes a look at them"


def sets(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randn(
        9, 3, generator=g, dtype=torch.float64
    ) + 0.5


CASES = [
    LossCase(
        f"SinkhornLoss[p={p}]",
        lambda p=p, **k: SinkhornLoss(p, 0.3, **k),
        sets,
        batch=(0, 1)[:1],
        graph_break=STOPS,
        host_sync=STOPS,
        tolerance=(1e-3, 1e-4),
        half_tolerance=(1e-2, 1e-2),
    )
    for p in (1, 2)
] + [
    LossCase(
        "SinkhornLoss[joint]",
        lambda **k: SinkhornLoss(2, 0.5, **k),
        lambda seed: tuple(part[:7] for part in sets(seed)),
        gathers=True,
        permutable=False,
        graph_break=STOPS,
        host_sync=STOPS,
        tolerance=(1e-3, 1e-4),
    ),
    LossCase("UncertaintyPrototypeAlignmentLoss", UncertaintyPrototypeAlignmentLoss, sets, batch=(0,)),
]
