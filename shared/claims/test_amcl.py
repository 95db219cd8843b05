"""AMCL against one fixed temperature on distorted digits: is a learned temperature for every pair as good a score?

On the card's two seeds the AUC against the fixed temperature does not hold (0.695 against 0.708, margin -0.005). Over
seeds 0 to 5 it is 0.708 against 0.709, with a standard deviation between seeds of 0.024 and 0.009: two seeds cannot
decide a margin of 0.005. The loss and its gradients equal the reference's and a loop over pairs to 1e-10.
"""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.losses import AdaptiveMultiHeadContrastiveLoss, InfoNCELoss
from proto_core.losses.pairs import masked_logsumexp

SEEDS = (0, 1)


def view(x: Tensor) -> Tensor:
    """Shifted by up to two pixels, brighter or darker, with noise and holes."""
    padded = F.pad(x.reshape(-1, 8, 8), (2, 2, 2, 2))
    down, across = torch.randint(0, 5, (2, len(x), 1))
    rows, columns = down + torch.arange(8), across + torch.arange(8)
    shifted = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]].reshape(len(x), 64)
    bright = shifted * (0.5 + torch.rand(len(x), 1)) + 0.2 * torch.randn(len(x), 64)
    return bright * (torch.rand(len(x), 64) >= 0.1)


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))


def fixed_temperature(one: Tensor, two: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent over the rows of both views."""
    z, n = F.normalize(torch.cat([one, two]), dim=1), len(one)
    scores = z @ z.T / temperature
    rows = torch.arange(2 * n)
    return (masked_logsumexp(scores, rows[:, None] != rows) - scores[rows, (rows + n) % (2 * n)]).mean()


def trained(seed: int, adaptive: bool) -> dict[str, float]:
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x, y = torch.tensor(digits.data[order] / 16, dtype=torch.float32), digits.target[order]
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()
    )
    heads = nn.ModuleList(head() for _ in range(3 if adaptive else 1))
    loss = AdaptiveMultiHeadContrastiveLoss(32, 3, lower=0.1, negatives="logsumexp")
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters(), *loss.parameters()], lr=1e-3)

    def projections(rows: Tensor) -> Tensor:
        features = encoder(view(rows))
        return F.normalize(torch.stack([project(features) for project in heads]), dim=-1)

    finite = True
    for _ in range(8):
        for rows in torch.randperm(1200).split(60):
            one, two = projections(x[rows]), projections(x[rows])
            total = loss(one, two) if adaptive else fixed_temperature(one[0], two[0])
            finite &= bool(total.isfinite())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    encoder.eval()
    with torch.no_grad():
        features = encoder(x).numpy()
        one, two = projections(x[1200:1500]), projections(x[1200:1500])
        cosine = one @ two.mT
        scaled = cosine / loss.temperature.pairwise(one, two) if adaptive else cosine
    probe = LogisticRegression(max_iter=2000).fit(features[:1200], y[:1200]).score(features[1200:], y[1200:])
    same = torch.eye(300).flatten().numpy()
    return {
        "probe": float(probe),
        "AUC": float(roc_auc_score(same, scaled.mean(0).flatten().numpy())),
        "AUC of cosine": float(roc_auc_score(same, cosine.mean(0).flatten().numpy())),
        "finite": float(finite),
    }


def test_baseline_is_info_nce_over_both_views():
    one, two = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([one, two])
    single = [
        InfoNCELoss(0.5)(
            rows[i : i + 1], rows[(i + 5) % 10].unsqueeze(0), rows[[j for j in range(10) if j % 5 != i % 5]]
        )
        for i in range(10)
    ]
    torch.testing.assert_close(fixed_temperature(one, two), torch.stack(single).mean())


@pytest.mark.claim
def test_learned_temperatures_keep_up(claim_record):
    amcl, plain = ([trained(seed, adaptive) for seed in SEEDS] for adaptive in (True, False))

    def column(rows, name):
        return [row[name] for row in rows]

    figures = [
        ("AUC of cosine/tau against AUC of cosine of the same model", "AUC", (amcl, "AUC of cosine"), -0.002),
        ("AUC of cosine/tau against one fixed temperature", "AUC", (plain, "AUC"), -0.005),
        ("linear probe against one fixed temperature", "probe", (plain, "probe"), -0.02),
    ]
    verdicts = [("finite", all(column(amcl, "finite")))]
    for metric, name, (rows, other), least in figures:
        method, baseline = column(amcl, name), column(rows, other)
        holds = bool(np.mean(method) >= np.mean(baseline) + least)
        verdicts.append((metric, holds))
        claim_record(
            "amcl", metric=metric, method=method, baseline=baseline, margin=f"at least {least:+} of it", holds=holds
        )
    assert all(holds for _, holds in verdicts), verdicts
