"""Callbacks on two processes: every rank ends with the weights of one process that sees the joint batch."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

from proto_core.training import GradientNormCallback, MESACallback, SAMCallback
from shared.tests.processes import on_two_processes
from shared.tests.test_landscape_callbacks import Classifier, data

CALLBACKS = {
    "sam": lambda: SAMCallback(rho=0.3),
    "gradient_norm": lambda: GradientNormCallback("net", rho=0.1, lam=0.5, eta=0.5, epsilon=0.01),
    "mesa": lambda: MESACallback("net", lam=2.0, decay=0.9, start_epoch=0),
}


class Share(Sampler):
    """Batches of eight, cut evenly among the ranks."""

    def __init__(self, trainer: L.Trainer, ranks: int) -> None:
        self.trainer, self.ranks = trainer, ranks

    def __iter__(self) -> Iterator[list[int]]:
        size = 8 // self.ranks
        for start in range(self.trainer.global_rank * size, 24, 8):
            yield list(range(start, start + size))

    def __len__(self) -> int:
        return 3


def fit(names: list[str], ranks: int, folder: Path) -> None:
    for name in names:
        module = Classifier()
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[CALLBACKS[name]()],
        )
        trainer.fit(module, DataLoader(data(), batch_sampler=Share(trainer, ranks)))
        torch.save(module.state_dict(), folder / f"{name}_{ranks}_{trainer.global_rank}.pt")


def on_a_rank(folder: Path, rank: int) -> None:
    fit(list(CALLBACKS), 2, folder)


@pytest.mark.unchecked
def test_two_processes_equal_one(tmp_path):
    names = list(CALLBACKS)
    on_two_processes(partial(on_a_rank, tmp_path), tmp_path / "ranks")
    fit(names, 1, tmp_path)
    for name in names:
        alone, one, two = (
            torch.load(tmp_path / f"{name}_{ranks}_{rank}.pt", weights_only=True)
            for ranks, rank in ((1, 0), (2, 0), (2, 1))
        )
        for key, value in alone.items():
            assert torch.equal(one[key], two[key]), f"{name}: {key} differs between ranks"
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
