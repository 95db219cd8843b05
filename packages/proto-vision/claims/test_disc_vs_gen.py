"""Claim on images: naive Bayes is ahead with few samples, logistic regression with many.

Two sets of frozen features. Pixels of scikit-learn's digits through the data module, brought to [0, 1] (ten splits of
training and test). Features of a small convolutional network that was trained on half of the CIFAR-10 excerpt, measured
on images of the other half (five networks). The growth of the samples needed with the number of features is measured in
``shared/claims/test_disc_vs_gen.py``.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from proto_vision import Digits, LinearEvaluation
from proto_vision.disc_vs_gen import image_set_features
from proto_vision.encoders import create_encoder

Accuracies = dict[str, list[float]]


def both(
    few: Accuracies, many: Accuracies, claim_record: Callable[..., None], what: str, sizes: tuple[int, int], by: float
):
    """Record the two ends of the curves; whether both are as the paper says."""
    verdicts = []
    for found, count in zip((few, many), sizes):
        bayes, logistic = found["naive_bayes"], found["logistic_regression"]
        ahead = mean(bayes) > mean(logistic) if count == sizes[0] else mean(logistic) > mean(bayes) + by
        verdicts.append(ahead)
        claim_record(
            "disc_vs_gen",
            metric=f"accuracy on {what}, {count} training samples per class, naive Bayes against logistic regression",
            method=bayes,
            baseline=logistic,
            margin="mean higher" if count == sizes[0] else f"mean lower by more than {by}",
            holds=ahead,
        )
    assert all(verdicts), (few, many)


@pytest.mark.claim
def test_two_regimes_on_pixels_of_digits(claim_record: Callable[..., None]) -> None:
    ends: list[Accuracies] = [{"naive_bayes": [], "logistic_regression": []} for _ in range(2)]
    for seed in range(10):
        features = image_set_features(nn.Flatten(), Digits(image_size=8, val_fraction=0.0, seed=seed))
        curves = LinearEvaluation([2, 80], repeats=1, seed=seed, scaling="minmax", eps=1e-2)(*features[:4])
        for name, found in curves.accuracy.items():
            for end, value in zip(ends, found[0].tolist()):
                end[name].append(value)
    both(*ends, claim_record, "pixels of digits", (2, 80), 0.03)


def excerpt(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``[10000, 3, 32, 32]`` of the CIFAR-10 excerpt and their classes."""
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jpg"))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])
    classes = np.unique([name.split("/")[-2] for name in names], return_inverse=True)[1]
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25, torch.from_numpy(classes)


def trained(images: Tensor, targets: Tensor, seed: int) -> nn.Module:
    """A small network after six passes over labelled images."""
    torch.manual_seed(seed)
    network, features = create_encoder("conv4", in_channels=3, image_size=32)
    head = nn.Linear(features, 10)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(6):
        for rows in torch.randperm(len(images)).split(64):
            mirrored = (torch.rand(len(rows)) < 0.5)[:, None, None, None]
            batch = torch.where(mirrored, images[rows].flip(-1), images[rows])
            loss = F.cross_entropy(head(network(batch)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@pytest.mark.claim
def test_two_regimes_on_features_of_cifar(claim_record: Callable[..., None], test_data: Path) -> None:
    images, targets = excerpt(test_data / "cifar10-10k.zip")
    ends: list[Accuracies] = [{"naive_bayes": [], "logistic_regression": []} for _ in range(2)]
    for seed in range(10, 15):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        half, pool, test = order[:5000], order[5000:8000], order[8000:]
        network = trained(images[half], targets[half], seed)
        with torch.no_grad():
            x_pool, x_test = (torch.cat([network(images[part]) for part in rows.split(500)]) for rows in (pool, test))
        curves = LinearEvaluation([2, 250], repeats=10, seed=seed)(x_pool, targets[pool], x_test, targets[test])
        for name, found in curves.accuracy.items():
            for end, value in zip(ends, found.mean(0).tolist()):
                end[name].append(value)
    both(*ends, claim_record, "frozen features of CIFAR-10 (mean of 10 subsets a network)", (2, 250), 0.02)
