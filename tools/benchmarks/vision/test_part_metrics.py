"""Consistency and stability against a loop over images and prototypes, written from the definition.

CUB's sizes: 15 parts, maps of 7 x 7 enlarged to 224, 10 prototypes per class. Ours is to be at least 10 times as fast.
"""

import pytest
import torch
from torch.nn import functional as F

from proto_core.metrics import assign_parts, consistency_score, stability_score

IMAGES, CLASSES, EACH, PARTS, SIZE, HALF = 300, 30, 10, 15, 224, 36


@pytest.fixture(scope="module")
def sample():
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(IMAGES, EACH, 7, 7, generator=g)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=g)
    parts = torch.randint(0, SIZE, (IMAGES, PARTS, 2), generator=g)
    visible = torch.rand(IMAGES, PARTS, generator=g) < 0.8
    return clean, noisy, parts, visible, torch.arange(IMAGES) % CLASSES


def ours(clean, noisy, parts, visible, targets):
    before, after = (assign_parts(maps, parts, visible, img_size=SIZE, half_size=HALF) for maps in (clean, noisy))
    consistency = consistency_score(before, visible, targets, CLASSES)
    return consistency, stability_score(before, after, targets, CLASSES)


def met(map_, parts, visible):
    """The parts that one map of one image meets."""
    large = F.interpolate(map_[None, None], (SIZE, SIZE), mode="bicubic", align_corners=False)[0, 0]
    row, column = divmod(int(large.argmax()), SIZE)
    found = []
    for (x, y), shown in zip(parts, visible):
        high = max(0, row - HALF) <= y <= min(SIZE, row + HALF)
        found.append(bool(shown) and high and max(0, column - HALF) <= x <= min(SIZE, column + HALF))
    return found


def loop(clean, noisy, parts, visible, targets):
    where, seen, classes = parts.tolist(), visible.tolist(), targets.tolist()
    consistent, stable = [], []
    for c in range(CLASSES):
        rows = [n for n in range(IMAGES) if classes[n] == c]
        for k in range(EACH):
            before = [met(clean[n, k], where[n], seen[n]) for n in rows]
            after = [met(noisy[n, k], where[n], seen[n]) for n in rows]
            shares = []
            for m in range(PARTS):
                shown = sum(seen[n][m] for n in rows)
                shares.append(sum(hit[m] for hit in before) / max(1, shown))
            consistent.append(max(shares) >= 0.8)
            stable.append(sum(a == b for a, b in zip(before, after)) / len(rows))
    return 100 * sum(consistent) / len(consistent), 100 * sum(stable) / len(stable)


@pytest.mark.benchmark(group="consistency and stability")
def test_parts_proto(benchmark, sample):
    found = benchmark.pedantic(ours, args=sample, rounds=3, warmup_rounds=1)
    assert found == pytest.approx(loop(*sample))


@pytest.mark.benchmark(group="consistency and stability")
def test_parts_loop(benchmark, sample):
    benchmark.pedantic(loop, args=sample, rounds=1)
