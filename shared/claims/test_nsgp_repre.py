"""Two tasks in a row on generated data: what is left of the first with null-space projection and without."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.optim import NullSpaceProjection, NullSpaceSGD

SEEDS = range(3)


def task(rng: np.random.Generator) -> list[tuple[Tensor, Tensor]]:
    """Training and test set: six hidden variables seen through a random matrix, four classes."""
    mixing, rule = rng.normal(size=(32, 6)) / 6**0.5, rng.normal(size=(6, 4))
    sets = []
    for count in (800, 400):
        hidden = rng.normal(size=(count, 6))
        x = hidden @ mixing.T + 0.05 * rng.normal(size=(count, 32))
        sets.append((torch.tensor(x, dtype=torch.float32), torch.tensor((hidden @ rule).argmax(1))))
    return sets


def train(body: nn.Module, head: nn.Linear, data: tuple[Tensor, Tensor], named, projection) -> None:
    x, y = data
    first = NullSpaceSGD(named, lr=0.05, momentum=0.9, projection=projection)
    second = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(32):
            first.zero_grad()
            second.zero_grad()
            F.cross_entropy(head(body(x[rows])), y[rows]).backward()
            first.step()
            second.step()


def accuracy(body: nn.Module, head: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return (head(body(data[0])).argmax(1) == data[1]).float().mean().item()


def run(seed: int, project: bool) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    one, two = task(rng), task(rng)
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    heads = [nn.Linear(64, 4), nn.Linear(64, 4)]
    train(body, heads[0], one[0], list(body.named_parameters()), None)
    before = accuracy(body, heads[0], one[1])
    projection = None
    if project:
        projection = NullSpaceProjection()
        with torch.no_grad(), projection.collect(body, ["0", "2"]):
            for row in one[0][0][:300]:
                body(row.unsqueeze(0))
        projection.fit()
    named = [(name, p) for name, p in body.named_parameters() if not project or not name.endswith("bias")]
    train(body, heads[1], two[0], named, projection)
    after = accuracy(body, heads[0], one[1])
    return {"drop": before - after, "second": accuracy(body, heads[1], two[1])}


@pytest.mark.claim
def test_projection_forgets_less(claim_record):
    projected, plain = ([run(seed, project) for seed in SEEDS] for project in (True, False))
    verdicts = []
    for metric, name, margin, check in [
        ("loss of accuracy on task 1", "drop", "less than half", lambda a, b: a < b / 2),
        ("accuracy on task 2", "second", "within 0.03", lambda a, b: a >= b - 0.03),
    ]:
        method, baseline = ([row[name] for row in rows] for rows in (projected, plain))
        holds = bool(check(np.mean(method), np.mean(baseline)))
        verdicts.append((metric, holds))
        claim_record("nsgp_repre", metric=metric, method=method, baseline=baseline, margin=margin, holds=holds)
    assert all(holds for _, holds in verdicts), verdicts
