"""Losses over pairs and transport against peers, forward and backward, N = 512 and 4,096, D = 128, 100 classes.

``..._matmul`` groups hold one N x N x D product, to compare growth with N.
"""

from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import HardContrastiveLoss, ICNNLoss, InfoNCELoss, SupConLoss
from proto_core.transport import sinkhorn_plan

SIZES = (512, 4096)


def labelled(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 128, generator=g).requires_grad_(), torch.arange(count) % 100


def step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, other: Tensor) -> Tensor:
    return torch.autograd.grad(loss(x, other), x)[0]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", ["proto", "pytorch_metric_learning"])
def test_supcon(benchmark, kind, count):
    benchmark.group, benchmark.name = f"supcon N={count}", f"supcon_{count}_{kind}"
    loss = SupConLoss(0.1, 0.1) if kind == "proto" else peer.SupConLoss(temperature=0.1)
    benchmark(step, loss, *labelled(count))


def info_nce(one: Tensor, two: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(one) @ F.normalize(two).T / 0.07, torch.arange(len(one)))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", ["proto", "torch"])
def test_info_nce(benchmark, kind, count):
    benchmark.group, benchmark.name = f"infonce N={count}", f"infonce_{count}_{kind}"
    x, _ = labelled(count)
    benchmark(step, InfoNCELoss(0.07) if kind == "proto" else info_nce, x, torch.randn(count, 128))


def hard_loop(one: Tensor, two: Tensor) -> Tensor:
    """Anchor by anchor."""
    f, g = F.normalize(one), F.normalize(two)
    losses = []
    for i in range(len(f)):
        row = g @ f[i]
        others = torch.cat([row[:i], row[i + 1 :]])
        kept = others.topk(max(1, round(0.1 * len(others)))).values
        losses.append(torch.log1p((kept - row[i]).exp().sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["proto", "reference"])
def test_hard(benchmark, kind):
    benchmark.group, benchmark.name = "hard contrastive N=512", f"hard_512_{kind}"
    x, _ = labelled(512)
    benchmark(step, HardContrastiveLoss(1.0, 0.1) if kind == "proto" else hard_loop, x, torch.randn(512, 128))


def icnn_search(x: Tensor, labels: Tensor) -> None:
    """What the slow reference spends its time on: each anchor's neighbours, one by one."""
    for i in range(len(x)):
        ((x - x[i]).square().sum(1) + 1e-6).sqrt().sort()


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", ["proto", "reference"])
def test_icnn(benchmark, kind, count):
    """The reference only searches, without the score and without a gradient."""
    benchmark.group, benchmark.name = f"icnn N={count}", f"icnn_{count}_{kind}"
    x, labels = labelled(count)
    if kind == "proto":
        benchmark(step, ICNNLoss(), x, labels)
    else:
        benchmark(icnn_search, x.detach(), labels)


@pytest.mark.parametrize("kind", ["proto", "pot"])
def test_sinkhorn(benchmark, kind):
    benchmark.group, benchmark.name = "sinkhorn 512x512 float64", f"sinkhorn_512_{kind}"
    g = np.random.default_rng(0)
    cost = ot.dist(g.normal(size=(512, 8)), g.normal(size=(512, 8)) + 1)
    cost, weights = cost / cost.max(), np.full(512, 1 / 512)
    if kind == "proto":
        benchmark(sinkhorn_plan, torch.from_numpy(cost), epsilon=0.02, tol=1e-9)
    else:
        benchmark(ot.sinkhorn, weights, weights, cost, 0.02, method="sinkhorn_log", stopThr=1e-9)


@pytest.mark.parametrize("count", SIZES)
def test_matmul(benchmark, count):
    benchmark.group, benchmark.name = f"matmul N={count}", f"matmul_{count}_reference"
    x = torch.randn(count, 128)
    benchmark(lambda: x @ x.T)
