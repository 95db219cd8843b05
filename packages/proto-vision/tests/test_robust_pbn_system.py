"""Robust prototype-based networks in proto-vision: golden values of the deep parts, both trainings, reports."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, RobustPBNModule, robust_pbn
from proto_vision.data.dataset import ImageBatch
from proto_vision.robust_pbn import (
    DeepPBN,
    RobustPBNSchedule,
    ShallowPBN,
    alignment_loss,
    component_map,
    pool_detections,
    rbf_head_output,
    tanh_uniformity_loss,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "robust_pbn.npz")


def tensor(golden, name):
    return torch.from_numpy(np.asarray(golden[name])).clone()


def near(found, expected, **tolerance):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, **(tolerance or EXACT))


# -- the deep network's parts


def test_maps_detections_and_losses_equal_the_authors_code(golden):
    features, other = tensor(golden, "d_features").requires_grad_(), tensor(golden, "d_features_b")
    maps, maps_b = component_map(features), component_map(other)
    near(maps, golden["d_component_map"])
    near(pool_detections(maps), golden["d_detections"])
    near(pool_detections(maps_b), golden["d_detections_b"])
    align = alignment_loss(maps, maps_b)
    near(align, golden["d_alignment"])
    near(torch.autograd.grad(align, features, retain_graph=True)[0], golden["d_alignment_grad"])
    tanh = tanh_uniformity_loss(pool_detections(maps), pool_detections(maps_b))
    near(tanh, golden["d_tanh"])
    near(torch.autograd.grad(tanh, features)[0], golden["d_tanh_grad"])


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_rbf_head_equals_the_authors_code(golden, case):
    found = rbf_head_output(tensor(golden, f"{case}_detections"), tensor(golden, f"{case}_rbf_weight"))
    near(found, golden[f"{case}_rbf_output"])


def passing(channels):
    """A convolution that changes nothing: a backbone whose inputs are maps."""
    layer = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(layer.weight)
    return layer


@pytest.mark.parametrize("head", ["cbc", "rbf"])
def test_network_equals_the_authors_code(golden, head):
    net = DeepPBN(3, passing(10), head=head).double()
    with torch.no_grad():
        if head == "cbc":
            net.head.reasoning_logits.copy_(tensor(golden, "i_reasoning_logits"))
        else:
            net.rbf_weight.copy_(tensor(golden, "i_rbf_weight"))
    name = "probabilities" if head == "cbc" else "rbf_output"
    for inference, end in ((False, ""), (True, "_inference")):
        maps, detections, outputs = net(tensor(golden, "i_features"), inference=inference)
        near(maps, golden["i_component_map"])
        near(detections, golden[f"i_detections{end}"])
        near(outputs, golden[f"i_{name}{end}"])
    assert (detections[0] == 0.1).all()  # exactly 0.1 is there
    weight, bias = net.evidence_weights()
    near(detections @ weight.T + bias, outputs.detach())


def test_inference_detections_equal_the_authors_code(golden):
    features = tensor(golden, "d_features")
    near(DeepPBN(2, passing(6)).double()(features, inference=True)[1], golden["d_inference_detections"])


def test_the_papers_backbones_keep_large_maps():
    for name, channels, size, parts in (("convnext_tiny", 768, 6, "6"), ("resnet50", 2048, 8, "layer3")):
        with torch.device("meta"):  # shapes alone
            net = DeepPBN(2, name)
            assert net.backbone(torch.zeros(1, 3, 64, 64)).shape == (1, channels, size, size)
        assert net.num_components == channels
        assert isinstance(net.add_on, nn.Identity)
        assert net.trained_backbone()[0] == f"backbone.{parts}.*"
    assert DeepPBN(2, passing(3)).trained_backbone() == ("backbone.*",)


def test_names_of_the_core_are_the_cores():
    from proto_core import losses, prototypes

    for name in ("ClassificationByComponents", "cbc_margin_root", "rbf_detection", "robustness_certificate"):
        assert getattr(robust_pbn, name) is getattr(prototypes, name)
    for name in ("ProbabilityMarginLoss", "RobustnessMarginLoss", "TemplateMarginLoss", "GLVQLoss"):
        assert getattr(robust_pbn, name) is getattr(losses, name)


def test_start_shrinking_and_components_of_a_number():
    torch.manual_seed(0)
    net = DeepPBN(50, passing(40), head="rbf")
    assert float(net.rbf_weight.detach().mean()) == pytest.approx(1, abs=0.02)
    assert float(net.rbf_weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    with torch.no_grad():
        net.rbf_weight[0, 0] = 5e-4
    before = net.rbf_weight.detach().clone()
    net.shrink_()
    near(net.rbf_weight, (before - 1e-3).clamp_min(0), rtol=1e-6)
    add_on = DeepPBN(3, passing(4), num_components=7).add_on
    assert add_on.weight.shape == (7, 4, 1, 1)
    assert add_on.bias is not None
    assert float(add_on.weight.detach().abs().max()) <= (6 / 11) ** 0.5


def test_empty_batches_one_place_and_half_precision():
    maps = component_map(torch.zeros(0, 3, 2, 2))
    assert float(alignment_loss(maps, maps)) == 0
    assert tanh_uniformity_loss(pool_detections(maps), pool_detections(maps)).isfinite()
    for head in ("cbc", "rbf"):
        assert DeepPBN(2, passing(3), head=head)(torch.zeros(0, 3, 2, 2))[2].shape == (0, 2)
        half = DeepPBN(2, passing(3), head=head).bfloat16()(torch.rand(2, 3, 1, 1).bfloat16())
        assert all(part.dtype == torch.float32 for part in half)


@pytest.mark.bad_input
def test_bad_input_of_the_deep_network_is_refused():
    maps = torch.rand(2, 3, 2, 2)
    for call, says in [
        (lambda: DeepPBN(1, passing(3)), "num_classes: found 1"),
        (lambda: DeepPBN(2, passing(3), head="mlp"), "head: found 'mlp'"),
        (lambda: DeepPBN(2, passing(3), num_components=0), "num_components: found 0"),
        (lambda: DeepPBN(2, "vgg"), "backbone: found 'vgg'"),
        (lambda: DeepPBN(2, nn.Identity()), "backbone: found no Conv2d"),
        (lambda: DeepPBN(2, nn.Sequential(passing(3), nn.Flatten()))(maps), "backbone: found a map of shape"),
        (lambda: component_map(maps[0]), "features: found shape"),
        (lambda: pool_detections(maps[0]), "map: found shape"),
        (lambda: alignment_loss(maps, maps[:1]), "map_a, map_b: found shapes"),
        (lambda: tanh_uniformity_loss(maps[:, :, 0, 0], maps[:, :2, 0, 0]), "detections_a, detections_b: found"),
        (lambda: tanh_uniformity_loss(maps[:, :, 0, 0], maps[:, :, 0, 0], eps=0), "eps: found 0"),
        (lambda: rbf_head_output(torch.rand(2, 3), torch.rand(2, 4)), "detections, weight: found shapes"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


# -- the shallow network


@pytest.mark.parametrize("case, kernel", [("c1", "norm"), ("c2", "gaussian"), ("c3", "norm"), ("c4", "gaussian")])
def test_shallow_network_equals_the_reference(golden, case, kernel):
    logits, components = tensor(golden, f"{case}_reasoning_logits"), tensor(golden, f"{case}_components")
    net = ShallowPBN(components.shape[1], len(components), logits.shape[1], kernel).double()
    with torch.no_grad():
        net.components.copy_(components)
        net.log_sigma.copy_(tensor(golden, f"{case}_sigma").log())
        net.head.reasoning_logits.copy_(logits)
    x, targets = tensor(golden, f"{case}_x"), tensor(golden, f"{case}_targets")
    for found, name in zip(net(x), ("probabilities", "detections", "distances")):
        near(found, golden[f"{case}_{name}"])
    near(net.certify(x, targets), golden[f"{case}_radius"])


def test_components_become_samples_of_their_classes():
    torch.manual_seed(0)
    x, y = torch.arange(20.0).unsqueeze(1), torch.arange(20) % 2
    net = ShallowPBN(1, 20, 2).initialise(x, y)
    assert sorted(net.components.detach().flatten().tolist()) == x.flatten().tolist()  # none twice
    assert (net.components.detach().flatten() % 2 == torch.arange(20) % 2).all()
    few = ShallowPBN(1, 7, 3).initialise(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([0, 1, 2, 2]))
    assert few.components.detach().flatten()[[0, 1, 3, 4, 6]].tolist() == [1, 2, 1, 2, 1]
    assert sorted(few.components.detach().flatten()[[2, 5]].tolist()) == [3, 4]
    ShallowPBN(1, 2, 3).initialise(x[:2], torch.tensor([0, 1]))  # class 2 has no component
    assert float(ShallowPBN(9, 2, 2).sigma[0].detach()) == pytest.approx(3)
    assert float(ShallowPBN(9, 2, 2, "gaussian").sigma[0].detach()) == pytest.approx(9)


@given(st.integers(0, 999), st.sampled_from(["norm", "gaussian"]))
@settings(max_examples=10, deadline=None)
def test_nothing_shorter_than_the_radius_changes_a_decision(seed, kernel):
    torch.manual_seed(seed)
    net = ShallowPBN(3, 6, 3, kernel).double()
    with torch.no_grad():
        net.head.reasoning_logits.mul_(10)
    x = torch.randn(12, 3).double()
    y = net(x)[0].argmax(1)
    radius = net.certify(x, y)
    away = nn.functional.normalize(torch.randn(50, 12, 3).double(), dim=-1)
    moved = net((x + 0.999 * radius[:, None] * away).flatten(0, 1))[0].argmax(1).unflatten(0, (50, 12))
    assert (moved == y)[:, radius > 1e-9].all()
    assert (net.certify(x, (y + 1) % 3) == 0).all()


@pytest.mark.bad_input
def test_bad_input_of_the_shallow_network_is_refused():
    x, y = torch.rand(3, 2), torch.arange(3)
    for call, says in [
        (lambda: ShallowPBN(2, 3, 1), "num_classes: found 1"),
        (lambda: ShallowPBN(0, 3, 2), "dim: found 0"),
        (lambda: ShallowPBN(2, 0, 2), "num_components: found 0"),
        (lambda: ShallowPBN(2, 3, 2, "cubic"), "kernel: found 'cubic'"),
        (lambda: ShallowPBN(2, 3, 2, variant="thin"), "variant: found 'thin'"),
        (lambda: ShallowPBN(2, 3, 3, variant="original").certify(x, y), "needed 'slim' for a certificate"),
        (lambda: ShallowPBN(2, 3, 3).certify(x, y + 1), "targets: found 3"),
        (lambda: ShallowPBN(2, 3, 3).certify(x[:0], y[:0]), "found shapes"),
        (lambda: ShallowPBN(2, 3, 3).initialise(x, y * 0), "found no sample of class 1"),
        (lambda: ShallowPBN(3, 3, 3).initialise(x, y), "x: found 2 features"),
        (lambda: ShallowPBN(2, 3, 2).initialise(x, y), "found 2"),
        (lambda: ShallowPBN(3, 3, 3)(x), "x, components: found shapes"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    assert ShallowPBN(2, 3, 3)(x[:0])[0].shape == (0, 3)
    assert ShallowPBN(2, 3, 3, variant="original")(x)[0].shape == (3, 3)


# -- the system


def shallow(**changed):
    torch.manual_seed(0)
    settings = {"image_size": 8, "in_channels": 1, "network": "shallow", "num_components": 20, "loss": "robustness"}
    settings |= {"margin": 1.0, "certified_radii": (0.1, 0.3), "class_names": list("0123456789")}
    return RobustPBNModule("pixels", **settings | {"schedule": RobustPBNSchedule(joint_epochs=1, lr=0.03)} | changed)


def deep(**changed):
    torch.manual_seed(0)
    plan = RobustPBNSchedule(1, 1, 1, lr=3e-3)
    settings = {"image_size": 8, "in_channels": 1, "num_components": 6, "schedule": plan}
    return RobustPBNModule("conv2", **settings | {"class_names": list("0123456789")} | changed)


def trainer(folder, **changed):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[Curriculum()],
        **changed,
    )


def batch_of(n, *shape):
    every = torch.arange(n)
    return ImageBatch(torch.rand(n, *shape) * 2 - 1, every % 10, every, every >= 0)


def test_shallow_training_certifies_and_reports(tmp_path):
    data, net = Digits(image_size=8, batch_size=128), shallow(schedule=RobustPBNSchedule(joint_epochs=6, lr=0.1))
    runner = trainer(tmp_path)
    runner.fit(net, datamodule=data)
    runner.test(net, datamodule=data, verbose=False)
    again = RobustPBNModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    assert bool(again.vectors.fitted)
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        said = again.predict_step(batch, 0)
        assert float((said["decisions"].int().argmax(1) == batch.target).float().mean()) > 0.5
        # an attack on the pixel values that is shorter than the radius
        away = nn.functional.normalize(torch.randn(30, len(batch.image), 64), dim=-1).unflatten(2, (1, 8, 8))
        moved = batch.image + 2 * 0.99 * said["radius"][:, None, None, None] * away  # std 0.5: twice as long
        kept = torch.stack([again.class_outputs(images).argmax(1) for images in moved])
    assert (kept == said["decisions"].int().argmax(1))[:, said["radius"] > 1e-4].all()
    assert float(said["radius"].max()) > 0.01
    summary = net.test_results["summary"]
    images, targets = data.test_set, data.targets[torch.from_numpy(data.rows("test"))]
    with torch.no_grad():
        radius = net.certify(torch.stack([images[n].image for n in range(len(images))]), targets)
    assert summary["certified_0.1"] == pytest.approx(float((radius > 0.1).float().mean()), abs=1e-6)
    assert summary["mean_radius"] == pytest.approx(float(radius.mean()), rel=1e-4)
    assert summary["certified_0.3"] <= summary["certified_0.1"] <= summary["accuracy"]
    names = [data.record_ids[int(row)] for row in data.test_set.rows[:2]]
    (found,) = again.explain(batch.image[:1], names[:1])[0]
    assert found.total == pytest.approx(float(said["probabilities"][0].max()), rel=1e-4)
    assert len(found.evidence) == 20
    html = again.explain_images(data, names, top=2)
    assert html.count("<article") == 2
    for text in ("detection × weight", "Certified radius", "as it was trained"):
        assert text in html
    with pytest.raises(ValueError, match="needed 'deep' for parts"):
        again.part_evidence(batch.image)


def test_shallow_losses_and_inputs():
    batch, net = batch_of(20, 1, 8, 8), shallow()
    near(net.vectors.raw(batch.image), ((batch.image + 1) / 2).flatten(1), rtol=1e-5, atol=1e-6)
    net.vectors.fit(net.vectors.raw(batch.image))
    x = net.vectors(batch.image)
    near(x.mean(0), np.zeros(64), atol=1e-5)
    assert float(x.square().mean()) == pytest.approx(1, rel=1e-5)
    near(net.vectors.drawn(x)[:, 0], (batch.image[:, 0] + 1) / 2, atol=1e-5)
    net.network.initialise(x, batch.target)
    probabilities, detections, _ = net.network(x)
    head, sigma = net.network.head, net.network.sigma
    expected = robust_pbn.RobustnessMarginLoss(1.0)(detections, head.reasoning, sigma, batch.target)
    near(net.training_step(batch, 0), expected.detach(), rtol=1e-5)
    net.loss_name = "probability"
    expected = robust_pbn.ProbabilityMarginLoss(1.0)(probabilities, batch.target)
    near(net.training_step(batch, 0), expected.detach(), rtol=1e-5)
    assert isinstance(net.configure_optimizers(), torch.optim.Adam)
    net.vectors.fit(torch.ones(3, 64))  # nothing varies
    assert float(net.vectors.scale) == 1


def test_processes_start_from_the_components_of_the_first(monkeypatch):
    net, first = shallow(), []
    monkeypatch.setattr(f"{RobustPBNModule.__module__}.is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: first.append((tensor.fill_(7), src)))
    net._trainer = SimpleNamespace(datamodule=Digits(image_size=8, batch_size=128))
    net.on_train_start()
    assert [src for _, src in first] == [0]
    assert (net.network.components == 7).all()


def test_shallow_on_features_of_a_frozen_encoder(tmp_path):
    data, net = Digits(image_size=8, batch_size=128), shallow(loss="probability", num_components=None)
    net = RobustPBNModule.from_settings(net.settings() | {"backbone": "conv2"})
    before = net.vectors.encoder[0].network.network.layers[0][0].weight.detach().clone()
    trainer(tmp_path, limit_train_batches=1).fit(net, datamodule=data)
    assert torch.equal(before, net.vectors.encoder[0].network.network.layers[0][0].weight)
    assert net.network.components.shape == (20, 64)
    assert not net.vectors.train().encoder.training
    net.eval()
    shown = net.decoded_prototypes(data).images
    vectors = net.vectors(torch.stack([data.model_input(data.record_ids[row]) for row in data.rows("train")]))
    nearest = data.rows("train")[net.network(vectors)[2].argmin(0).numpy()]
    near(shown[3], (data.model_input(data.record_ids[nearest[3]]) + 1) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="data: found none"):
        net.decoded_prototypes()


def test_deep_phases_train_what_the_paper_trains():
    net = deep()
    trains = {}
    for stage in net.stages:
        enter_stage(net, stage)
        trains[stage.name] = {name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad}
        assert isinstance(net.configure_optimizers(), torch.optim.AdamW)
        assert net.configure_optimizers().param_groups[0]["weight_decay"] == 0
    assert trains == {
        "pretrain": {"backbone", "add_on"},
        "classifier": {"head"},
        "joint": {"backbone", "add_on", "head"},
    }
    assert [stage.project for stage in net.stages] == [False, False, True]
    assert [s.lr for s in deep(schedule=RobustPBNSchedule()).stages] == [3.75e-4, 5e-3, 3.75e-4]
    coloured = deep(in_channels=3)
    coloured.backbone_name = "resnet50"  # a grey channel three times
    grey = torch.rand(2, 1, 8, 8)
    assert torch.equal(coloured(grey)[2], coloured(grey.expand(-1, 3, -1, -1))[2])


def test_deep_losses_of_each_phase():
    batch = batch_of(8, 2, 1, 8, 8)
    for head in ("cbc", "rbf"):
        net = deep(head=head, schedule=RobustPBNSchedule(4, 1, 1))
        maps, detections, outputs = net(batch.stacked().image)
        align = alignment_loss(maps[:8], maps[8:])
        tanh = tanh_uniformity_loss(detections[:8], detections[8:])
        net.stage = net.stages[0]
        near(net.training_step(batch, 0), (align / 4 + 5 * tanh).detach(), rtol=1e-5)  # the first of four epochs
        if head == "cbc":
            own = robust_pbn.ProbabilityMarginLoss(0.025)(outputs, batch.target.repeat(2))
            joint = own
        else:
            own = nn.functional.nll_loss(outputs.square().log1p().log_softmax(1), batch.target.repeat(2))
            joint = 5 * align + 2 * tanh + 2 * own
        net.stage = net.stages[1]
        near(net.training_step(batch, 0), own.detach(), rtol=1e-5)
        net.stage = net.stages[2]
        near(net.training_step(batch, 0), joint.detach(), rtol=1e-5)
    with pytest.raises(ValueError, match="found one view of each image"):
        net.training_step(batch_of(8, 1, 8, 8), 0)
    net.eval()
    said = net.predict_step(batch_of(8, 1, 8, 8), 0)["probabilities"]
    near(said.sum(1), np.ones(8), rtol=1e-5)


@pytest.mark.parametrize("phase, steps", [(0, 0), (1, 2), (2, 2)])
def test_weights_of_the_baseline_fall_after_every_step(tmp_path, phase, steps):
    data = Digits(image_size=8, batch_size=64, augment="tilt", views=["tilt"])
    plan = RobustPBNSchedule(*(int(n == phase) for n in range(3)), lr=1e-12, classifier_lr=1e-12)
    net = deep(head="rbf", schedule=plan)
    before = net.network.rbf_weight.detach().clone()
    trainer(tmp_path, limit_train_batches=6, accumulate_grad_batches=3).fit(net, datamodule=data)
    near(net.network.rbf_weight, before - steps * 1e-3, rtol=1e-5)


def test_deep_training_remembers_cases_and_reports(tmp_path):
    data = Digits(image_size=8, batch_size=128, augment="tilt", views=["tilt"])
    net = deep()
    trainer(tmp_path, limit_train_batches=2).fit(net, datamodule=data)
    again = RobustPBNModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    with torch.no_grad():
        maps = again(torch.stack([data.model_input(data.record_ids[i]) for i in data.rows("train")]))[0].flatten(2)
    for k in range(6):
        case = int(np.flatnonzero(data.rows("train") == int(again.cases.case_index[k]))[0])
        near(maps[case, k, again.cases.case_position[k]], maps[:, k].max(), rtol=1e-5)
    names = [data.record_ids[int(row)] for row in data.test_set.rows[:2]]
    images = torch.stack([data.model_input(name) for name in names])
    outputs = again.class_outputs(images)
    for n, (found,) in enumerate(again.explain(images, names)):
        assert found.total == pytest.approx(float(outputs[n].max().detach()), rel=1e-4)
        assert found.bias > 0
        assert all(len(item.classes) == 1 and item.case is not None for item in found.evidence)
    html = again.explain_images(data, names, top=1)
    assert html.count("<article") == 2
    assert "looks like this part" in html
    near(again.predict_step(batch_of(3, 1, 8, 8), 0)["probabilities"].amax(1) > 0, np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="deep networks have no certified radius"):
        again.certify(images, torch.zeros(2).long())


@pytest.mark.bad_input
def test_bad_settings_are_refused():
    for changed, says in [
        ({"network": "wide"}, "network: found 'wide'"),
        ({"loss": "hinge"}, "loss: found 'hinge'"),
        ({"certified_radii": (-1.0,)}, "certified_radii"),
        ({"pretrained": True}, "pretrained: there are no weights for 'pixels'"),
        ({"schedule": RobustPBNSchedule(keep="first")}, "keep: found 'first'"),
    ]:
        with pytest.raises(ValueError, match=says):
            shallow(**changed)
    with pytest.raises(ValueError, match="deep networks have no radius"):
        deep(loss="robustness")
    with pytest.raises(ValueError, match="'shallow' needs a data module"):
        lonely().on_train_start()


def lonely():
    """A shallow system whose trainer has no data module."""
    net = shallow()
    net.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return net
