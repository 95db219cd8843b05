"""Claim of explaining prototypes: scores follow what tells the classes apart, and training and test scores agree.

Made-up images of red or blue discs and squares; a small ProtoPNet learns the colour, its form does not matter. So a
turned hue must cost more than a bent shape. Texture, which these images do not have, must cost nothing.

What is asked of seeds 0 to 2 holds but for "hue against shape" of seed 2: there a turn by 0.1 (25 of 256 steps) leaves
red and blue near enough to the prototypes to cost 0.52 against 0.57 for shape. It is the seed, not the scores: of seeds
0 to 11 one does not learn the colours at all, and of the other eleven ten hold, by a factor of two in the mean. Noise
of the background in grey, or one shift of colour per image instead of noise per pixel, fails at the same seed. A turn
by 0.33 leaves no doubt on any seed that learns.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.losses import ClusterLoss, SeparationLoss
from proto_core.prototypes import PartPrototypes
from proto_vision.explaining import CHARACTERISTICS, PrototypeExplainer, perturb

SEEDS = (0, 1, 2)
COLOURS = ((200, 40, 40), (40, 40, 200))


def paint(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """``[N, 3, 48, 48]`` uint8 images of both colours and both forms in turn, and which colour."""
    rows, columns = np.mgrid[:48, :48]
    images, targets = [], []
    for n in range(count):
        colour, square = n % 2, n // 2 % 2
        y, x = 24 + rng.integers(-8, 9, 2)
        inside = (
            (abs(rows - y + 0.5) < 9) & (abs(columns - x + 0.5) < 9)
            if square
            else (rows - y) ** 2 + (columns - x) ** 2 <= 100
        )
        image = 128 + rng.normal(0, 12, (3, 48, 48))
        noise = rng.normal(0, 10, (3, 48, 48))
        image = np.where(inside, np.array(COLOURS[colour])[:, None, None] + noise, image)
        images.append(image.clip(0, 255).astype(np.uint8))
        targets.append(colour)
    return torch.from_numpy(np.stack(images)), torch.tensor(targets)


class Network(nn.Module):
    """Three convolutions under ProtoPNet's layer; maps of similarities come out."""

    def __init__(self) -> None:
        super().__init__()
        steps = zip((3, 16, 32), (16, 32, 32), (nn.ReLU(), nn.ReLU(), nn.Sigmoid()))
        self.features = nn.Sequential(*[layer for i, o, act in steps for layer in (nn.Conv2d(i, o, 3, 2, 1), act)])
        self.prototypes = PartPrototypes(2, 2, 32, similarity="l2_log")
        identity = self.prototypes.class_identity.T
        self.register_buffer("head", identity - 0.5 * (1 - identity))

    def forward(self, images: Tensor) -> Tensor:
        return self.prototypes(self.features(images))[1]

    def logits(self, images: Tensor) -> Tensor:
        return self(images).amax((2, 3)) @ self.head.T


class Scores(NamedTuple):
    train: Tensor
    test: Tensor
    turned: float
    accuracy: float


def run(seed: int) -> Scores:
    """Global scores on training and test images, the score of hue turned by 0.33, the accuracy."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    (images, targets), (unseen, unseen_targets) = paint(200, rng), paint(100, rng)
    more, _ = paint(50, rng)
    net, cluster, separation = Network(), ClusterLoss(), SeparationLoss()
    layer = net.prototypes
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(200).split(32):
            x, y = images[rows] / 255, targets[rows]
            features = net.features(x)
            near = -layer.distance_maps(features).amin((2, 3))
            loss = F.cross_entropy(layer(features)[0] @ net.head.T, y)
            loss = loss + 0.8 * cluster(near, y, layer.class_identity)
            loss = loss + 0.08 * separation(near, y, layer.class_identity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((net.logits(unseen / 255).argmax(1) == unseen_targets).float().mean())
    explainer = PrototypeExplainer(net, lambda image: image / 255)
    train = explainer.run(images[:150], batch_size=50).global_scores()
    explainer.reset()
    test = explainer.run(torch.cat([unseen, more]), batch_size=50).global_scores()
    strong = PrototypeExplainer(net, lambda image: image / 255, characteristics=("hue",))
    pairs = torch.stack(
        [images[:150], torch.stack([perturb(image, "hue", strength=0.33) for image in images[:150]])], 1
    )
    strong.update(pairs / 255)
    return Scores(train, test, float(strong.global_scores().mean()), accuracy)


@pytest.mark.claim
def test_explaining_prototypes(claim_record: Callable[..., None]) -> None:
    found = [run(seed) for seed in SEEDS]
    means = [dict(zip(CHARACTERISTICS, scores.train.mean(0).tolist())) for scores in found]
    agreement = [float(torch.corrcoef(torch.stack([s.train.flatten(), s.test.flatten()]))[0, 1]) for s in found]
    accuracy = ", ".join(f"{scores.accuracy:.2f}" for scores in found)
    hue, shape = [m["hue"] for m in means], [m["shape"] for m in means]
    turned, texture = [scores.turned for scores in found], [m["texture"] for m in means]
    rows = [
        ("score of hue turned by 0.33 against shape", turned, shape, "more than twice on every seed", 2.0),
        ("score of hue against shape", hue, shape, "higher on every seed", 1.0),
        ("score of hue turned by 0.33 against 0.1", turned, hue, "higher on every seed", 1.0),
    ]
    results = {}
    for metric, ours, theirs, margin, factor in rows:
        results[metric] = all(a > factor * b for a, b in zip(ours, theirs))
        claim_record(
            "explaining_prototypes",
            metric=f"{metric} (labels: colour; accuracy {accuracy})",
            method=ours,
            baseline=theirs,
            margin=margin,
            holds=results[metric],
        )
    for metric, ours, floor, margin, holds in [
        ("score of texture, which the images lack", texture, 0.05, "below 0.05", all(t < 0.05 for t in texture)),
        ("correlation of training and test scores", agreement, 0.98, "0.98", all(r >= 0.98 for r in agreement)),
    ]:
        results[metric] = holds
        claim_record(
            "explaining_prototypes",
            metric=metric,
            method=ours,
            baseline=[floor],
            margin=f"{margin} on every seed" if metric.startswith("score") else f"at least {margin} on every seed",
            holds=holds,
        )
    assert all(results.values()), (results, means, turned, agreement)
