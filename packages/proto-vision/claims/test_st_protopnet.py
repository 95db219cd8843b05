"""Claim of ST-ProtoPNet: trivial and support prototypes complement each other; support ones lie near other classes.

Digits of 8 x 8 pixels, half for training. Two plain convolutions, five prototypes per class and branch, 30 epochs,
projection, five epochs of the heads. Baseline of the second figure: the same network's trivial branch. A network that
only ever trains its trivial branch is reported beside it, as the card has no margin for it.
"""

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from proto_core.training import enter_stage
from proto_vision import STProtoPNetModule
from proto_vision.st_protopnet import STSchedule

SEEDS = (0, 1, 2)
BRANCHES = ("trivial", "support")


def data():
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.5, stratify=labels, random_state=0)
    x, z, y, t = (torch.from_numpy(part) for part in parts)
    return x.float().reshape(-1, 1, 8, 8), y, z.float().reshape(-1, 1, 8, 8), t


def train(net, x, y, epochs, generator, branches):
    """Batches of 64 that take turns over the branches, as the module's own step does."""
    optimizer = net.configure_optimizers()
    for _ in range(epochs):
        for turn, rows in enumerate(torch.randperm(len(x), generator=generator).split(64)):
            name = branches[turn % len(branches)]
            loss = net.branch_loss(name, net.network.branch(name, net.network.backbone(x[rows])), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            net.network.normalize_prototypes()


@torch.no_grad()
def accuracies(net, z, t):
    out = net.network.eval()(z)
    net.network.train()
    named = {"sum": out.logits, "trivial": out.logits_trivial, "support": out.logits_support}
    return {name: float((logits.argmax(1) == t).float().mean()) for name, logits in named.items()}


@torch.no_grad()
def nearness(net, name):
    """Mean over pairs of classes of the smallest product of their prototypes."""
    vectors = net.network.layer(name).prototypes.flatten(1)
    products = (vectors @ vectors.T).reshape(10, 5, 10, 5).amin(dim=(1, 3))
    return float(products[~torch.eye(10, dtype=torch.bool)].mean())


def run(seed, branches):
    x, y, z, t = data()
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    schedule = STSchedule(0, 30, 5, backbone_lr=3e-3, head_lr=1e-3, weight_decay=0.0, milestones=())
    net = STProtoPNetModule(
        "conv2", 10, image_size=8, in_channels=1, prototypes_per_class=5, prototype_channels=32, schedule=schedule
    )
    enter_stage(net, net.stages[1])
    train(net, x, y, 30, g, branches)
    before = accuracies(net, z, t)
    near = {name: nearness(net, name) for name in BRANCHES}
    net.network.push(zip(x.split(100), y.split(100)))
    pushed = accuracies(net, z, t)
    enter_stage(net, net.stages[2])
    train(net, x, y, 5, g, branches)
    return before, near, pushed, accuracies(net, z, t)


@pytest.mark.claim
def test_st_protopnet(claim_record: Callable[..., None]) -> None:
    runs = [run(seed, BRANCHES) for seed in SEEDS]
    lone = [run(seed, BRANCHES[:1])[0]["trivial"] for seed in SEEDS]
    support, trivial = ([near[name] for _, near, _, _ in runs] for name in ("support", "trivial"))
    apart = mean(support) - mean(trivial) >= 0.5
    claim_record(
        "st_protopnet",
        metric="smallest product of two classes' prototypes, mean (support; baseline: trivial prototypes)",
        method=support,
        baseline=trivial,
        margin="mean larger by at least 0.5",
        holds=apart,
    )
    summed, alone, other = ([before[name] for before, *_ in runs] for name in ("sum", "trivial", "support"))
    better = mean(summed) >= mean(alone) + 0.005 and mean(summed) >= max(mean(alone), mean(other)) - 0.005
    claim_record(
        "st_protopnet",
        metric=f"accuracy of both branches (baseline: its trivial branch; support branch {mean(other):.3f}, a network "
        f"with the trivial branch alone {mean(lone):.3f})",
        method=summed,
        baseline=alone,
        margin="mean higher by at least 0.005",
        holds=better,
    )
    after = [heads["sum"] for *_, heads in runs]
    pushed = mean(run["sum"] for _, _, run, _ in runs)
    kept = mean(after) >= mean(summed) - 0.03
    claim_record(
        "st_protopnet",
        metric=f"accuracy after projection and heads (baseline: before the projection; right after it {pushed:.3f})",
        method=after,
        baseline=summed,
        margin="mean lower by at most 0.03",
        holds=kept,
    )
    assert apart, (support, trivial)
    assert better, (summed, alone)
    assert kept, (after, summed)
