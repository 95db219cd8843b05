"""Losses on part prototypes: none has a batch."""

import torch
from torch import Tensor

from proto_core.losses import ClosenessLoss, DiscriminationLoss, IncorrectConnectionL1Loss, SubspaceOrthogonalityLoss
from shared.tests.loss_case import LossCase


def prototypes(seed: int) -> tuple[Tensor, int]:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 4


def head(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, generator=g, dtype=torch.float64), torch.eye(4).repeat_interleave(2, 0).double()


CASES = [
    LossCase("ClosenessLoss", ClosenessLoss, prototypes, batch=()),
    LossCase("DiscriminationLoss", DiscriminationLoss, prototypes, batch=()),
    LossCase("SubspaceOrthogonalityLoss", SubspaceOrthogonalityLoss, prototypes, batch=()),
    LossCase("SubspaceOrthogonalityLoss[fro2]", lambda: SubspaceOrthogonalityLoss("fro2"), prototypes, batch=()),
    LossCase("IncorrectConnectionL1Loss", IncorrectConnectionL1Loss, head, batch=(), detached=(1,)),
]
