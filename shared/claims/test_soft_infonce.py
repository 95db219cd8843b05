"""Weighting negatives by relevance costs no retrieval and finds more of what is relevant."""

from statistics import mean

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.losses import SoftInfoNCELoss

SEEDS = range(3)
TRAIN = 3000


def pairs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, codes and the meaning z of both: near duplicates around 250 prototypes."""
    rng = np.random.default_rng(seed)
    prototypes = rng.normal(size=(250, 12))
    which = rng.integers(0, 250, 4000)
    z = prototypes[which] + 0.12 * rng.normal(size=(4000, 12))
    a, b = rng.normal(size=(12, 40)), rng.normal(size=(12, 40))
    query = np.tanh(0.5 * z @ a) + 0.3 * rng.normal(size=(4000, 40))
    code = np.tanh(0.5 * z @ b) + 0.3 * rng.normal(size=(4000, 40))
    return tuple(torch.tensor(part, dtype=torch.float32) for part in (query, code, z))


def run(seed: int, loss: SoftInfoNCELoss) -> tuple[float, float]:
    """Mean reciprocal rank and relevance of the ten best on unseen pairs."""
    query, code, z = pairs(seed)
    meaning = F.normalize(z)
    torch.manual_seed(seed)
    nets = nn.ModuleList(nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(2))
    optimizer = torch.optim.Adam(nets.parameters(), lr=1e-3)
    for _ in range(15):
        for rows in torch.randperm(TRAIN).split(128):
            if len(rows) < 128:
                continue
            q, c = (F.normalize(net(part[rows])) for net, part in zip(nets, (query, code)))
            optimizer.zero_grad()
            loss(q, c, meaning[rows] @ meaning[rows].T).backward()
            optimizer.step()
    with torch.no_grad():
        q, c = (F.normalize(net(part[TRAIN:])) for net, part in zip(nets, (query, code)))
        scores, truth = q @ c.T, meaning[TRAIN:] @ meaning[TRAIN:].T
    rank = 1 + (scores > scores.diagonal().unsqueeze(1)).sum(1)
    near = truth.fill_diagonal_(-2).topk(5, dim=1).indices
    best = scores.topk(10, dim=1).indices
    relevant = (best.unsqueeze(2) == near.unsqueeze(1)).any(2).float().mean()
    return (1 / rank).mean().item(), relevant.item()


@pytest.mark.claim
def test_weighted_negatives(claim_record):
    def runs(alpha: float, beta: float, temperature: float) -> list[tuple[float, float]]:
        return [run(seed, SoftInfoNCELoss(alpha, beta, temperature, score_scale=10.0)) for seed in SEEDS]

    plain, soft, sharp = runs(0.0, 1.0, 1.0), runs(1.0, 1.0, 0.1), runs(8.0, 1.0, 0.05)
    verdicts = []
    for metric, method, baseline, margin, least in [
        (
            "mean reciprocal rank, soft (t 0.1) against InfoNCE",
            [m for m, _ in soft],
            [m for m, _ in plain],
            "not lower by 0.001",
            -0.001,
        ),
        (
            "relevance of the ten best, soft (t 0.05, alpha 8) against InfoNCE",
            [r for _, r in sharp],
            [r for _, r in plain],
            "higher by more than 0.002",
            0.002,
        ),
    ]:
        verdicts.append(mean(method) > mean(baseline) + least)
        claim_record("soft_infonce", metric=metric, method=method, baseline=baseline, margin=margin, holds=verdicts[-1])
    assert all(verdicts), (plain, soft, sharp)
