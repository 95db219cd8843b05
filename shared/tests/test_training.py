"""Curriculum, checkpoints and teachers on a network small enough to see through."""

import os
import signal
import time
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from proto_core.prototypes import PointPrototypes, prototype_class_matrix
from proto_core.training import (
    Curriculum,
    ProjectionCallback,
    Stage,
    Teacher,
    WholeFileCheckpointIO,
    enter_stage,
    read_checkpoint,
    save_checkpoint,
)
from shared.tests.processes import started


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    index: Tensor


class Points(Dataset):
    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(0)
        self.y = F.one_hot(torch.arange(count) % 3, 3).float()
        self.x = torch.randn(count, 4, generator=generator) + self.y @ torch.eye(3, 4) * 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return Batch(self.x[i], self.y[i], torch.tensor(i))


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=8):
        super().__init__()
        self.points, self.batch_size = Points(), batch_size

    def train_dataloader(self):
        sampler = None
        if dist.is_initialized():  # Lightning's own distributed sampler would shuffle
            sampler = DistributedSampler(self.points, shuffle=False)
        return DataLoader(self.points, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.points, batch_size=self.batch_size)

    def projection_dataset(self):
        return self.points

    def describe(self, index):
        return f"point{index}", [f"class{index % 3}"]


class Net(pl.LightningModule):
    system = "toy"

    def __init__(self, epochs=2):
        super().__init__()
        self.encoder = nn.Linear(4, 5)
        self.layer = PointPrototypes(5, prototype_class_matrix(3, 2))
        self.head = nn.Linear(6, 3)
        self.stages = [
            Stage("joint", ("encoder.*", "layer.*"), epochs, lr=0.05, monitor="val/loss", mode="min", project=True),
            Stage("head", ("head.*",), epochs, lr=0.05, monitor="val/loss", mode="min", scheduler="cosine"),
        ]
        self.stage = None
        self.seen = []

    def settings(self):
        return {}

    def forward(self, x):
        return self.head(self.layer(self.encoder(x)))

    def training_step(self, batch, batch_idx):
        self.seen.append((self.stage.name, self.trainer.optimizers[0].param_groups[0]["lr"]))
        loss = F.binary_cross_entropy_with_logits(self(batch.x), batch.y)
        self.log("train/loss", loss, sync_dist=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.binary_cross_entropy_with_logits(self(batch.x), batch.y)
        self.log("val/loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.stage.lr)

    def prototype_layers(self):
        return {"layer": self.layer}

    def prototype_features(self, batch):
        return {"layer": (self.encoder(batch.x), batch.y)}

    def batch_index(self, batch):
        return batch.index


def trainer(folder, *callbacks, **options):
    defaults = dict(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(folder, net=None, ckpt_path=None, **options):
    pl.seed_everything(1, verbose=False)
    net = net or Net()
    curriculum = Curriculum(**options)
    trainer(folder, curriculum).fit(net, datamodule=Data(), ckpt_path=ckpt_path)
    return net, curriculum


def test_runs_every_stage_and_projects(tmp_path):
    net, curriculum = fit(tmp_path)
    assert [entry["stage"] for entry in curriculum.history] == ["joint", "joint", "head", "head"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "joint.ckpt", "head.ckpt", "last.ckpt", "final.ckpt",
    }  # fmt: skip
    assert all(name.startswith("point") for name in net.layer.case_ids)
    features = net.encoder(Data().points.x)
    torch.testing.assert_close(net.layer.prototypes.detach(), features[net.layer.case_index].detach())
    owners = net.layer.class_identity.argmax(1)
    assert torch.equal(owners, net.layer.case_index % 3)
    assert [labels for labels in net.layer.case_labels] == [[f"class{c}"] for c in owners.tolist()]


def test_each_stage_trains_its_own_parameters_only(tmp_path):
    net = Net()
    head = net.head.weight.detach().clone()
    fit(tmp_path, net, only=["joint"])
    torch.testing.assert_close(net.head.weight.detach(), head)
    encoder = net.encoder.weight.detach().clone()
    fit(tmp_path / "second", net, only=["head"])
    torch.testing.assert_close(net.encoder.weight.detach(), encoder)
    assert not torch.equal(net.head.weight, head)


def test_cosine_schedule_restarts_with_the_stage(tmp_path):
    net, _ = fit(tmp_path, Net(epochs=4))
    rates = [rate for name, rate in net.seen if name == "head"][::3]
    expected = [0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * e / 4)).item()) for e in range(4)]
    assert rates == pytest.approx(expected, abs=1e-7)


class Stop(pl.Callback):
    """Dies after so many epochs, as a kill would: no tidying up."""

    def __init__(self, after):
        self.after = after

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_run_resumes_where_it_was(tmp_path, after):
    whole, told = fit(tmp_path / "whole")
    pl.seed_everything(1, verbose=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path / "cut", Curriculum(), Stop(after)).fit(Net(), datamodule=Data())
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    net, curriculum = fit(tmp_path / "cut", Net(), ckpt_path=last)
    assert [e["stage"] for e in curriculum.history] == [e["stage"] for e in told.history]
    assert [e["epoch"] for e in curriculum.history] == [1, 2, 1, 2]
    for name, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(net.state_dict()[name], value, msg=name)
    assert net.layer.case_ids == whole.layer.case_ids


def test_finished_run_does_nothing_more(tmp_path):
    fit(tmp_path)
    net, curriculum = fit(tmp_path, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert len(curriculum.history) == 4
    assert net.seen == []


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    net = Net()
    net.stages = [Stage("joint", ("head.*",), 50, lr=1e-9, monitor="val/loss", mode="max", patience=2)]
    _, curriculum = fit(tmp_path, net)
    assert len(curriculum.history) <= 5


def test_stage_alone_from_weights(tmp_path):
    first, _ = fit(tmp_path / "a", only=["joint"])
    second, curriculum = fit(tmp_path / "b", only=["head"], weights=str(tmp_path / "a/checkpoints/final.ckpt"))
    torch.testing.assert_close(second.encoder.weight, first.encoder.weight)
    assert second.layer.case_ids == first.layer.case_ids
    assert [e["stage"] for e in curriculum.history] == ["head", "head"]


def test_projection_callback(tmp_path):
    net = Net()
    enter_stage(net, net.stages[0])
    trainer(tmp_path, ProjectionCallback(2), max_epochs=2).fit(net, datamodule=Data())
    assert net.layer.projected


def test_projection_sees_the_training_set_in_the_trainers_precision(tmp_path):
    net = Net()
    enter_stage(net, net.stages[0])
    trainer(tmp_path, ProjectionCallback(1), max_epochs=1, precision="64-true").fit(net, datamodule=Data())
    features = net.encoder(Data().points.x.double())
    assert features.dtype == torch.float64
    torch.testing.assert_close(net.layer.prototypes.detach(), features[net.layer.case_index].detach())


def test_unknown_stage_and_unwritable_folder_are_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="needed one of"):
        fit(tmp_path, only=["tuning"])
    blocked = tmp_path / "file"
    blocked.write_text("")
    net = Net()
    with pytest.raises(ValueError, match="cannot write to folder"):
        fit(tmp_path, net, dirpath=str(blocked / "checkpoints"))
    assert net.seen == []
    net.stages = [Stage("a", ("nothing.*",))]
    with pytest.raises(ValueError, match="matches no parameter"):
        fit(tmp_path, net)


@pytest.mark.parametrize(
    "options",
    [
        *({"name": ""}, {"name": "a/b"}, {"name": "last"}, {"name": "a", "lr": 0.0}, {"name": "a", "max_epochs": -1}),
        {"name": "a", "max_epochs": 2, "warmup_epochs": 3},
    ],
)
def test_bad_stage(options):
    with pytest.raises(ValueError, match="stage"):
        Stage(**options)


def test_checkpoint_of_another_curriculum(tmp_path):
    fit(tmp_path)
    net = Net()
    net.stages = net.stages[:1]
    with pytest.raises(ValueError, match="holds the stages"):
        fit(tmp_path, net, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_corrupt_checkpoint_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(Net(), path)
    assert read_checkpoint(path, system="toy")["proto"]["system"] == "toy"
    with pytest.raises(ValueError, match="holds system 'toy', needed 'other'"):
        read_checkpoint(path, system="other")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.ckpt.*cut or corrupt"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "b.ckpt")


class Bomb:
    def __reduce__(self):
        return (os.system, ("true",))


def test_checkpoint_never_runs_code(tmp_path):
    torch.save({"state_dict": {}, "x": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match=r"bomb\.ckpt"):
        read_checkpoint(tmp_path / "bomb.ckpt")


def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    io, path = WholeFileCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    monkeypatch.undo()
    assert io.load_checkpoint(path)["state_dict"]["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def _write_for_ever(path):
    io = WholeFileCheckpointIO()
    while True:
        io.save_checkpoint({"state_dict": {"a": torch.randn(2_000_000)}}, path)


def test_kill_while_writing_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFileCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    process = started(_write_for_ever, path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".last*.part")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert "a" in read_checkpoint(path)["state_dict"]


def test_teacher_follows_and_never_trains():
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = Teacher(student, momentum=0.9)
    start = teacher.module[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
    teacher.update(student)
    torch.testing.assert_close(teacher.module[0].weight, start + 0.1)
    teacher.update(student, momentum=1.0)
    torch.testing.assert_close(teacher.module[0].weight, start + 0.1)
    teacher.train()
    assert not teacher.module[1].training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.randn(3, 2)).requires_grad
    with pytest.raises(ValueError, match="momentum"):
        Teacher(student, 1.5)


def test_rates_fall_at_milestones(tmp_path):
    net = Net()
    steps = dict(scheduler="steps", milestones=(1, 3), gamma=0.5, monitor="val/loss", mode="min")
    net.stages = [Stage("joint", ("encoder.*",), 4, lr=0.08, **steps)]
    net, _ = fit(tmp_path, net)
    per_epoch = len(net.seen) // 4
    assert [rate for _, rate in net.seen[::per_epoch]] == pytest.approx([0.08, 0.04, 0.04, 0.02])


def test_rates_rise_in_the_warm_up_and_the_cosine_begins_behind_it(tmp_path):
    net = Net()
    rates = dict(scheduler="cosine", warmup_epochs=2, monitor="val/loss", mode="min")
    net.stages = [Stage("joint", ("encoder.*",), 4, lr=0.08, **rates)]
    net, _ = fit(tmp_path, net)
    per_epoch = len(net.seen) // 4
    assert [rate for _, rate in net.seen[::per_epoch]] == pytest.approx([0.04, 0.08, 0.08, 0.04])


def test_without_a_monitor_the_last_epoch_is_kept(tmp_path):
    net = Net()
    net.stages = [
        Stage("joint", ("encoder.*",), 3, lr=0.05, monitor=None, patience=1),
        Stage("head", ("head.*",), 1, lr=0.05, monitor=None),
    ]
    ends = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            ends.append(module.encoder.weight.detach().clone())

    pl.seed_everything(1, verbose=False)
    trainer(tmp_path, Watch(), Curriculum()).fit(net, datamodule=Data())
    assert len(ends) == 4
    assert not torch.equal(ends[1], ends[2])
    assert torch.equal(net.encoder.weight, ends[2])


@pytest.mark.bad_input
def test_a_monitor_that_is_not_logged_is_named(tmp_path):
    net = Net()
    net.stages = [Stage("joint", ("encoder.*",), 1, monitor="val/accuracy")]
    with pytest.raises(ValueError, match=r"logs no 'val/accuracy' .a data set without a validation part"):
        fit(tmp_path, net)
