"""The contract of the systems that train, on two gloo processes: every stage runs, and the ranks stay equal."""

from __future__ import annotations

import traceback
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.tests.processes import RANKS, on_two_processes
from tests.test_contracts import _own_cache, build, stages
from tests.test_contracts_training import SEED, every_trained, one_step, trained_systems

__all__ = ["_own_cache"]

OWN: dict[str, dict[str, str]] = {
    "any": {"*.running_mean": "batch norm: DDP takes the first rank's before every step", "*.running_var": "as before"},
}
"""System -> {pattern of names in its state: why each rank has its own}."""

OPTIMISERS: dict[str, tuple[int, str]] = {
    "cpc": (2, "two networks, each with an optimiser of its own"),
}
"""System -> steps that the trainer counts in a batch, and why it is not one."""

STEPS = 2
"""DDP says at the second step of a stage that a parameter had no gradient at the first."""


def steps(key: str, folder: Path, rank: int) -> dict[str, Any]:
    """Losses of every stage and the state after it, on this rank."""
    module, data = build(key, "--seed_everything", str(SEED))
    wanted = STEPS * OPTIMISERS.get(key, (1, ""))[0]
    found: dict[str, Any] = {}
    for stage in stages(module):
        watch = one_step(module, data, folder, stage, devices=RANKS, strategy="ddp", steps=wanted)
        state = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        found[getattr(stage, "name", "training")] = (watch.losses, watch.batches, state)
    return found


def all_systems(folder: Path, rank: int) -> dict[str, Any]:
    """System -> its steps, or the error that ended the run on this rank."""
    found: dict[str, Any] = {}
    for key in trained_systems():
        try:
            found[key] = steps(key, folder / str(rank), rank)
        except Exception:
            found[key] = traceback.format_exc()
            break
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_two_processes(partial(all_systems, folder), folder / "answers")


@pytest.mark.unchecked
@every_trained
def test_ranks_stay_equal_in_every_stage(key: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert key in found, f"another system failed before: {list(found)[-1]}"
        assert not isinstance(found[key], str), found[key]
    one, two = (found[key] for found in ranks)
    assert one.keys() == two.keys()
    for stage, (losses, batches, state) in one.items():
        other_losses, other_batches, other = two[stage]
        assert len(batches) == len(other_batches) >= STEPS, f"{key}, {stage}: {len(batches)} batches"
        assert batches != other_batches, f"{key}, {stage}: both ranks saw the same samples"
        assert np.isfinite([*losses, *other_losses]).all(), f"{key}, {stage}: {losses} and {other_losses}"
        apart = [name for name, value in state.items() if not same(value, other[name]) and not excepted(key, name)]
        assert not apart, f"{key}, {stage}: ranks differ in {apart}"


def excepted(key: str, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in [*OWN["any"], *OWN.get(key, {})])


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
