"""Claim of Prob-PSENN: random prototypes cost no accuracy, and their uncertainties find inputs of unknown classes.

Digits 0 to 7 of 8 x 8 pixels, split 70/30; 8 and 9 are unknown. Baseline: the same network with one point for each
class, pulled by the mean squared distance of images to their own class's point.
"""

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.distances import sq_euclidean
from proto_core.metrics import auroc
from proto_vision import ProbPSENN
from proto_vision.prob_psenn import (
    ProbPSENNLoss,
    epistemic_uncertainty,
    explanatory_epistemic_uncertainty,
    predictive_entropy,
)

SEEDS = (0, 1)
CLASSES, DIM, EPOCHS = 8, 10, 60


def layers(sizes: tuple[int, int, int]) -> list[nn.Module]:
    a, b, c = sizes
    return [nn.Linear(a, b), nn.BatchNorm1d(b), nn.LeakyReLU(0.2), nn.Linear(b, c)]


class Points(nn.Module):
    """The deterministic counterpart: one prototype of each class is a point."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.prototypes = nn.Parameter(torch.randn(CLASSES, DIM))
        self.classifier = nn.Linear(CLASSES, CLASSES, bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(-0.5 * torch.eye(CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        distances = sq_euclidean(z, self.prototypes)
        return self.classifier(distances).unsqueeze(1), distances.unsqueeze(2), self.decoder(z)


def run(seed: int, random: bool) -> dict[str, float]:
    """Train on known classes; accuracy, and AUROC of uncertainties for unknown ones."""
    digits = load_digits()
    pixels = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).flatten(1)
    known = digits.target < CLASSES
    x, x_test, y, y_test = train_test_split(
        pixels[known],
        torch.tensor(digits.target[known]),
        test_size=0.3,
        stratify=digits.target[known],
        random_state=seed,
    )
    torch.manual_seed(seed)
    encoder = nn.Sequential(*layers((64, 128, DIM)))
    decoder = nn.Sequential(*layers((DIM, 128, 64)), nn.Tanh())
    net = ProbPSENN(encoder, decoder, CLASSES, DIM) if random else Points(encoder, decoder)
    loss = ProbPSENNLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(128):
            if random:
                out = net(x[rows])
                value = loss(out.logits, y[rows], out.reconstruction, x[rows], out.log_prob)
            else:
                logits, distances, drawn = net(x[rows])
                own = distances.squeeze(2).gather(1, y[rows].unsqueeze(1)).mean()
                value = F.cross_entropy(logits[:, 0], y[rows]) + 10 * F.mse_loss(drawn, x[rows]) + 0.05 * own
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    net.eval()
    unknown = pixels[~torch.tensor(known)]
    noise = torch.randn(100, CLASSES, DIM)
    with torch.no_grad():
        answers = [net(part, noise=noise)[:2] if random else net(part)[:2] for part in (x, x_test, unknown)]
    probs, means = zip(*((logits.softmax(2), distances.mean(2)) for logits, distances in answers))
    nearest = [means[0][y == c, c] for c in range(CLASSES)]
    epistemic, entropy = ([f(p) for p in probs[1:]] for f in (epistemic_uncertainty, predictive_entropy))
    far = [explanatory_epistemic_uncertainty(nearest, m) for m in means[1:]]
    return {
        "accuracy": float((probs[1].mean(1).argmax(1) == y_test).float().mean()),
        "epistemic": auroc(epistemic[1].round(decimals=6), epistemic[0].round(decimals=6)),
        "explanatory": auroc(far[1], far[0]),
        "entropy": auroc(entropy[1], entropy[0]),
        "largest": max(float(values.abs().max()) for values in epistemic),
    }


@pytest.mark.claim
def test_prob_psenn(claim_record: Callable[..., None]) -> None:
    with_it, without = ([run(seed, random) for seed in SEEDS] for random in (True, False))
    ours, theirs = ({key: [r[key] for r in runs] for key in runs[0]} for runs in (with_it, without))

    def record(key: str, metric: str, margin: str, holds: bool) -> bool:
        claim_record("prob_psenn", metric=metric, method=ours[key], baseline=theirs[key], margin=margin, holds=holds)
        return holds

    kept = min(ours["accuracy"]) >= 0.97 and abs(mean(ours["accuracy"]) - mean(theirs["accuracy"])) <= 0.015
    kept = record("accuracy", "accuracy (baseline: points)", "at least 0.97, means within 0.015", kept)
    found = min(ours["epistemic"]) >= 0.88
    entropy = f"{mean(ours['entropy']):.3f} against {mean(theirs['entropy']):.3f}"
    found = record(
        "epistemic",
        f"AUROC of epistemic uncertainty, unknown against known (predictive entropy: {entropy}, no margin)",
        "at least 0.88",
        found,
    )
    explained = min(ours["explanatory"]) >= 0.80
    explained = record(
        "explanatory", "AUROC of explanatory epistemic uncertainty, unknown against known", "at least 0.80", explained
    )
    silent = max(theirs["largest"]) < 1e-6
    silent = record("largest", "largest epistemic uncertainty", "baseline below 1e-6 everywhere", silent)
    assert kept, (ours["accuracy"], theirs["accuracy"])
    assert found, ours["epistemic"]
    assert explained, ours["explanatory"]
    assert silent, theirs["largest"]
