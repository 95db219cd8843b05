"""AMCL as a system: five frameworks by hand, momentum encoder and queue, resuming, the vote of the training images."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from proto_core.losses import AdaptiveMultiHeadContrastiveLoss
from proto_core.metrics import knn_predict
from proto_core.training import Curriculum, enter_stage
from proto_vision import AMCL, Digits
from proto_vision.amcl import AMCLSchedule, MultiHeadProjector
from proto_vision.data.dataset import ImageBatch

FRAMEWORKS = ("simclr", "moco", "simsiam", "byol", "barlow")
SMALL = {"image_size": 8, "in_channels": 1, "hidden_dim": 16, "embedding_dim": 8, "queue_size": 20, "lower": 0.1}
VIEWS = {"image_size": 8, "batch_size": 32, "augment": "affine", "views": ["affine"], "drop_last": True}


def module(framework="simclr", heads=2, **changed):
    torch.manual_seed(0)
    net = AMCL(framework, heads, "conv2", **SMALL | changed)
    enter_stage(net, net.stages[0])
    return net


def batch(count=6, views=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.arange(count)
    shape = (count, *([views] if views else []), 1, 8, 8)
    return ImageBatch(torch.rand(shape, generator=g), index % 3, index, index >= 0)


def trainer(folder, epochs=2, **more):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"accelerator": "cpu", "max_epochs": epochs, "default_root_dir": folder, "enable_checkpointing": False}
    return pl.Trainer(**settings | quiet | {"limit_train_batches": 3, "limit_val_batches": 0} | more)


# -- the step


def test_heads_are_alike_and_independent():
    torch.manual_seed(0)
    projector, x = MultiHeadProjector(6, 5, 4, 3), torch.rand(7, 6)
    z = projector(x)
    assert z.shape == (3, 7, 4)
    for head, found in zip(projector.heads, z):
        torch.testing.assert_close(found, head[2](head[0](x).relu()))
    assert not torch.equal(z[0], z[1])
    z[1].sum().backward()
    assert [head[0].weight.grad is not None and bool(head[0].weight.grad.any()) for head in projector.heads] == [
        False,
        True,
        False,
    ]
    assert sum(isinstance(part, nn.BatchNorm1d) for part in MultiHeadProjector(2, norm=True).modules()) == 3


def by_hand(net, framework, one, two):
    """The step of a framework, written out."""
    h = [net.backbone(view) for view in (one, two)]
    z = [net.projector(x) for x in h]
    if framework in ("simclr", "barlow"):
        return net.loss(*z)
    if framework == "moco":
        keys = [net.teacher.module[1](net.teacher.module[0](view)) for view in (one, two)]
        return (net.loss(z[0], keys[1], net.queue) + net.loss(z[1], keys[0], net.queue)) / 2
    p = [net.predictor(x[0]) for x in z]
    goals = [x[0] for x in z]
    if framework == "byol":
        goals = [net.teacher.module[1](net.teacher.module[0](view))[0] for view in (one, two)]
    return net.loss(*p, targets=tuple(goals))


@pytest.mark.parametrize(
    ("framework", "negatives"),
    [*((name, "max") for name in FRAMEWORKS), ("simclr", "logsumexp"), ("moco", "logsumexp")],
)
def test_step_by_hand(framework, negatives):
    net, data = module(framework, negatives=negatives), batch()
    again = copy.deepcopy(net)
    loss = net.training_step(data, 0)
    expected = by_hand(again, framework, *data.image.unbind(1))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    others = dict(again.named_parameters())
    for name, parameter in net.named_parameters():
        if name.startswith("teacher"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert bool(parameter.grad.isfinite().all())
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_half_precision_is_computed_in_full(framework):
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(framework, normalize=True).training_step(batch(), 0)
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_normalized_projections_hide_their_norm_from_the_temperature(framework):
    images = batch().image[:, 0]
    plain, unit = (module(framework, normalize=normalize).projections(images) for normalize in (False, True))
    torch.testing.assert_close(unit.norm(dim=2), torch.ones(2, 6))
    assert not torch.allclose(plain.norm(dim=2), torch.ones(2, 6), atol=1e-2)
    torch.testing.assert_close(plain / plain.norm(dim=2, keepdim=True), unit)


def test_queue_takes_in_the_newest_keys():
    net, data = module("moco", queue_size=20), batch()
    start = net.queue.clone()
    torch.testing.assert_close(start.norm(dim=2), torch.ones(2, 20))
    keys = torch.cat([net.teacher(view) for view in data.image.unbind(1)], dim=1)
    net.training_step(data, 0)
    torch.testing.assert_close(net.queue[:, :12], keys)
    torch.testing.assert_close(net.queue[:, 12:], start[:, :8])
    net.eval()
    before = net.queue.clone()
    net.training_step(data, 0)
    assert torch.equal(net.queue, before)
    small = module("moco", queue_size=5)
    small.training_step(data, 0)
    torch.testing.assert_close(small.queue, torch.cat([small.teacher(v) for v in data.image.unbind(1)], 1)[:, :5])


@pytest.mark.parametrize("framework", ["moco", "byol"])
def test_momentum_encoder_follows_after_each_step(framework):
    net = module(framework, momentum=0.75)
    weight, copied = net.backbone[0].network.network.layers[0][0].weight, "0.0.network.network.layers.0.0.weight"
    before = dict(net.teacher.module.named_parameters())[copied].clone()
    torch.testing.assert_close(before, weight)
    with torch.no_grad():
        weight.add_(1)
    net.optimizer_step(0, 0, net.configure_optimizers(), lambda: None)
    torch.testing.assert_close(dict(net.teacher.module.named_parameters())[copied], before + 0.25)
    net.train()
    assert not net.teacher.module.training
    plain = module("simclr")
    plain.optimizer_step(0, 0, plain.configure_optimizers(), lambda: None)
    assert plain.teacher is None


def test_the_losses_settings_and_rates_are_the_authors():
    for framework, rate in {"simclr": 0.06, "moco": 0.08, "simsiam": 0.05, "byol": 0.05, "barlow": 0.11}.items():
        net = AMCL(framework, backbone="conv2", image_size=8)
        stage = net.stages[0]
        assert (stage.lr, stage.max_epochs, stage.scheduler, stage.weight_decay) == (rate, 800, "cosine", 5e-4)
        group = net.configure_optimizers().param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (rate, 0.9, 5e-4)
        assert (net.loss.num_heads, net.loss.embedding_dim, net.loss.beta) == (3, 128, 0.1)
    assert AMCL(backbone="conv2", schedule=AMCLSchedule(lr=0.3)).stages[0].lr == 0.3
    assert AMCL(backbone="conv2", schedule=AMCLSchedule(keep="best")).stages[0].monitor == "val/knn_accuracy"
    assert AMCL.paper is AdaptiveMultiHeadContrastiveLoss.paper


# -- checkpoints, the vote


@pytest.mark.parametrize("framework", ["simclr", "moco", "byol"])
def test_resumed_training_ends_where_the_whole_did(framework, tmp_path):
    def states(folder, stop):
        for epochs in stop:
            pl.seed_everything(3)
            net = module(framework, schedule=AMCLSchedule(2))
            path = folder / "checkpoints" / "last.ckpt"
            runner = trainer(folder, epochs, callbacks=[Curriculum()])
            runner.fit(net, datamodule=Digits(**VIEWS), ckpt_path=path if path.is_file() else None)
        return net

    whole, cut = states(tmp_path / "whole", [2]), states(tmp_path / "cut", [1, 2])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, msg=name)
    again = AMCL.from_checkpoint(tmp_path / "cut" / "checkpoints" / "final.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.settings() == whole.settings()


def test_the_nearest_training_images_vote(tmp_path):
    data = Digits(image_size=8)
    net = module(neighbours=7, vote_temperature=0.2).eval()
    runner = trainer(tmp_path, limit_val_batches=None)
    found = runner.validate(net, datamodule=data, verbose=False)[0]["val/knn_accuracy"]
    tested = runner.test(net, datamodule=data, verbose=False)[0]["test/knn_accuracy"]

    def features(fold):
        rows = data.rows(fold)
        images = torch.stack([data.model_input(data.record_ids[row]) for row in rows])
        with torch.no_grad():
            return net(images), data.targets[torch.from_numpy(rows)]

    bank = features("train")
    for fold, accuracy in (("val", found), ("test", tested)):
        x, y = features(fold)
        assert accuracy == pytest.approx(float((knn_predict(x, *bank, 10, 7, 0.2)[:, 0] == y).float().mean()))
    assert net.test_results["summary"] == {"knn_accuracy": pytest.approx(tested)}
    assert found > 0.8


def test_prediction_is_the_backbones_features():
    net, data = module().eval(), batch(views=0)
    found = net.predict_step(data, 0)
    torch.testing.assert_close(found["embeddings"], net.backbone(data.image))
    assert torch.equal(found["index"], data.index)


@pytest.mark.bad_input
def test_bad_input_is_refused(tmp_path):
    for wrong, message in [
        ({"framework": "simsam"}, "framework: found 'simsam', needed one of 'simclr', 'moco'"),
        ({"num_heads": 0}, "num_heads: found 0"),
        ({"lower": 0.0}, "lower, upper"),
        ({"negatives": "hard"}, "negatives: found 'hard'"),
        ({"queue_size": 0}, "queue_size: found 0"),
        ({"neighbours": 0}, "neighbours: found 0"),
        ({"framework": "byol", "momentum": 2.0}, "momentum: found 2"),
        ({"backbone": "nothing"}, "nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            AMCL(**{"backbone": "conv2"} | SMALL | wrong)
    for views in (0, 1, 3):
        with pytest.raises(ValueError, match=f"found {views or 1} views of each image, needed two"):
            module().training_step(batch(views=views), 0)
    for framework in ("simclr", "simsiam", "byol", "barlow"):
        with pytest.raises(ValueError, match="found 1 image, needed 2 at least"):
            module(framework).training_step(batch(1), 0)
    assert bool(module("moco").training_step(batch(1), 0).isfinite())
    with pytest.raises(ValueError, match="needed a trainer with a data module"):
        trainer(tmp_path).test(module(), dataloaders=Digits(image_size=8).test_dataloader(), verbose=False)
    with pytest.raises(ValueError, match="trained with framework 'moco', this model has 'simclr'"):
        module().on_load_checkpoint({"proto": {"settings": module("moco").settings()}})
