"""Multi-Similarity Loss learns a metric that retrieves classes it never saw."""

from statistics import mean

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.data import rotated_classes
from proto_core.losses import MultiSimilarityLoss, gpw_surrogate, pair_weights
from proto_core.metrics import recall_at_k

SEEDS = range(3)
TRAIN, CLASSES, EACH = 60, 100, 20


def contrastive(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The contrastive loss by its pair weights: value aside, it trains the same."""
    unit = F.normalize(embeddings)
    similarity = unit @ unit.T
    return gpw_surrogate(similarity, labels, pair_weights(similarity, labels, "contrastive", lam=0.5)) / len(labels)


def recall(embeddings: Tensor, labels: Tensor) -> float:
    return recall_at_k(F.normalize(embeddings), labels, k=(1,))[1]


def trained(seed: int, loss) -> float:
    """Recall@1 on the classes that were not trained on."""
    x, y = (torch.from_numpy(part) for part in rotated_classes(seed, CLASSES, EACH, 20, 40, 1.0, 1.5))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(60, 128), nn.ReLU(), nn.Linear(128, 16))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(300):
        classes = torch.randperm(TRAIN)[:16]
        rows = (classes.unsqueeze(1) * EACH + torch.rand(16, EACH).argsort(dim=1)[:, :5]).flatten()
        optimizer.zero_grad()
        loss(F.normalize(net(x[rows])), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return recall(net(x[y >= TRAIN]), y[y >= TRAIN])


def raw(seed: int) -> float:
    x, y = (torch.from_numpy(part) for part in rotated_classes(seed, CLASSES, EACH, 20, 40, 1.0, 1.5))
    return recall(x[y >= TRAIN], y[y >= TRAIN])


@pytest.mark.claim
def test_unseen_classes_are_retrieved(claim_record):
    method = [trained(seed, MultiSimilarityLoss()) for seed in SEEDS]
    baselines = {
        "raw input": ([raw(seed) for seed in SEEDS], 0.04),
        "contrastive loss": ([trained(seed, contrastive) for seed in SEEDS], 0.02),
    }
    verdicts = []
    for name, (figures, margin) in baselines.items():
        verdicts.append(mean(method) >= mean(figures) + margin)
        claim_record(
            "multi_similarity",
            metric=f"Recall@1 on unseen classes, against {name}",
            method=method,
            baseline=figures,
            margin=f"higher by at least {margin}",
            holds=verdicts[-1],
        )
    assert all(verdicts), (method, baselines)
