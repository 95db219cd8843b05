"""Soft-InfoNCE and its variants."""

import torch
from torch import Tensor

from proto_core.losses import SoftInfoNCELoss
from shared.tests.loss_case import LossCase


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=g, dtype=torch.float64), torch.randn(8, 5, generator=g, dtype=torch.float64)


def estimated(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed + 1)
    return *pairs(seed), torch.rand(8, 8, generator=g, dtype=torch.float64)


CASES = [
    LossCase(
        f"SoftInfoNCELoss[{variant}]",
        lambda variant=variant: SoftInfoNCELoss(beta=1.5, score_scale=0.5, variant=variant),
        estimated,
        batch=(),  # a row of the similarity is about the whole batch; see test_soft_infonce.py
        detached=(2,),
        half_tolerance=(2e-2, 2e-2),
    )
    for variant in ("soft", "weighted", "bce", "kl", "cancel")
] + [LossCase("SoftInfoNCELoss[infonce]", lambda **k: SoftInfoNCELoss(variant="infonce", **k), pairs, gathers=True)]
