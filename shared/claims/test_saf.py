"""SAF and MESA generalise better than SGD from noisy labels, and SAF costs hardly more than SGD.

Not asserted, since it does not hold at this size: a lower absolute sharpness (SGD has fitted the noise, to a lower
loss).
"""

import time
from statistics import mean, median

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.optim import MESA, SAM, TrajectoryLoss

SEEDS = range(4)
EPOCHS = 60


def noisy_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        data.data / 16, data.target, train_size=500, stratify=data.target, random_state=seed
    )
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(500)[:100]
    y = y.copy()
    y[wrong] = rng.integers(0, 10, 100)
    return torch.tensor(x).float(), torch.tensor(y), torch.tensor(x_test).float(), torch.tensor(y_test)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def trained(seed: int, kind: str) -> tuple[float, list[float]]:
    """Test accuracy, and the seconds of each step of the last twenty epochs."""
    x, y, x_test, y_test = noisy_digits(seed)
    net = network(seed)
    settings = {"lr": 0.1, "momentum": 0.9}
    if kind == "sam":
        optimizer: torch.optim.Optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, **settings)
    else:
        optimizer = torch.optim.SGD(net.parameters(), **settings)
    saf = TrajectoryLoss(500, 10, lam=0.8, lag=3, start_epoch=5)
    mesa = MESA(net, lam=0.8, decay=0.98, start_epoch=5)
    seconds = []
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + np.cos(np.pi * epoch / EPOCHS))
        for rows in torch.randperm(500).split(50):
            start = time.perf_counter()

            def closure(rows: Tensor = rows, epoch: int = epoch) -> Tensor:
                optimizer.zero_grad()
                logits = net(x[rows])
                loss = F.cross_entropy(logits, y[rows])
                if kind == "saf":
                    loss = loss + saf(logits, rows, epoch)
                elif kind == "mesa":
                    loss = loss + mesa(x[rows], logits, epoch)
                loss.backward()
                return loss

            optimizer.step(closure)
            if kind == "mesa":
                mesa.update(net)
            if epoch >= EPOCHS - 20:
                seconds.append(time.perf_counter() - start)
    return (net(x_test).argmax(1) == y_test).float().mean().item(), seconds


def step_seconds(kind: str) -> float:
    """Median step of a wider network, where the pass and not the bookkeeping rules."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 1024), torch.randint(10, (256,))
    net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    base: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=1e-3, momentum=0.9) if kind == "sam" else base
    saf, rows = TrajectoryLoss(256, 10, lag=1, start_epoch=0), torch.arange(256)
    seconds = []
    for step in range(25):
        start = time.perf_counter()

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            if kind == "saf":
                loss = loss + saf(logits, rows, step)
            loss.backward()
            return loss

        optimizer.step(closure)
        seconds.append(time.perf_counter() - start)
    return median(seconds[5:])


@pytest.mark.claim
def test_flat_minima_for_free(claim_record):
    found = {kind: [trained(seed, kind)[0] for seed in SEEDS] for kind in ("sgd", "saf", "mesa", "sam")}
    verdicts = []
    for kind in ("saf", "mesa"):
        better = all(ours > plain for ours, plain in zip(found[kind], found["sgd"]))
        verdicts.append(better and mean(found[kind]) > mean(found["sgd"]) + 0.02)
        claim_record(
            "saf",
            metric=f"accuracy with 20 % wrong labels, {kind.upper()} against SGD",
            method=found[kind],
            baseline=found["sgd"],
            margin="higher by more than 0.02, and on every seed",
            holds=verdicts[-1],
        )
    assert all(verdicts), found


@pytest.mark.claim
def test_cost_of_a_step(claim_record):
    rounds = [{kind: step_seconds(kind) for kind in ("sgd", "saf", "sam")} for _ in range(3)]
    saf, sam = ([r[kind] / r["sgd"] for r in rounds] for kind in ("saf", "sam"))
    holds = median(saf) < 1.3 and median(sam) > 1.6
    claim_record(
        "saf",
        metric="time of a step over that of SGD, SAF against SAM",
        method=saf,
        baseline=sam,
        margin="below 1.3 against above 1.6",
        holds=holds,
    )
    assert holds, rounds
