"""Class centres classify better than a linear head with cross entropy, and their vectors stay small.

Reported without a margin by the card: the five-component explained variance of the features, which is higher for cross
entropy here, not for the harmonic heads.
"""

from statistics import mean

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from proto_core.layers import DistanceLayer
from proto_core.losses import HarmonicLoss, harmonic_log_probs

SEEDS = range(3)


def trained(seed: int, metric: str | None) -> tuple[float, float]:
    """Test accuracy, and mean norm of the class vectors."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(range(len(y)), test_size=0.5, stratify=digits.target, random_state=0)
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    head = nn.Linear(64, 10) if metric is None else DistanceLayer(64, 10, metric=metric)
    loss = F.cross_entropy if metric is None else HarmonicLoss(1.0)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
    rows = torch.tensor(train)
    for _ in range(60):
        for batch in rows[torch.randperm(len(rows))].split(64):
            optimizer.zero_grad()
            loss(head(body(x[batch])), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        out = head(body(x[test]))
        scores = out if metric is None else harmonic_log_probs(out)
        vectors = head.weight if metric is None else head.centers
        return (scores.argmax(1) == y[test]).float().mean().item(), vectors.norm(dim=1).mean().item()


@pytest.mark.claim
def test_centres_classify_better_and_stay_small(claim_record):
    plain = [trained(seed, None) for seed in SEEDS]
    verdicts = []
    for metric in ("cosine", "sq_euclidean"):
        runs = [trained(seed, metric) for seed in SEEDS]
        for which, what, margin, holds in [
            (0, "accuracy on digits", "higher by at least 0.005", lambda ours, theirs: ours >= theirs + 0.005),
            (1, "norm of the class vectors", "less than 0.75 times", lambda ours, theirs: ours < 0.75 * theirs),
        ]:
            method, baseline = [run[which] for run in runs], [run[which] for run in plain]
            verdicts.append((metric, what, holds(mean(method), mean(baseline))))
            claim_record(
                "harmonic",
                metric=f"{what}, {metric} centres against a linear head",
                method=method,
                baseline=baseline,
                margin=margin,
                holds=verdicts[-1][2],
            )
    assert all(verdict[2] for verdict in verdicts), verdicts
