"""The contract of the systems that train: finite gradients in every stage, checkpoints and seeds that give the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from proto_core.training import enter_stage, read_checkpoint, save_checkpoint
from tests.test_contracts import SYSTEMS, _own_cache, build, stages, trains

__all__ = ["_own_cache"]

UNTRAINED: dict[str, dict[str, str]] = {
    "fopro": {"network.momentum_encoder.*": "the slow copy follows the encoder, by no gradient"},
}
"""System -> {pattern of parameter names: why they have no gradient, or never train}."""

STEPS: dict[str, tuple[int, str]] = {
    "st_protopnet": (2, "even batches train the trivial branch, odd ones the support branch"),
}
"""System -> steps that a stage takes before every parameter has had a gradient, and why it is not one."""

ROUNDED: dict[str, str] = {
    "susana": "biases before batch norm (the card's) have no true gradient; Adam makes a step of its rounding's sign, "
    "which varies with threads",
}
"""System -> why two equal steps end a step of the optimiser apart; their gradients are compared all the same."""

SEED = 7


def trained_systems() -> list[str]:
    return [key for key in SYSTEMS if trains(key)]


every_trained = pytest.mark.parametrize("key", trained_systems())


class Watch(pl.Callback):
    """Notes what one training step does to each parameter.

    Attributes:
        losses: of each batch, where the system says.
        batches: sums of each batch's tensors, to tell batches apart.
        trainable: names of the parameters that should have a gradient.
        finite: parameter -> whether its gradients were finite.
        moved: parameters whose gradient was not all zero.
        gradients: parameter -> its gradient in the first batch.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[list[float]] = []
        self.trainable: set[str] = set()
        self.finite: dict[str, bool] = {}
        self.moved: set[str] = set()
        self.gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainable = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first = not self.gradients
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                if first:
                    self.gradients[name] = parameter.grad.clone()
                self.finite[name] = self.finite.get(name, True) and bool(parameter.grad.isfinite().all())
                if parameter.grad.any():
                    self.moved.add(name)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        tensors = [value for _, value in leaves(batch) if isinstance(value, Tensor)]
        self.batches.append([float(value.double().sum()) for value in tensors])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self.losses.append(float(loss))


def one_step(module: pl.LightningModule, data: Any, folder: Path, stage: Any, **settings: Any) -> Watch:
    """One training step of a stage, by a trainer; more where a step trains a part of the system."""
    if stage is not None:
        enter_stage(module, stage)
    watch = Watch()
    steps = max(settings.pop("steps", 1), STEPS.get(str(getattr(module, "system", "")), (1, ""))[0])
    trainer = pl.Trainer(
        accelerator=settings.pop("accelerator", "cpu"),
        max_epochs=steps,
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch],
        **settings,
    )
    trainer.fit(module, datamodule=data)
    return watch


def predicted(module: pl.LightningModule, data: Any) -> dict[str, Any]:
    """What the system says about one batch, on the device where it is."""
    own = type(data).predict_dataloader is not pl.LightningDataModule.predict_dataloader
    data.setup("predict" if own else "fit")
    torch.manual_seed(0)
    batch = next(iter(data.predict_dataloader() if own else data.train_dataloader()))
    batch = module.transfer_batch_to_device(batch, next(module.parameters()).device, 0)
    was = module.training
    module.eval()
    with torch.no_grad():
        answer = dict(leaves(module.predict_step(batch, 0)))
    module.train(was)
    return copy.deepcopy(answer)


def leaves(value: Any, name: str = "answer") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of anything nested."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from leaves(inner, f"{name}.{part}")
    elif isinstance(value, (list, tuple)):
        for part, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{part}]")
    else:
        yield name, torch.as_tensor(value) if isinstance(value, (np.ndarray, float, int, bool)) else value


def assert_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                found[name],
                value,
                rtol=1e-6,
                atol=1e-6,
                equal_nan=True,
                msg=lambda text, at=name: f"{what}: {at} {text}",
            )
        else:
            assert found[name] == value, f"{what}: {name}"


class Trained(NamedTuple):
    """A system after one step of each stage, and what was seen on the way."""

    module: pl.LightningModule
    data: Any
    steps: dict[str, Watch]
    before: dict[str, Any]
    after: dict[str, Any]


def train(key: str, *, first_stage_only: bool) -> Trained:
    module, data = build(key, "--seed_everything", str(SEED))
    before, after, steps = predicted(module, data), None, {}
    with TemporaryDirectory() as folder:
        for stage in stages(module):
            steps[getattr(stage, "name", "training")] = one_step(module, data, Path(folder), stage)
            after = after or predicted(module, data)
            if first_stage_only:
                break
    assert after is not None, f"{key}: no stage of demo.yaml has an epoch"
    return Trained(module, data, steps, before, after)


@cache
def trained(key: str) -> Trained:
    """One step of every stage of the demo; shared by the tests below."""
    return train(key, first_stage_only=False)


def excepted(key: str, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in UNTRAINED.get(key, {}))


@every_trained
def test_one_step_of_every_stage_is_finite(key):
    for stage, watch in trained(key).steps.items():
        assert watch.trainable, f"{key}, {stage}: nothing trains"
        assert all(np.isfinite(watch.losses)), f"{key}, {stage}: the loss is {watch.losses}"
        assert watch.losses or not trained(key).module.automatic_optimization, f"{key}, {stage}: no loss came back"
        without = sorted(name for name in watch.trainable - set(watch.finite) if not excepted(key, name))
        assert not without, f"{key}, {stage}: no gradient reaches {without}: freeze it, or say why in UNTRAINED"
        wild = sorted(name for name, finite in watch.finite.items() if not finite)
        assert not wild, f"{key}, {stage}: gradients that are not finite: {wild}"


@every_trained
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_one_step_of_every_stage_is_finite_in_other_precisions(key, precision, tmp_path):
    module, data = build(key, "--seed_everything", str(SEED))
    for stage in stages(module):
        watch = one_step(module, data, tmp_path, stage, precision=precision)
        assert all(np.isfinite(watch.losses)), f"{key}, {stage}: the loss is {watch.losses}"
        wild = sorted(name for name, finite in watch.finite.items() if not finite)
        assert not wild, f"{key}, {stage}: gradients that are not finite: {wild}"
    assert all(value.isfinite().all() for value in module.parameters())


@every_trained
def test_every_parameter_trains_in_some_stage(key):
    names = {name for name, _ in trained(key).module.named_parameters()}
    moved = set().union(*(watch.moved for watch in trained(key).steps.values()))
    idle = sorted(name for name in names - moved if not excepted(key, name))
    assert not idle, f"{key}: no stage trains {idle}: make it a buffer, train it, or say why in UNTRAINED"
    stale = [pattern for pattern in UNTRAINED.get(key, {}) if not any(fnmatchcase(name, pattern) for name in names)]
    assert not stale, f"{key}: UNTRAINED names {stale}, which no parameter matches any more"


@every_trained
def test_checkpoint_gives_equal_outputs(key, tmp_path):
    module, data = trained(key)[:2]
    assert getattr(module, "system", None) == key, f"{key}: give it `system: ClassVar[str] = {key!r}`"
    assert hasattr(module, "settings"), f"{key}: give it `settings()`, plain values that rebuild it"
    path = tmp_path / "system.ckpt"
    save_checkpoint(module, path)
    checkpoint = read_checkpoint(path, system=key)
    torch.manual_seed(SEED + 1)
    if hasattr(module, "from_checkpoint"):
        again = type(module).from_checkpoint(path)
    else:
        again, _ = build(key, "--seed_everything", str(SEED + 1))
        again.load_state_dict(checkpoint["state_dict"])
    assert again is not module
    assert_same(predicted(again, data), predicted(module, data), f"{key}: read back from a checkpoint")


@every_trained
def test_same_seed_gives_the_same_result(key):
    first, again = trained(key), train(key, first_stage_only=True)
    stage = next(iter(first.steps))
    assert_same(again.before, first.before, f"{key}: two networks of seed {SEED}")
    assert again.steps[stage].losses == pytest.approx(first.steps[stage].losses, rel=1e-6)
    found, expected = again.steps[stage].gradients, first.steps[stage].gradients
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    apart = {name: float((found[name] - value).abs().max()) / largest for name, value in expected.items()}
    assert max(apart.values()) < 1e-5, f"{key}: gradients of seed {SEED} differ: {apart}"
    if key not in ROUNDED:
        assert_same(again.after, first.after, f"{key}: two networks of seed {SEED} after one step")
    with pytest.raises(AssertionError):
        assert_same(first.after, first.before, "one step changes what the network says")
