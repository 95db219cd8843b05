"""Temperature trades uniformity for tolerance; the hard contrastive loss at a large temperature is uniform again."""

from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.losses import HardContrastiveLoss, InfoNCELoss
from proto_core.metrics import nearest, tolerance, uniformity

SEEDS = range(3)
TEMPERATURES = (0.07, 0.3, 1.0)


def view(x: Tensor) -> Tensor:
    """Shifted by up to a pixel, with noise."""
    padded = F.pad(x.unflatten(1, (8, 8)), (1, 1, 1, 1))
    shift = torch.randint(3, (2, len(x)))
    rows = shift[0].unsqueeze(1) + torch.arange(8)
    columns = shift[1].unsqueeze(1) + torch.arange(8)
    crop = padded[torch.arange(len(x))[:, None, None], rows.unsqueeze(2), columns.unsqueeze(1)]
    return crop.flatten(1) + 0.2 * torch.randn(len(x), 64)


def measured(seed: int, loss: nn.Module) -> tuple[float, float, float]:
    """Uniformity, tolerance and 5-nearest-neighbour accuracy on clean test images."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64), nn.BatchNorm1d(64, affine=False)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(30):
        for rows in torch.randperm(1200).split(240):
            optimizer.zero_grad()
            loss(net(view(x[rows])), net(view(x[rows]))).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        z = F.normalize(net(x))
    _, near = nearest(z[1200:], z[:1200], k=5)
    found = y[near].mode(dim=1).values
    spread = uniformity(z[1200:]).item(), tolerance(z[1200:], y[1200:]).item()
    return *spread, (found == y[1200:]).float().mean().item()


@pytest.mark.claim
def test_temperature_and_hardness(claim_record):
    by_temperature = [[measured(seed, InfoNCELoss(tau)) for seed in SEEDS] for tau in TEMPERATURES]
    hard = [measured(seed, HardContrastiveLoss(1.0, 0.1)) for seed in SEEDS]

    def column(runs: list[tuple[float, float, float]], which: int) -> list[float]:
        return [run[which] for run in runs]

    verdicts = []

    def record(metric: str, method: list[float], baseline: list[float], margin: str, holds: bool) -> None:
        verdicts.append((metric, holds))
        claim_record(
            "contrastive_behaviour", metric=metric, method=method, baseline=baseline, margin=margin, holds=holds
        )

    for which, name, step in [(0, "uniformity", 0.1), (1, "tolerance", 0.01)]:
        means = [mean(column(runs, which)) for runs in by_temperature]
        record(
            f"{name}, temperature 1.0 against 0.07",
            column(by_temperature[2], which),
            column(by_temperature[0], which),
            f"rises by at least {step} from 0.07 to 0.3 and from 0.3 to 1.0",
            all(b - a >= step for a, b in pairwise(means)),
        )
    warm = by_temperature[2]
    record(
        "uniformity of the hard loss at temperature 1.0 against InfoNCE there",
        column(hard, 0),
        column(warm, 0),
        "lower by at least 0.3",
        mean(column(hard, 0)) <= mean(column(warm, 0)) - 0.3,
    )
    record(
        "5-NN accuracy of the hard loss at temperature 1.0 against InfoNCE there",
        column(hard, 2),
        column(warm, 2),
        "higher by at least 0.04",
        mean(column(hard, 2)) >= mean(column(warm, 2)) + 0.04,
    )
    assert all(holds for _, holds in verdicts), verdicts
