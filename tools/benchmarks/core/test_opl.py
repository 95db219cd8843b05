"""Orthogonal Projection Loss, forward and backward, against the double loop over ordered pairs and plain torch.

N = 512 and 4,096, D = 128, 100 classes, float32. The loop takes minutes above some dozen samples, so that its group is
smaller.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import OrthogonalProjectionLoss


def batch(count: int, classes: int = 100) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 128, generator=g).requires_grad_(), torch.arange(count) % classes


def loop(x: Tensor, labels: Tensor) -> Tensor:
    """Pair by pair."""
    unit = F.normalize(x)
    same, other = [], []
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j:
                (same if labels[i] == labels[j] else other).append(unit[i] @ unit[j])
    return 1 - torch.stack(same).mean() + 0.5 * torch.stack(other).abs().mean()


def dense(x: Tensor, labels: Tensor) -> Tensor:
    """The whole matrix with two masks."""
    unit = F.normalize(x)
    cosines = unit @ unit.T
    same = labels.unsqueeze(1) == labels
    positive, negative = (same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)).float(), (~same).float()
    within = (positive * cosines).sum() / (positive.sum() + 1e-6)
    between = (negative * cosines).abs().sum() / (negative.sum() + 1e-6)
    return 1 - within + 0.5 * between


def step(loss, x: Tensor, labels: Tensor) -> Tensor:
    return torch.autograd.grad(loss(x, labels), x)[0]


@pytest.mark.parametrize("kind", ["proto", "reference"])
def test_opl_48(benchmark, kind):
    benchmark.group, benchmark.name = "opl N=48", f"opl_48_{kind}"
    benchmark(step, OrthogonalProjectionLoss() if kind == "proto" else loop, *batch(48, 8))


@pytest.mark.parametrize("kind", ["proto", "dense"])
@pytest.mark.parametrize("count", [512, 4096])
def test_opl(benchmark, kind, count):
    benchmark.group, benchmark.name = f"opl N={count}", f"opl_{count}_{kind}"
    benchmark(step, OrthogonalProjectionLoss() if kind == "proto" else dense, *batch(count))
