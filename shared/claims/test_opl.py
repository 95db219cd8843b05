"""Orthogonal Projection Loss beside cross entropy: classes of the features become orthogonal, accuracy stays."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from proto_core.losses import OrthogonalProjectionLoss

SEEDS = range(5)


def trained(seed: int, weight: float) -> tuple[float, float, float]:
    """Test accuracy, s and d of a small network on the digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(range(len(y)), test_size=0.5, stratify=digits.target, random_state=seed)
    torch.manual_seed(seed)
    body, head = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU()), nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
    loss = OrthogonalProjectionLoss(gamma=0.5)
    rows = torch.tensor(train)
    for _ in range(60):
        for batch in rows[torch.randperm(len(rows))].split(128):
            features = body(x[batch])
            total = F.cross_entropy(head(features), y[batch]) + weight * loss(features, y[batch])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    with torch.no_grad():
        features = body(x[test])
        within, between = loss.components(features, y[test])
        return (head(features).argmax(1) == y[test]).float().mean().item(), within.item(), between.item()


@pytest.mark.claim
def test_classes_become_orthogonal(claim_record):
    plain = [trained(seed, 0.0) for seed in SEEDS]
    with_opl = [trained(seed, 1.0) for seed in SEEDS]

    def mean(rows, value):
        return sum(value(*row) for row in rows) / len(rows)

    figures = [
        ("accuracy on digits", lambda a, s, d: a, "not lower by more than 0.01", lambda o, p: o >= p - 0.01),
        ("mean |cosine| between classes", lambda a, s, d: d, "lower by at least 0.2", lambda o, p: o <= p - 0.2),
        (
            "cosine within minus between classes",
            lambda a, s, d: s - d,
            "higher by at least 0.15",
            lambda o, p: o >= p + 0.15,
        ),
    ]
    verdicts = []
    for metric, value, margin, check in figures:
        holds = check(mean(with_opl, value), mean(plain, value))
        verdicts.append((metric, holds))
        claim_record(
            "opl",
            metric=metric,
            method=[value(*row) for row in with_opl],
            baseline=[value(*row) for row in plain],
            margin=margin,
            holds=holds,
        )
    assert all(holds for _, holds in verdicts), verdicts
