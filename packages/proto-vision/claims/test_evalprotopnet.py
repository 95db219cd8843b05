"""Claim of EvalProtoPNet: alignment with shallow features carries over to unseen images at no cost in accuracy.

Made-up "birds" of three coloured discs on noise, four classes. Baseline: the same network with weight 0 of the
alignment. The paper's gain in consistency needs a deep pretrained backbone and the part labels of CUB: consistency and
stability are reported without a margin.
"""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.losses import ClusterLoss, SeparationLoss, SubspaceOrthogonalityLoss
from proto_core.metrics import assign_parts, consistency_score, perturb_images, stability_score
from proto_vision import EvalProtoPNet
from proto_vision.evalprotopnet import SDFALoss

SEEDS = (0, 1, 2)
CENTRES = np.array([(16, 16), (32, 44), (48, 20)])
COLOURS = np.random.default_rng(0).uniform(size=(4, 3, 3))


class Birds(NamedTuple):
    images: Tensor
    targets: Tensor
    parts: Tensor
    visible: Tensor


def birds(per_class: int, rng: np.random.Generator) -> Birds:
    """Images ``[N, 3, 64, 64]`` with the places ``(x, y)`` of their three parts."""
    y, x = np.mgrid[:64, :64]
    images, targets, parts, visible = [], [], [], []
    for c in range(4):
        for _ in range(per_class):
            image = rng.normal(0.5, 0.1, (3, 64, 64))
            places = CENTRES + rng.integers(-6, 7, 2)
            shown = rng.uniform(size=3) >= 0.15
            for m in np.flatnonzero(shown):
                disc = (x - places[m, 0]) ** 2 + (y - places[m, 1]) ** 2 <= 36
                image[:, disc] = (COLOURS[c, m] + rng.normal(0, 0.05, 3))[:, None]
            images.append(image.clip(0, 1))
            targets.append(c)
            parts.append(places)
            visible.append(shown)
    return Birds(
        torch.tensor(np.array(images), dtype=torch.float32),
        torch.tensor(targets),
        torch.tensor(np.array(parts)),
        torch.tensor(np.array(visible)),
    )


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shallow = self.first(x)
        return shallow, self.second(shallow)


def run(seed: int, weight: float) -> dict[str, float]:
    """Train and measure on unseen images: gap, accuracy, consistency, stability."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(100 + seed)
    train, test = birds(60, rng), birds(40, rng)
    net = EvalProtoPNet(Backbone(), 64, 4, prototypes_per_class=4, prototype_channels=16)
    layer, align = net.prototypes, SDFALoss(4)
    cluster, separation, orthogonality = ClusterLoss(), SeparationLoss(), SubspaceOrthogonalityLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(12):
        for rows in torch.randperm(240).split(32):
            out, y = net(train.images[rows]), train.targets[rows]
            loss = F.cross_entropy(out.logits, y) + 1e-4 * orthogonality(layer.prototypes, 4)
            loss = loss + 0.8 * cluster(out.max_cosine, y, layer.class_identity)
            loss = loss + 0.08 * separation(out.max_cosine, y, layer.class_identity)
            if epoch >= 2:
                loss = loss + weight * align(out.maps, out.shallow, out.deep, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            layer.normalize_()
    with torch.no_grad():
        out = net(test.images)
        noisy = net(perturb_images(test.images, std=0.1, eps=0.125, generator=torch.Generator().manual_seed(seed)))
        gap = float(SDFALoss(4, threshold=0)(out.maps, out.shallow, out.deep, test.targets))
    own = test.targets[:, None] * 4 + torch.arange(4)
    pick = own[:, :, None, None].expand(-1, -1, *out.maps.shape[2:])
    met, met_noisy = (
        assign_parts(maps.gather(1, pick), test.parts, test.visible, img_size=64, half_size=10)
        for maps in (out.maps, noisy.maps)
    )
    return {
        "gap": gap,
        "accuracy": float((out.logits.argmax(1) == test.targets).float().mean()),
        "consistency": consistency_score(met, test.visible, test.targets, 4),
        "stability": stability_score(met, met_noisy, test.targets, 4),
    }


@pytest.mark.claim
def test_evalprotopnet(claim_record: Callable[..., None]) -> None:
    with_it, without = ([run(seed, weight) for seed in SEEDS] for weight in (0.5, 0.0))
    ours, theirs = ({key: [r[key] for r in runs] for key in runs[0]} for runs in (with_it, without))
    aligned = mean(ours["gap"]) <= 0.5 * mean(theirs["gap"])
    claim_record(
        "evalprotopnet",
        metric="difference of deep and shallow similarities on unseen images (baseline: without alignment)",
        method=ours["gap"],
        baseline=theirs["gap"],
        margin="mean at most half",
        holds=aligned,
    )
    kept = mean(ours["accuracy"]) >= mean(theirs["accuracy"]) - 0.03
    means = {key: (mean(ours[key]), mean(theirs[key])) for key in ("consistency", "stability")}
    others = ", ".join(f"{key} {one:.1f} against {two:.1f}" for key, (one, two) in means.items())
    claim_record(
        "evalprotopnet",
        metric=f"accuracy (baseline: without alignment; {others}, no margin)",
        method=ours["accuracy"],
        baseline=theirs["accuracy"],
        margin="mean lower by at most 0.03",
        holds=kept,
    )
    assert aligned, (ours["gap"], theirs["gap"])
    assert kept, (ours["accuracy"], theirs["accuracy"])
