"""Few-shot classification: the authors' values, episodes from loader to figures, and what bad input gets."""

import copy
from functools import cache

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proto_core.losses import ICNNLoss, ProtoTripletLoss
from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, FewShotModule, Glyphs
from proto_vision.backbones import create_backbone
from proto_vision.data.batches import Episode
from proto_vision.data.class_split import ClassSplit
from proto_vision.few_shot import (
    Episodes,
    EpisodeSampler,
    FewShotSchedule,
    PrototypicalNetwork,
    as_episode,
    confidence_interval,
)

TASK = {"way": 3, "train_way": 4, "shot": 2, "query": 3, "episodes": 4, "val_episodes": 5, "test_episodes": 6}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "susana.npz")


def near(found, expected, rtol=1e-6, atol=1e-8):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


@cache
def held_out():
    """Digits with three classes each for validation and test; read once."""
    data = Digits(image_size=16, protocol=ClassSplit(val=3, test=3))
    assert len(data.train_set)
    return data


def digits(**changed):
    data = copy.copy(held_out())
    data.sampling = Episodes(**TASK | changed)
    return data


def module(**changed):
    torch.manual_seed(0)
    return FewShotModule("convnet4", **{"image_size": 16, "in_channels": 1} | changed)


# -- the network


def test_prototypes_and_logits_equal_the_authors_code(golden):
    net = PrototypicalNetwork(nn.Identity(), temperature=float(golden["pn_T"]))
    support, labels, query = (torch.from_numpy(golden[f"pn_{name}"]) for name in ("s", "sy", "q"))
    prototypes, classes = net.prototypes(support, labels)
    near(prototypes, golden["pn_proto"])
    assert classes.tolist() == sorted(set(golden["pn_sy"].tolist()))
    near(net(support, labels, query), golden["pn_logits"])


def test_interval_equals_the_authors_code(golden):
    for form in (golden["ci_acc"], torch.from_numpy(golden["ci_acc"]), golden["ci_acc"].tolist()):
        found = confidence_interval(form)
        assert found == pytest.approx((float(golden["ci_mean"]), float(golden["ci_pm"])), rel=1e-6)
        assert all(isinstance(value, float) for value in found)
    assert confidence_interval([0.25]) == (0.25, 0.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.5, 1.0, 3.0]))
def test_logits_are_their_definition(seed, way, dim, temperature):
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(way), torch.randint(way, (5,), generator=g)]) * 7 - 3
    support, query = (torch.randn(n, dim, generator=g).double() for n in (len(labels), 4))
    net = PrototypicalNetwork(nn.Identity(), temperature)
    found = net(support, labels, query)
    for column, label in enumerate(sorted(set(labels.tolist()))):
        mean = support[labels == label].mean(0)
        near(found[:, column], -(query - mean).square().sum(1) / temperature, rtol=1e-9)
    order = torch.randperm(len(labels), generator=g)
    near(net(support[order], labels[order], query), found, rtol=1e-9)


def test_maps_are_averaged_and_half_precision_is_computed_in_full():
    net = PrototypicalNetwork(nn.Conv2d(1, 3, 3))
    images, labels = torch.rand(6, 1, 5, 5), torch.tensor([1, 0, 1, 0, 2, 2])
    near(net.embed(images), net.encoder(images).mean(dim=(2, 3)).detach())
    flat = PrototypicalNetwork(nn.Identity())
    x = torch.randn(6, 4).bfloat16()
    logits = flat(x, labels, x)
    assert logits.dtype == torch.float32
    near(logits, flat(x.float(), labels, x.float()), rtol=1e-5, atol=1e-6)
    assert "temperature=1.0" in repr(flat)


@pytest.mark.bad_input
def test_bad_input_of_the_network_is_named():
    net, x, y = PrototypicalNetwork(nn.Identity()), torch.rand(4, 3), torch.tensor([0, 0, 1, 1])
    for call, says in [
        (lambda: PrototypicalNetwork(nn.Identity(), 0), "temperature: found 0"),
        (lambda: net(x, y[:3], x), r"support_embeddings, labels: found shapes \(4, 3\) and \(3,\)"),
        (lambda: net(x[:0], y[:0], x), "with N at least 1"),
        (lambda: net(x, y.float(), x), "labels: found torch.float32"),
        (lambda: net(x, y, x[:, :2]), "found"),
        (lambda: confidence_interval([]), r"accuracies: found shape \(0,\)"),
        (lambda: confidence_interval([[0.5]]), r"accuracies: found shape \(1, 1\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_backbones_are_those_of_the_card():
    small, channels = create_backbone("convnet4", in_channels=1)
    assert channels == (64,)
    kinds = [type(layer).__name__ for layer in small.network.stages[0]]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert small.network.stages[0][0].bias is not None
    assert sum(p.numel() for p in small.parameters()) == 64 * 9 + 3 * 64 * 64 * 9 + 4 * 64 + 4 * 128
    large, channels = create_backbone("resnet12")
    assert channels == (512,)
    assert [tuple(m.shape[1:]) for m in large.network(torch.zeros(1, 3, 32, 32))] == [
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    ]
    block = large.network.stages[1]
    x = torch.randn(2, 64, 4, 4)
    steps = block.body
    inner = F.leaky_relu(steps[1](steps[0](x)), 0.1)
    inner = F.leaky_relu(steps[4](steps[3](inner)), 0.1)
    expected = F.max_pool2d(F.leaky_relu(steps[7](steps[6](inner)) + block.shortcut(x), 0.1), 2)
    near(block(x), expected.detach(), rtol=1e-4, atol=1e-5)
    weights = [m for m in large.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in weights)
    assert weights[-2].weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="no weights for 'resnet12'"):
        create_backbone("resnet12", pretrained=True)


# -- episodes


def test_batches_are_episodes_without_a_sample_twice():
    data = digits()
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for episode in batches:
        assert isinstance(episode, Episode)
        assert (episode.way, episode.shot, episode.query) == (4, 2, 3)
        assert len(episode.index.unique()) == len(episode.index) == 20
        supports, queries = episode.labels()
        classes = episode.target[:8:2]
        assert len(classes.unique()) == 4
        assert torch.equal(episode.target, torch.cat([classes[supports], classes[queries]]))
        assert torch.equal(data.targets[episode.index], episode.target)
        assert set(episode.target.tolist()) <= set(range(4))
    assert [len(list(loader)) for loader in (data.val_dataloader(), data.test_dataloader())] == [5, 6]
    assert {int(t) for episode in data.val_dataloader() for t in episode.target} == {4, 5, 6}
    assert {int(t) for episode in data.test_dataloader() for t in episode.target} == {7, 8, 9}


def test_episodes_follow_seed_and_epoch():
    loader = digits().train_dataloader()
    first, again = ([e.index for e in loader] for _ in range(2))
    assert all(map(torch.equal, first, again))
    loader.sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader)).index, first[0])
    assert not torch.equal(next(iter(digits(seed=1).train_dataloader())).index, first[0])
    tests = digits().test_dataloader()
    before = [e.index for e in tests]
    tests.sampler.set_epoch(3)
    assert all(map(torch.equal, before, [e.index for e in tests]))


@pytest.mark.bad_input
def test_what_is_no_episode_is_refused():
    data = digits()
    good = next(iter(data.train_dataloader()))
    plain = next(iter(held_out().train_dataloader()))
    targets = torch.tensor([7, 7, 2, 2, 7, 2])

    def batch(t):
        t = torch.tensor(t)
        return plain._replace(target=t, image=torch.zeros(len(t), 1, 4, 4))

    for wrong in ([7, 2, 7, 7], [7, 7, 7], [7, 2], [], [7, 7, 2, 2, 2, 7], [7, 2, 2, 2, 7, 7]):
        with pytest.raises(ValueError, match="that are no episode"):
            as_episode(batch(wrong))
    found = as_episode(batch(targets.tolist()))
    assert (found.way, found.shot, found.query) == (2, 2, 1)
    with pytest.raises(ValueError, match="batch: found no episode, needed data with sampling"):
        module().training_step(plain, 0)
    assert module().training_step(good, 0).isfinite()
    for changed, says in [
        ({"train_way": 5}, "sampling, train fold: labels: found 4 classes"),
        ({"query": 300}, "sampling, train fold: labels: found .* samples of class"),
    ]:
        with pytest.raises(ValueError, match=says):
            digits(**changed).train_dataloader()
    with pytest.raises(ValueError, match="sampling, test fold: labels: found 3 classes"):
        digits(way=4).test_dataloader()
    with pytest.raises(ValueError, match="val_episodes: found 0"):
        Episodes(val_episodes=0)


# -- the system


def test_terms_are_the_cards():
    net = module(terms=("cross", "prototriplet", "fullicnn", "suppicnn", "queryicnn", "protoicnn"), temperature=2.0)
    episode = next(iter(digits().train_dataloader()))
    found = net.loss_terms(episode)
    with torch.no_grad():
        z = net.embed(episode.image)
    supports, queries = z[:8], z[8:]
    of_supports, of_queries = torch.arange(4).repeat_interleave(2), torch.arange(4).repeat_interleave(3)
    prototypes = torch.stack([supports[of_supports == c].mean(0) for c in range(4)])
    expected = {
        "cross": F.cross_entropy(-torch.cdist(queries, prototypes).square() / 2, of_queries),
        "prototriplet": ProtoTripletLoss(0.5)(queries, of_queries, prototypes),
        "fullicnn": ICNNLoss(4)(z, torch.cat([of_supports, of_queries]), instances_per_class=5),
        "suppicnn": ICNNLoss(4)(supports, of_supports),
        "queryicnn": ICNNLoss(4)(queries, of_queries, supports, of_supports),
        "protoicnn": ICNNLoss(4)(queries, of_queries, prototypes, torch.arange(4)),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        near(found[name], value, rtol=1e-3, atol=1e-5)
    near(net.training_step(episode, 0), torch.stack(list(found.values())).mean().detach(), rtol=1e-4)
    only = module(terms=["prototriplet"], temperature=2.0)
    near(only.training_step(episode, 0), found["prototriplet"].detach(), rtol=1e-4)


def test_schedule_is_the_authors():
    net = module()
    (stage,) = net.stages
    assert (stage.max_epochs, stage.lr, stage.gamma) == (200, 1e-3, 0.5)
    assert tuple(stage.milestones) == tuple(range(20, 200, 20))
    assert stage.monitor == "val/accuracy"
    assert isinstance(net.configure_optimizers(), torch.optim.Adam)
    net = module(schedule=FewShotSchedule(optimizer="sgd", keep="last"))
    enter_stage(net, net.stages[0])
    (group,) = net.configure_optimizers().param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert net.stages[0].monitor is None


@pytest.mark.bad_input
def test_bad_settings_are_named(tmp_path):
    for changed, says in [
        ({"terms": ()}, "terms: found"),
        ({"terms": ("cross", "cross")}, "terms: found"),
        ({"terms": ("crossentropy",)}, "terms: found 'crossentropy'"),
        ({"temperature": -1}, "temperature: found -1"),
        ({"margin": -1}, "margin: found -1"),
        ({"k": 0}, "k: found 0"),
        ({"backbone_weights": str(tmp_path / "none.ckpt")}, "no such file"),
    ]:
        with pytest.raises(ValueError, match=says):
            module(**changed)


def test_training_by_episodes_learns_and_is_kept(tmp_path):
    task = Episodes(way=5, train_way=10, query=4, episodes=20, val_episodes=5, test_episodes=30)
    split = ClassSplit(val=["Latin/[a-e]"], test=["Greek/*"])
    data = Glyphs(image_size=16, per_class=5, protocol=split, sampling=task)
    net = module(schedule=FewShotSchedule(epochs=2))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Curriculum()],
    )
    trainer.test(net, datamodule=data, verbose=False)
    before = net.test_results["summary"]["accuracy"]
    trainer.fit(net, datamodule=data)
    assert all(0 < item["val/accuracy"] <= 1 for item in trainer.callbacks[0].history)
    trainer.test(net, datamodule=data, verbose=False)
    found = net.test_results
    assert found["summary"]["accuracy"] > before + 0.04
    assert found["records"] == 30
    assert found["labels"][0]["episodes"] == "5-way 1-shot"
    again = FewShotModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    accuracies = []
    with torch.no_grad():
        for episode in data.test_dataloader():
            supports, _ = episode.labels()
            logits = again.network(episode.image[:5], supports, episode.image[5:])
            accuracies.append((logits.argmax(1) == episode.labels()[1]).double().mean())
    assert confidence_interval(accuracies) == pytest.approx(tuple(found["summary"].values()), abs=1e-6)
    batch = next(iter(data.predict_dataloader()))
    answer = again.predict_step(batch, 0)
    assert torch.equal(answer["index"], batch.index)
    assert answer["embeddings"].shape == (len(batch.image), 64)


def test_a_backbone_starts_from_other_weights(tmp_path):
    path = tmp_path / "c.ckpt"
    backbone, _ = create_backbone("convnet4", in_channels=1)
    named = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": named | {"head.weight": torch.zeros(2, 64)}}, path)
    again = module(backbone_weights=str(path))
    for name, value in backbone.state_dict().items():
        assert torch.equal(again.network.encoder.state_dict()[name], value)
    with pytest.raises(ValueError, match="holds another backbone"):
        FewShotModule("conv4", image_size=16, in_channels=1, backbone_weights=str(path))
    torch.save({"state_dict": {"head.weight": torch.zeros(2, 64)}}, path)
    with pytest.raises(ValueError, match=r"found no weights named backbone\.\*"):
        module(backbone_weights=str(path))


def test_the_sampler_is_the_cores():
    from proto_core.data import EpisodeSampler as Core

    assert EpisodeSampler is Core
