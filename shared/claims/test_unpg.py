"""UNPG verifies identities that it never saw better than ArcFace does, at low false accept rates."""

from statistics import mean

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proto_core.data import rotated_classes
from proto_core.losses import UNPGLoss
from proto_core.metrics import tar_at_far

SEEDS = range(3)
TRAIN, IDENTITIES, EACH = 160, 240, 10
MARGINS = {1e-3: 0.03, 1e-2: 0.08}


def rates(seed: int, negatives: str) -> list[float]:
    """TAR at each false accept rate over all pairs of the unseen identities."""
    x, y = (torch.from_numpy(part) for part in rotated_classes(seed, IDENTITIES, EACH, 20, 40, 0.7, 1.0))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(60, 128), nn.ReLU(), nn.Linear(128, 16))
    loss = UNPGLoss(16, TRAIN, "arcface", s=16.0, m=0.3, whisker=1.5, negatives=negatives)
    with torch.no_grad():
        loss.weight.copy_(0.1 * torch.randn(TRAIN, 16))
    optimizer = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=2e-3)
    for _ in range(400):
        rows = torch.randint(TRAIN * EACH, (128,))
        optimizer.zero_grad()
        loss(net(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        unit, labels = F.normalize(net(x[y >= TRAIN])), y[y >= TRAIN]
    one, two = torch.triu_indices(len(unit), len(unit), 1)
    scores = (unit @ unit.T)[one, two]
    return tar_at_far(scores, (labels[one] == labels[two]).long(), list(MARGINS), mode="upper").tolist()


@pytest.mark.claim
def test_unseen_identities_are_verified(claim_record):
    unified, plain = ([rates(seed, kind) for seed in SEEDS] for kind in ("unified", "class"))
    verdicts = []
    for (far, margin), method, baseline in zip(MARGINS.items(), zip(*unified), zip(*plain)):
        verdicts.append(mean(method) >= mean(baseline) + margin)
        claim_record(
            "unpg",
            metric=f"TAR at FAR {far:g}, unseen identities, against ArcFace",
            method=method,
            baseline=baseline,
            margin=f"higher by at least {margin}",
            holds=verdicts[-1],
        )
    assert all(verdicts), (unified, plain)
