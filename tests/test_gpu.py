"""The contract of the systems that train, on a GPU: steps in float32 and bf16-mixed, and the CPU's answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from proto_core.training import save_checkpoint
from tests.test_contracts import _own_cache, build, stages
from tests.test_contracts_training import SEED, every_trained, excepted, one_step, predicted

__all__ = ["_own_cache"]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DRAWN: dict[str, str] = {
    "prob_psenn": "prototypes are drawn anew in each call, by each device's own generator",
}
"""System -> why its answers differ between two devices."""


@pytest.fixture
def _full_precision() -> Iterator[None]:
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = was


@every_trained
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_step_of_every_stage_is_finite(key: str, precision: str, tmp_path: Path) -> None:
    module, data = build(key, "--seed_everything", str(SEED))
    for stage in stages(module):
        watch = one_step(module, data, tmp_path, stage, accelerator="gpu", devices=1, precision=precision)
        assert watch.losses or not module.automatic_optimization
        assert all(np.isfinite(watch.losses)), watch.losses
        assert all(watch.finite.values()), [name for name, finite in watch.finite.items() if not finite]
        assert not [name for name in watch.trainable - set(watch.finite) if not excepted(key, name)]
    assert all(value.isfinite().all() for value in module.parameters())
    save_checkpoint(module, tmp_path / "system.ckpt")


@every_trained
@pytest.mark.usefixtures("_full_precision")
def test_answers_are_those_of_the_cpu(key: str) -> None:
    if key in DRAWN:
        pytest.skip(DRAWN[key])
    module, data = build(key, "--seed_everything", str(SEED))
    expected = predicted(module, data)
    found = predicted(module.cuda(), data)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            size = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-3 * size)
