"""PALM with several prototypes, without pruning, and with one prototype per class."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import PALMLoss
from shared.tests.loss_case import LossCase


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x), torch.arange(10) % 3


def build(**settings: Any) -> PALMLoss:
    settings = {"prototypes_per_class": 3, "momentum": 0.5, "top_k": 2} | settings
    loss = PALMLoss(3, 6, **settings)
    start = torch.rand(loss.prototypes.prototypes.shape, generator=torch.Generator().manual_seed(1))
    loss.prototypes.set_(F.normalize(start))
    return loss


CASES = [
    LossCase("PALMLoss", build, labelled, gathers=True),
    LossCase("PALMLoss[no pruning]", lambda **k: build(top_k=0, **k), labelled, gathers=True),
    LossCase("PALMLoss[one each]", lambda **k: build(prototypes_per_class=1, **k), labelled, gathers=True),
]
