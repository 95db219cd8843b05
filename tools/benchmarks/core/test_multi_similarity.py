"""Multi-Similarity Loss with mining, forward and backward, against a loop over anchors and pytorch-metric-learning.

N = 512 and 4,096, D = 128, 100 classes, float32. The loop takes each anchor's positives and negatives by index.
"""

import pytest
import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import MultiSimilarityLoss


def batch(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(100, 128, generator=g)
    labels = torch.arange(count) % 100
    return (centres[labels] + torch.randn(count, 128, generator=g)).requires_grad_(), labels


def loop(x: Tensor, labels: Tensor) -> Tensor:
    """Anchor by anchor."""
    unit = F.normalize(x)
    similarity = unit @ unit.T
    total = []
    for i in range(len(x)):
        row = similarity[i]
        positive = row[(labels == labels[i]) & (row < 1 - 1e-5)]
        negative = row[labels != labels[i]]
        hard = negative[negative + 0.1 > positive.min()]
        easy = positive[positive - 0.1 < negative.max()]
        if len(hard) and len(easy):
            total.append(torch.log1p((-2 * (easy - 0.5)).exp().sum()) / 2)
            total.append(torch.log1p((40 * (hard - 0.5)).exp().sum()) / 40)
    return torch.stack(total).sum() / len(x)


def peer() -> object:
    loss, miner = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
    return lambda x, labels: loss(x, labels, miner(x, labels))


def step(loss, x: Tensor, labels: Tensor) -> Tensor:
    return torch.autograd.grad(loss(x, labels), x)[0]


@pytest.mark.parametrize("kind", ["proto", "reference", "pytorch_metric_learning"])
@pytest.mark.parametrize("count", [512, 4096])
def test_multi_similarity(benchmark, kind, count):
    benchmark.group, benchmark.name = f"multi_similarity N={count}", f"multi_similarity_{count}_{kind}"
    loss = {"proto": MultiSimilarityLoss(), "reference": loop, "pytorch_metric_learning": peer()}[kind]
    benchmark(step, loss, *batch(count))
