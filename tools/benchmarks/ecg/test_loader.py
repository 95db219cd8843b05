"""Records per second from the memory map: one read per batch, against one read per record and default collation.

A tenth of PTB-XL: 2,000 records of 12 leads and 1,000 samples, batches of 32, random order.

    pytest tools/benchmarks/ecg/test_loader.py --benchmark-only --benchmark-group-by=group
"""

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader, Dataset

from proto_ecg.data.module import ECGDataset

RECORDS, LEADS, SAMPLES, CLASSES, BATCH = 2000, 12, 1000, 71, 32


class OneByOne(Dataset):
    """The same rows without the batched read."""

    def __init__(self, data: ECGDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        return tuple(self.data[position])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ECGDataset:
    file = tmp_path_factory.mktemp("map") / "signals.npy"
    np.save(file, np.random.default_rng(0).normal(size=(RECORDS, LEADS, SAMPLES)).astype(np.float32))
    targets = (torch.rand(RECORDS, CLASSES) < 3 / CLASSES).float()
    return ECGDataset(np.load(file, mmap_mode="r"), targets, np.arange(RECORDS))


def epoch(loader: DataLoader) -> int:
    return sum(len(batch[0]) for batch in loader)


@pytest.mark.benchmark(group="loader")
def test_loader_proto(benchmark: BenchmarkFixture, data: ECGDataset) -> None:
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=ECGDataset.collate)
    assert benchmark(epoch, loader) == RECORDS
    if benchmark.enabled:
        benchmark.extra_info["records_per_second"] = round(RECORDS / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="loader")
def test_loader_reference(benchmark: BenchmarkFixture, data: ECGDataset) -> None:
    loader = DataLoader(OneByOne(data), batch_size=BATCH, shuffle=True)
    assert benchmark(epoch, loader) == RECORDS
    if benchmark.enabled:
        benchmark.extra_info["records_per_second"] = round(RECORDS / benchmark.stats.stats.median)
