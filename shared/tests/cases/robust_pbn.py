"""Margins of probabilities, templates and robustness."""

import torch
from torch import Tensor

from proto_core.losses import GLVQLoss, ProbabilityMarginLoss, RobustnessMarginLoss, TemplateMarginLoss
from shared.tests.loss_case import LossCase


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def templates(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return uniform(seed, 9, 6), torch.arange(6) % 3, torch.arange(9) % 3


CASES = [
    LossCase(
        "ProbabilityMarginLoss", lambda: ProbabilityMarginLoss(0.5), lambda s: (uniform(s, 9, 4), torch.arange(9) % 4)
    ),
    LossCase(
        "RobustnessMarginLoss",
        lambda: RobustnessMarginLoss(1.0),
        lambda s: (uniform(s, 9, 5), uniform(s + 1, 2, 5, 3) / 5, uniform(s + 2, 5) + 0.5, torch.arange(9) % 3),
        batch=(0, 3),
        half_tolerance=(2e-2, 2e-2),
    ),
    LossCase("TemplateMarginLoss", lambda: TemplateMarginLoss(0.5), templates, batch=(0, 2)),
    LossCase(
        "TemplateMarginLoss[distance]", lambda: TemplateMarginLoss(0.5, similarity=False), templates, batch=(0, 2)
    ),
    LossCase("GLVQLoss", GLVQLoss, templates, batch=(0, 2)),
]
