"""Proto-triplet and ICNN losses, the latter also with targets of its own."""

import torch
from torch import Tensor

from proto_core.losses import ICNNLoss, ProtoTripletLoss
from shared.tests.loss_case import LossCase


def rows(seed: int, count: int, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def large() -> tuple[Tensor, Tensor]:
    return rows(0, 16_384, 128).float(), torch.arange(16_384) % 100


FEW = "needs three targets"

CASES = [
    LossCase(
        "ProtoTripletLoss", lambda: ProtoTripletLoss(1.0), lambda s: (rows(s, 9), torch.arange(9) % 4, rows(s + 1, 4))
    ),
    LossCase(
        "ICNNLoss",
        ICNNLoss,
        lambda s: (rows(s, 15), torch.arange(15) % 3),
        single=False,
        gathers=True,
        chunks=True,
        large=large,
        half_tolerance=(0.1, 0.05),
    ),
    LossCase(
        "ICNNLoss[targets]",
        lambda **k: ICNNLoss(3, **k),
        lambda s: (rows(s, 9), torch.arange(9) % 3, rows(s + 1, 11), torch.arange(11) % 3),
        chunks=True,
        half_tolerance=(0.1, 0.05),
    ),
]
