"""OPL as a system: its loss is the card's sum, its rates the authors', its test says how orthogonal classes are."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from proto_core.losses import OrthogonalProjectionLoss
from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, OPLClassifier
from proto_vision.backbone_weights import load_backbone
from proto_vision.backbones import create_backbone
from proto_vision.data.noise import SymmetricNoise
from proto_vision.disc_vs_gen import frozen_features
from proto_vision.opl import OPLSchedule
from proto_vision.truncated import TruncatedLoss

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def module(backbone="conv2", **changed):
    torch.manual_seed(0)
    return OPLClassifier(backbone, 10, **{"image_size": 8, "in_channels": 1} | changed)


@pytest.fixture(scope="module")
def data():
    return Digits(image_size=8, batch_size=128)


@pytest.fixture(scope="module")
def batch(data):
    torch.manual_seed(0)
    return next(iter(data.train_dataloader()))


def test_loss_of_the_system_is_the_authors(golden_dir):
    golden = np.load(golden_dir / "opl.npz")
    for case in ("c0", "c1", "c2", "c3"):
        net = module(gamma=float(golden[f"{case}_gamma"]))
        features, labels = (torch.from_numpy(golden[f"{case}_{name}"]) for name in ("features", "labels"))
        for negative, name in (("mean_abs", "loss"), ("abs_mean", "loss_abs_of_mean")):
            loss = module(gamma=float(golden[f"{case}_gamma"]), negative=negative).orthogonal(features, labels)
            assert float(loss) == pytest.approx(float(golden[f"{case}_{name}"]), rel=1e-5, abs=1e-6)
        found = [float(value) for value in net.orthogonal.components(features, labels)]
        assert found == pytest.approx([float(golden[f"{case}_s"]), float(golden[f"{case}_d"])], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("weight", "gamma", "negative"), [(1.0, 0.5, "mean_abs"), (0.3, 2.0, "abs_mean")])
def test_loss_is_cross_entropy_and_a_weight_of_the_projection(batch, weight, gamma, negative):
    net = module(weight=weight, gamma=gamma, negative=negative)
    out = net(batch.image)
    torch.testing.assert_close(out.features, net.backbone(batch.image).mean(dim=(2, 3)))
    torch.testing.assert_close(out.features, frozen_features(net, batch.image))
    torch.testing.assert_close(out.logits, net.head(out.features))
    cosines = F.normalize(out.features) @ F.normalize(out.features).T
    same = batch.target[:, None] == batch.target
    other = ~same
    same.fill_diagonal_(False)
    between = cosines[other].abs().mean() if negative == "mean_abs" else cosines[other].mean().abs()
    expected = F.cross_entropy(out.logits, batch.target) + weight * (1 - cosines[same].mean() + gamma * between)
    torch.testing.assert_close(net.training_step(batch, 0), expected, rtol=1e-5, atol=1e-6)


def test_without_weight_it_is_plain_cross_entropy(batch):
    net = module(weight=0.0)
    expected = F.cross_entropy(net(batch.image).logits, batch.target)
    assert torch.equal(net.training_step(batch, 0), expected)
    views = batch._replace(image=torch.stack([batch.image, batch.image], 1))
    torch.testing.assert_close(net.training_step(views, 0), expected)


def test_schedule_is_the_authors():
    (stage,) = OPLClassifier("conv2").stages
    assert (stage.max_epochs, stage.lr, stage.weight_decay, stage.gamma) == (200, 0.1, 5e-4, 0.2)
    assert tuple(stage.milestones) == (60, 120, 160)
    assert stage.monitor == "val/accuracy"
    net = module(schedule=OPLSchedule(keep="last"))
    assert net.stages[0].monitor is None
    enter_stage(net, net.stages[0])
    (group,) = net.configure_optimizers().param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 5e-4)
    assert sum(p.numel() for p in OPLClassifier().parameters()) == pytest.approx(0.86e6, rel=0.02)  # ResNet-56
    assert OPLClassifier().head.in_features == 64


class Rates(pl.Callback):
    """The rate of every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [True, False])
def test_the_rate_rises_in_the_first_epoch_alone(tmp_path, data, warmup):
    net = module(schedule=OPLSchedule(epochs=3, lr=0.1, milestones=(2,), warmup=warmup, keep="last"))
    rates = Rates()
    trainer = pl.Trainer(
        **QUIET, default_root_dir=tmp_path, limit_train_batches=4, limit_val_batches=0, callbacks=[Curriculum(), rates]
    )
    trainer.fit(net, datamodule=data)
    first = [0.025, 0.05, 0.075, 0.1] if warmup else [0.1] * 4
    assert rates.seen == pytest.approx([*first, *[0.1] * 4, *[0.02] * 4])


def test_the_test_measures_right_angles(tmp_path, data):
    figures = {}
    for weight in (1.0, 0.0):
        net = module("conv4", weight=weight, schedule=OPLSchedule(epochs=4, lr=0.05, milestones=(), keep="best"))
        trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[Curriculum()])
        trainer.fit(net, datamodule=data)
        trainer.test(net, datamodule=data, verbose=False)
        figures[weight] = net.test_results["summary"]
    assert figures[1.0]["between"] < figures[0.0]["between"] - 0.02
    again = OPLClassifier.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    rows = torch.from_numpy(data.rows("test"))
    with torch.no_grad():
        out = again(data._prepared[rows])
    within, between = OrthogonalProjectionLoss().components(out.features, data.targets[rows])
    assert figures[0.0]["within"] == pytest.approx(within.item(), abs=1e-5)
    assert figures[0.0]["between"] == pytest.approx(between.item(), abs=1e-5)
    assert net.test_results["records"] == len(rows)


# -- wrong labels


def test_truncated_loss_by_hand():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64)
    logits, targets = p.log().requires_grad_(), torch.tensor([0, 0, 2])
    loss = TruncatedLoss(q=0.7, k=0.5)
    kept = loss.keeps(logits, targets)
    assert kept.tolist() == [True, False, False]
    known = torch.tensor([0.8, 0.5, 0.4], dtype=torch.float64)
    costs = (1 - known**0.7) / 0.7
    assert loss(logits, targets).item() == pytest.approx(costs.mean().item())
    value = loss(logits, targets, kept)
    assert value.item() == pytest.approx((costs[0].item() + 2 * (1 - 0.5**0.7) / 0.7) / 3)
    value.backward()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0] = -(0.8**0.7) * (torch.tensor([1.0, 0.0, 0.0]) - p[0]) / 3  # - p_y^q (one-hot - p) / N
    torch.testing.assert_close(logits.grad, expected)
    usual = (kept * (costs - (1 - 0.5**0.7) / 0.7)).mean()
    assert value.item() == pytest.approx(usual.item() + (1 - 0.5**0.7) / 0.7)
    assert TruncatedLoss(1.0)(logits, targets).item() == pytest.approx((1 - known).mean().item())
    assert TruncatedLoss(0.7, 0.35).keeps(logits.bfloat16(), targets.int()).tolist() == [True, True, True]
    assert loss(logits.bfloat16(), targets, kept).dtype == torch.float32


def test_the_truncated_loss_takes_the_place_of_cross_entropy(batch):
    net = module(classification="truncated", q=0.5, k=0.3, weight=0.4)
    out = net(batch.image)
    beside = 0.4 * net.orthogonal(out.features, batch.target)
    every = TruncatedLoss(0.5, 0.3)(out.logits, batch.target)
    torch.testing.assert_close(net.training_step(batch, 0), every + beside)
    net.kept = torch.arange(int(batch.index.max()) + 1) % 3 == 0
    kept = batch.index % 3 == 0
    some = TruncatedLoss(0.5, 0.3)(out.logits, batch.target, kept)
    torch.testing.assert_close(net.training_step(batch, 0), some + beside)
    views = batch._replace(image=torch.stack([batch.image, batch.image], 1))
    torch.testing.assert_close(net.training_step(views, 0), some + 0.4 * net.orthogonal(*doubled(out, batch)))


def doubled(out, batch):
    return torch.cat([out.features, out.features]), torch.cat([batch.target, batch.target])


class Pruned(pl.Callback):
    """What is left out in each epoch, and what the network said of the labels before it."""

    def __init__(self, data):
        self.data, self.expected, self.found = data, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        with torch.no_grad():
            logits = pl_module.eval()(self.data._prepared).logits
        pl_module.train()
        p = logits.softmax(1).gather(1, self.data.targets[:, None]).squeeze(1)
        self.expected.append((p > pl_module.truncated.k) & torch.from_numpy(self.data.table.fold == "train"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.found.append(pl_module.kept)


def test_images_are_left_out_by_what_the_network_says_before_an_epoch(tmp_path):
    data = Digits(image_size=8, batch_size=128, protocol=SymmetricNoise(0.4))
    schedule = OPLSchedule(epochs=5, lr=0.1, milestones=(), warmup=False, keep="last")
    net = module("conv4", weight=0.1, classification="truncated", start_prune=3, schedule=schedule)
    pruned = Pruned(data)
    pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[Curriculum(), pruned]).fit(net, datamodule=data)
    assert pruned.found[:3] == [None] * 3
    rows = data.rows("train")
    wrong = torch.from_numpy(data.table.targets != data.table.true_targets)[rows]
    for found, expected in zip(pruned.found[3:], pruned.expected[3:], strict=True):
        assert torch.equal(found, expected)
        kept = found[rows]
        assert 0 < kept.float().mean() < 1
        assert kept[~wrong].float().mean() > kept[wrong].float().mean() + 0.2
    again = OPLClassifier.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    assert again.settings()["classification"] == "truncated"


@pytest.mark.bad_input
def test_the_truncated_loss_needs_the_training_images(tmp_path, data):
    schedule = OPLSchedule(epochs=1, milestones=())
    net = module(classification="truncated", start_prune=0, schedule=schedule)
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[Curriculum()], limit_val_batches=0)
    with pytest.raises(ValueError, match="classification 'truncated': needs a data module of images"):
        trainer.fit(net, train_dataloaders=data.train_dataloader())
    with pytest.raises(ValueError, match="targets"):
        net.truncated.keeps(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_other_systems_start_from_its_backbone(tmp_path):
    net, path = module(), tmp_path / "opl.ckpt"
    torch.save({"state_dict": net.state_dict()}, path)
    fresh, _ = create_backbone("conv2", in_channels=1)
    load_backbone(fresh, path)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_half_precision_is_computed_in_full(batch):
    net = module().bfloat16()
    loss = net.training_step(batch._replace(image=batch.image.bfloat16()), 0)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"weight": -1.0}, "weight: found -1.0, needed at least 0"),
        ({"weight": float("nan")}, "weight: found nan"),
        ({"gamma": -0.5}, "gamma: found -0.5"),
        ({"negative": "mean"}, "negative: found 'mean'"),
        ({"classification": "focal"}, "classification: found 'focal'"),
        ({"q": 0.0}, r"q: found 0.0, needed a number in \(0, 1\]"),
        ({"k": 1.0}, r"k: found 1.0, needed a probability in \(0, 1\)"),
        ({"start_prune": -1}, "start_prune: found -1, needed 0 epochs"),
        ({"class_names": ["one"]}, "num_classes: found 1, needed 2"),
        ({"schedule": OPLSchedule(epochs=-1)}, "max_epochs >= 0"),
    ],
)
def test_bad_settings_are_named(changed, says):
    with pytest.raises(ValueError, match=says):
        module(**changed)
