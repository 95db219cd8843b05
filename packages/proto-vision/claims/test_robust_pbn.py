"""Robust prototype-based networks on images: training on the certified margin withstands small changes of pixels.

Digits of 8 x 8 pixels, split 70/30; a shallow network on pixel values, centred and scaled, two components per class,
300 full-batch steps as in the claim of the core. Baseline: the same network trained on the margin of probabilities.
Radii are Euclidean, in pixel values from 0 to 1. The attack follows the gradient of the margin inside the ball (40
steps). The loss asks for a radius of 1 in scaled units, 0.27 in pixel values: that is how far its advantage reaches. At
an attack within 0.5, where the margin was set at first, the order turns: the method kept 0.55 to 0.58 of its decisions,
the baseline 0.62 to 0.63. Both figures stand beside the one within 0.2.
"""

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from proto_vision.robust_pbn import ProbabilityMarginLoss, RobustnessMarginLoss, ShallowPBN
from proto_vision.robust_pbn.inputs import VectorInputs

SEEDS = (0, 1, 2)
NEAR, FAR = 0.2, 0.5


def attacked(net: ShallowPBN, inputs: VectorInputs, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Which decisions are right for every point of the attack's path within a radius of the pixel values."""
    away, kept = torch.zeros_like(x), torch.ones(len(x), dtype=torch.bool)
    for _ in range(40):
        away.requires_grad_()
        p = net(inputs.scaled(x + away))[0]
        own = p.gather(1, y.unsqueeze(1)).squeeze(1)
        margin = own - p.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
        kept &= margin.detach() > 0
        down = F.normalize(torch.autograd.grad(margin.sum(), away)[0], dim=1)
        away = away.detach() - radius / 5 * down
        away = away * (radius / away.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    with torch.no_grad():
        return kept & (net(inputs.scaled(x + away))[0].argmax(1) == y)


def run(seed: int, robust: bool) -> dict[str, float]:
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1),
        torch.tensor(digits.target),
        test_size=0.3,
        stratify=digits.target,
        random_state=seed,
    )
    torch.manual_seed(seed)
    inputs = VectorInputs("pixels", 8, 1)
    inputs.fit(x)
    scaled = inputs.scaled(x)
    net = ShallowPBN(64, 20, 10).initialise(scaled, y)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(300):
        probabilities, detections, _ = net(scaled)
        if robust:
            loss = RobustnessMarginLoss(1.0)(detections, net.head.reasoning, net.sigma, y)
        else:
            loss = ProbabilityMarginLoss(0.3)(probabilities, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    near, far = (attacked(net, inputs, x_test, y_test, radius) for radius in (NEAR, FAR))
    with torch.no_grad():
        radius = net.certify(inputs.scaled(x_test), y_test) * inputs.scale
        right = net(inputs.scaled(x_test))[0].argmax(1) == y_test
        sound = attacked_within(net, inputs, x_test, y_test, radius)
    return {
        "accuracy": float(right.float().mean()),
        "certified": float((radius > NEAR).float().mean()),
        "attacked": float(near.float().mean()),
        "far": float(far.float().mean()),
        "sound": float(sound),
    }


def attacked_within(net: ShallowPBN, inputs: VectorInputs, x: Tensor, y: Tensor, radius: Tensor) -> bool:
    """Whether none of 200 random directions flips a certified decision just inside its radius."""
    away = F.normalize(torch.randn(200, *x.shape), dim=2) * 0.999 * radius[:, None]
    decided = torch.stack([net(inputs.scaled(x + part))[0].argmax(1) for part in away])
    return bool((decided == y)[:, radius > 1e-5].all())


@pytest.mark.claim
def test_robust_pbn(claim_record: Callable[..., None]) -> None:
    plain, robust = ([run(seed, kind) for seed in SEEDS] for kind in (False, True))
    verdicts = {
        "certified": all(a["certified"] >= b["certified"] + 0.02 for a, b in zip(robust, plain)),
        "attacked": all(a["attacked"] >= b["attacked"] + 0.02 for a, b in zip(robust, plain)),
        "accuracy": all(a["accuracy"] >= b["accuracy"] - 0.005 for a, b in zip(robust, plain)),
    }
    sound = all(row["sound"] for row in plain + robust)
    beyond = " against ".join(f"{mean(row['far'] for row in rows):.3f}" for rows in (robust, plain))
    words = {
        "certified": (
            f"digits, accuracy certified at {NEAR}, robustness against probability margin",
            "higher by at least 0.02 on every seed, and no random change within a radius flips a decision",
        ),
        "attacked": (
            f"digits, accuracy under an attack within {NEAR}, robustness against probability margin (within {FAR}, "
            f"farther than the loss asks for: {beyond}, no margin)",
            "higher by at least 0.02 on every seed",
        ),
        "accuracy": ("digits, accuracy, robustness against probability margin", "lower by 0.005 at most on every seed"),
    }
    for name, (metric, margin) in words.items():
        claim_record(
            "robust_pbn",
            metric=metric,
            method=[row[name] for row in robust],
            baseline=[row[name] for row in plain],
            margin=margin,
            holds=verdicts[name] and (sound or name != "certified"),
        )
    assert sound
    assert all(verdicts.values()), (verdicts, plain, robust)
