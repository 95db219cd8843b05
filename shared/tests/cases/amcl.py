"""AMCL's four forms and Barlow Twins. Views stand [N, C, d] here, so that the batch is the first axis."""

from typing import Any

import torch
from torch import Tensor, nn

from proto_core.losses import AdaptiveMultiHeadContrastiveLoss, BarlowTwinsLoss
from shared.tests.loss_case import LossCase


class BatchFirst(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads = settings.pop("num_heads", 2)
        self.loss = AdaptiveMultiHeadContrastiveLoss(5, heads, hidden_dim=7, lower=0.1, **settings)

    def forward(self, one: Tensor, two: Tensor, *rest: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.loss.kind == "simsiam":
            options["targets"] = rest
        elif rest:
            options["queue"] = rest[0].transpose(0, 1)
        return self.loss(one.transpose(0, 1), two.transpose(0, 1), **options)


class Wide(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = AdaptiveMultiHeadContrastiveLoss(128, 1, hidden_dim=7, lower=0.1, **settings)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.loss(one.unsqueeze(0), two.unsqueeze(0))


def views(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    one = torch.randn(6, 2, 5, generator=g, dtype=torch.float64)
    return one, one + torch.randn(6, 2, 5, generator=g, dtype=torch.float64)


def queued(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return *views(seed), torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def predicted(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, two = views(seed)
    return one, two, one[:, 0].sin(), two[:, 0].cos()


def columns(seed: int) -> tuple[Tensor, Tensor]:
    one, two = views(seed)
    return one[:, 0], two[:, 0]


def wide(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    one = torch.randn(6, 128, generator=g, dtype=torch.float64)
    return one, one + torch.randn(6, 128, generator=g, dtype=torch.float64)


def large() -> tuple[Tensor, Tensor]:
    one, two = torch.randn(2, 16_384, 128, generator=torch.Generator().manual_seed(0))
    return one, two


NAME = "AdaptiveMultiHeadContrastiveLoss"
BOTH = {"gathers": True, "chunks": True}
CASES = [
    LossCase(f"{NAME}[max]", lambda **k: BatchFirst(**k), views, single=False, **BOTH),
    LossCase(f"{NAME}[wide]", lambda **k: Wide(**k), wide, single=False, large=large, **BOTH),
    LossCase(
        f"{NAME}[logsumexp]",
        lambda **k: BatchFirst(negatives="logsumexp", shared=False, **k),
        views,
        single=False,
        **BOTH,
    ),
    LossCase(f"{NAME}[queue]", lambda **k: BatchFirst(**k), queued, gathers=True, chunks=True),
    LossCase(
        f"{NAME}[queue, logsumexp]",
        lambda **k: BatchFirst(negatives="logsumexp", **k),
        queued,
        gathers=True,
        chunks=True,
    ),
    LossCase(
        f"{NAME}[simsiam]",
        lambda **k: BatchFirst(kind="simsiam", **k),
        predicted,
        batch=(0, 1, 2, 3),
        gathers=True,
        detached=(2, 3),
    ),
    LossCase(f"{NAME}[barlow]", lambda **k: BatchFirst(kind="barlow", **k), views, single=False, gathers=True),
    LossCase("BarlowTwinsLoss", BarlowTwinsLoss, columns, single=False, gathers=True),
]
