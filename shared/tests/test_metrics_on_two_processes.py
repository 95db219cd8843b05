"""Metrics on two gloo processes: every class gives what one process gives of all samples, however they are split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

import proto_core.metrics
from proto_core.metrics import (
    BettiError,
    ClusterAccuracy,
    FoldAccuracy,
    MacroAUROC,
    OODDetection,
    PartPrototypeScores,
    RecallAtK,
    SaliencyMetrics,
    VerificationMetrics,
)
from shared.tests.processes import on_two_processes

SAMPLES = 24
SPLITS = {
    "uneven": ((0, 3, 9), (9, 24)),
    "nothing on the second": ((0, 10, 24), (0,)),
    "nothing on the first": ((0,), (0, 24)),
}
"""Limits of the batches of each rank."""


def metrics() -> dict[str, tuple[Callable[[], Metric], tuple[Tensor, ...]]]:
    """How each metric is made, and what it is given of all samples."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(SAMPLES)
    classes, other = rows % 3, torch.randint(0, 3, (SAMPLES,), generator=g)
    scores, embeddings = torch.rand(SAMPLES, 3, generator=g), torch.randn(SAMPLES, 5, generator=g)
    masks = torch.rand(SAMPLES, 9, 11, generator=g) > 0.6
    maps = torch.rand(SAMPLES, 9, 11, generator=g)
    met, visible = torch.rand(SAMPLES, 2, 4, generator=g) > 0.3, torch.rand(SAMPLES, 4, generator=g) > 0.2
    shaken = met ^ (torch.rand(SAMPLES, 2, 4, generator=g) > 0.9)
    return {
        "BettiError": (BettiError, (masks, maps > 0.5)),
        "BettiError windows": (lambda: BettiError(window=4), (masks, maps > 0.5)),
        "ClusterAccuracy": (ClusterAccuracy, (classes, other, rows % 2 == 0)),
        "ClusterAccuracy balanced": (lambda: ClusterAccuracy(balanced=True), (classes, other, rows % 2 == 0)),
        "FoldAccuracy": (FoldAccuracy, (scores, classes, rows)),
        "MacroAUROC": (MacroAUROC, (scores, torch.rand(SAMPLES, 3, generator=g) > 0.5, rows)),
        "OODDetection": (OODDetection, (scores[:, 0], other == 0)),
        "PartPrototypeScores": (lambda: PartPrototypeScores(3, 2, 4, threshold=0.7), (met, visible, classes, shaken)),
        "RecallAtK": (RecallAtK, (embeddings, classes)),
        "SaliencyMetrics": (SaliencyMetrics, (maps, masks)),
        "VerificationMetrics": (lambda: VerificationMetrics((0.1, 0.3)), (scores[:, 1], (other == 1).long())),
    }


def run_rank(rank: int) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, (make, given) in metrics().items():
        for split, limits in SPLITS.items():
            metric = make()
            for start, stop in zip(limits[rank], limits[rank][1:]):
                metric.update(*(part[start:stop] for part in given))
            found[name, split] = metric.compute()
            metric.reset()
            if rank == 0 or split == "uneven":  # a second round starts from nothing
                metric.update(*(part[12 * rank : 12 * rank + 12] for part in given))
            found[f"{name} again", split] = metric.compute()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_two_processes(run_rank, tmp_path_factory.mktemp("ranks"))


def test_every_metric_is_looked_at() -> None:
    classes = {name for name, value in vars(proto_core.metrics).items() if isinstance(value, type)}
    kinds = {name for name in classes if issubclass(getattr(proto_core.metrics, name), Metric)}
    assert kinds == {name.split()[0] for name in metrics()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", metrics())
def test_two_processes_are_one(ranks: list[dict], name: str, split: str) -> None:
    make, given = metrics()[name]
    alone = make()
    alone.update(*given)
    for found in ranks:
        torch.testing.assert_close(found[name, split], alone.compute(), rtol=1e-12, atol=1e-12)
    if split != "uneven":
        alone.reset()
        alone.update(*(part[:12] for part in given))
    for found in ranks:
        torch.testing.assert_close(found[f"{name} again", split], alone.compute(), rtol=1e-12, atol=1e-12)
