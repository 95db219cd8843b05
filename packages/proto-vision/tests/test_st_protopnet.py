"""STProtoPNet: the authors' values of the network and its push, the card's edge cases, its training and explanation."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proto_core.training import Curriculum, enter_stage, read_checkpoint
from proto_vision import Digits, STProtoPNet, STProtoPNetModule
from proto_vision.backbones import ConvBackbone
from proto_vision.data.dataset import ImageBatch
from proto_vision.explanation import pixels_of
from proto_vision.st_protopnet import STLossWeights, STSchedule

BRANCHES = ("trivial", "support")


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "st_protopnet.npz")


def near(found, expected, rtol=1e-6, atol=1e-8):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


def authors_network(golden, variant):
    """The network of the golden arrays, and the arrays."""
    arrays = {
        key.partition("/")[2]: torch.from_numpy(golden[key])
        for key in golden.files
        if key.startswith(f"model_{variant}/")
    }
    weight = arrays["backbone_conv_weight"]
    backbone = nn.Sequential(nn.Conv2d(weight.shape[1], weight.shape[0], 3, 2, 1), nn.Tanh())
    classes, count = arrays["head_trivial"].shape
    net = STProtoPNet(
        backbone,
        weight.shape[0],
        classes,
        prototypes_per_class=count // classes,
        prototype_channels=arrays["prototypes_trivial"].shape[1],
        variant=variant,
        upsample=variant == "cosine",
    ).double()
    with torch.no_grad():
        backbone[0].weight.copy_(weight)
        backbone[0].bias.copy_(arrays["backbone_conv_bias"])
        for name in BRANCHES:
            net.layer(name).prototypes.copy_(arrays[f"prototypes_{name}"])
            net.head(name).weight.copy_(arrays[f"head_{name}"])
            convolutions = [m for m in getattr(net, f"addon_{name}") if isinstance(m, nn.Conv2d)]
            assert len(convolutions) == 2
            for number, convolution in enumerate(convolutions, 1):
                convolution.weight.copy_(arrays[f"addon_{name}_conv{number}_weight"])
                convolution.bias.copy_(arrays[f"addon_{name}_conv{number}_bias"])
    return net, arrays


@pytest.mark.parametrize("variant", ["projection", "cosine"])
def test_network_equals_the_authors_code(golden, variant):
    net, arrays = authors_network(golden, variant)
    x = arrays["x"].requires_grad_()
    out = net(x)
    for key in ("logits_trivial", "logits_support", "max_trivial", "max_support", "maps_trivial", "maps_support"):
        near(getattr(out, key), arrays[key])
    near(out.logits, arrays["logits_trivial"] + arrays["logits_support"])
    features = net.backbone(x)
    near(features, arrays["backbone_features"])
    for name in BRANCHES:
        near(net.features(name, features), arrays[f"features_{name}"])
    loss = F.cross_entropy(out.logits_trivial, arrays["targets"]) + F.cross_entropy(
        out.logits_support, arrays["targets"]
    )
    near(loss, arrays["loss"])
    wanted = [x, net.prototypes_trivial.prototypes, net.prototypes_support.prototypes]
    for found, key in zip(torch.autograd.grad(loss, wanted), ("x", "prototypes_trivial", "prototypes_support")):
        near(found, arrays[f"grad_{key}"])


@pytest.mark.parametrize("variant", ["projection", "cosine"])
def test_push_equals_the_authors_code(golden, variant):
    net, arrays = authors_network(golden, variant)
    images, labels, size = arrays["push_images"], arrays["push_labels"], int(arrays["push_batch_size"])
    net.train()
    found = net.push(zip(images.split(size), labels.split(size)))
    assert net.training
    for name in BRANCHES:
        near(net.layer(name).prototypes, arrays[f"push_prototypes_{name}"], rtol=1e-5, atol=1e-6)
        result = found[name]
        own = net.layer(name).class_identity.argmax(1)
        seen = result.image_index >= 0
        assert torch.equal(labels[result.image_index[seen]], own[seen])
        with torch.no_grad():
            features = F.normalize(net.features(name, net.backbone(images)), dim=1)
        places = features[result.image_index[seen], :, result.row[seen], result.col[seen]]
        near(net.layer(name).prototypes[seen][:, :, 0, 0], places, rtol=1e-6)


def small(variant="projection", classes=3, per_class=2):
    torch.manual_seed(0)
    return STProtoPNet(
        ConvBackbone(1, (4, 6)), 6, classes, prototypes_per_class=per_class, prototype_channels=5, variant=variant
    )


def test_a_class_without_an_image_keeps_its_prototypes():
    net = small()
    before = copy.deepcopy(net.state_dict())
    found = net.push([(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))])
    for name in BRANCHES:
        assert torch.equal(net.layer(name).prototypes[4:], before[f"prototypes_{name}.prototypes"][4:])
        assert found[name].image_index[4:].tolist() == [-1, -1] == found[name].row[4:].tolist()
        assert (found[name].image_index[:4] >= 0).all()
    assert net.push([])["trivial"].image_index.tolist() == [-1] * 6


def test_push_leaves_the_mode_of_every_part_as_it_was():
    net = small().train()
    net.backbone.eval()
    net.push([(torch.rand(2, 1, 8, 8), torch.tensor([0, 1], dtype=torch.int32))])
    assert net.training
    assert net.addon_trivial.training
    assert not any(part.training for part in net.backbone.modules())


def test_push_takes_the_first_of_equal_images():
    net = small()
    images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    found = net.push([(images, labels), (images, labels), (images, labels)])
    assert found["support"].image_index.tolist() == [0, 0, 1, 1, 2, 2]


def test_heads_start_as_the_card_says():
    net = small()
    expected = torch.full((3, 6), -0.5)
    for p in range(6):
        expected[p // 2, p] = 1
    assert torch.equal(net.head_trivial.weight, expected)
    assert net.head_trivial.bias is None
    assert torch.equal(net.head_support.weight, expected)


def test_upsampling_after_the_add_on_is_upsampling_before_it():
    torch.manual_seed(0)
    net = STProtoPNet(nn.Identity(), 6, 2, prototype_channels=4, variant="cosine", upsample=True).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.double)
    first, second = [m for m in net.addon_trivial if isinstance(m, nn.Conv2d)]
    larger = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    near(net.addon_trivial(x), second(first(larger)).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["projection", "cosine"])
def test_black_images_and_zero_features_give_finite_gradients(variant):
    net = small(variant)
    for name in BRANCHES:
        nn.init.zeros_(net.layer(name).prototypes)
    out = net(torch.zeros(2, 1, 8, 8))
    out.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("variant", ["projection", "cosine"])
def test_under_autocast_similarities_and_logits_stay_in_float32(variant):
    net = small(variant, classes=100, per_class=5)
    x = torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, branch = net(x), net.branch("trivial", net.backbone(x))
    assert out.max_trivial.dtype == out.maps_support.dtype == out.logits.dtype == torch.float32
    # bfloat16 would round logits of a hundred classes by more than they differ
    near(branch.logits, (branch.similarities @ net.head_trivial.weight.T).detach(), rtol=1e-6)
    half = net.bfloat16()(x.bfloat16())
    assert half.logits.dtype == torch.float32


def test_add_ons_start_as_the_card_says():
    torch.manual_seed(0)
    net = STProtoPNet(nn.Identity(), 400, 2, prototype_channels=100)
    for name in BRANCHES:
        convolutions = [m for m in getattr(net, f"addon_{name}") if isinstance(m, nn.Conv2d)]
        assert [tuple(m.weight.shape) for m in convolutions] == [(100, 400, 1, 1), (100, 100, 1, 1)]
        for m in convolutions:
            assert float(m.weight.detach().std()) == pytest.approx(math.sqrt(2 / 100), rel=0.05)
            assert not m.bias.any()
    assert not torch.equal(net.addon_trivial[0].weight, net.addon_support[0].weight)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variant": "l2"}, "variant"),
        ({"prototypes_per_class": 0}, "prototypes_per_class"),
        ({"num_classes": 0}, "num_classes"),
        ({"backbone_channels": 0}, "backbone_channels"),
        ({"upsample": True}, "upsample"),
    ],
)
def test_bad_settings_are_refused(changed, message):
    settings = {"backbone_channels": 4, "num_classes": 3} | changed
    with pytest.raises(ValueError, match=message):
        STProtoPNet(nn.Identity(), **settings)


@pytest.mark.bad_input
def test_bad_module_settings_and_targets_are_refused():
    with pytest.raises(ValueError, match="num_classes: found 1"):
        STProtoPNetModule("conv2", 1)
    with pytest.raises(ValueError, match="rounds: found 0"):
        STProtoPNetModule("conv2", 3, schedule=STSchedule(rounds=0))
    with pytest.raises(ValueError, match="no model 'resnet3'"):
        STProtoPNetModule("resnet3", 3)
    with pytest.raises(ValueError, match="targets"):
        small().push([(torch.rand(1, 1, 8, 8), torch.tensor([3]))])


# -- training


def module(**changed):
    torch.manual_seed(0)
    settings = {
        "class_names": list("0123456789"),
        "image_size": 16,
        "in_channels": 1,
        "prototypes_per_class": 2,
        "prototype_channels": 8,
    }
    return STProtoPNetModule("conv2", **settings | changed)


def batch(net, n=12):
    g = torch.Generator().manual_seed(1)
    side, classes = net.image_size, net.num_classes
    images, every = torch.rand(n, 1, side, side, generator=g), torch.arange(n)
    return ImageBatch(images, every % classes, every, every >= 0)


class _Steps:
    """Runs training steps as Lightning does with manual optimisation, on a single optimiser."""

    def __init__(self, net, monkeypatch):
        self.net, self.optimizer = net, net.configure_optimizers()
        monkeypatch.setattr(net, "optimizers", lambda: self.optimizer)
        monkeypatch.setattr(net, "manual_backward", lambda loss: loss.backward())

    def __call__(self, batch_idx):
        return self.net.training_step(batch(self.net), batch_idx)


@pytest.mark.parametrize("turn", [0, 1])
def test_batches_take_turns(turn, monkeypatch):
    net = module()
    enter_stage(net, net.stages[1])
    before = copy.deepcopy(net.network.state_dict())
    step = _Steps(net, monkeypatch)
    step(turn)
    step(turn + 2)
    mine, other = BRANCHES[turn], BRANCHES[1 - turn]
    after = net.network.state_dict()
    moved = {
        key for key, value in after.items() if isinstance(value, torch.Tensor) and not torch.equal(value, before[key])
    }
    assert f"addon_{mine}.0.weight" in moved
    assert f"prototypes_{mine}.prototypes" in moved
    assert any(key.startswith("backbone") for key in moved)
    # the resting branch only gets unit length, and Adam knows nothing of it
    assert {key for key in moved if f"_{other}" in key} == {f"prototypes_{other}.prototypes"}
    near(after[f"prototypes_{other}.prototypes"], F.normalize(before[f"prototypes_{other}.prototypes"], dim=1), 1e-5)
    assert not any(p in step.optimizer.state for p in net._of_branch(other))
    for name in BRANCHES:
        near(net.network.layer(name).prototypes.flatten(1).norm(dim=1), np.ones(20), rtol=1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", BRANCHES)
def test_branch_loss_is_the_sum_of_its_terms(name, kind, tolerance):
    net = module(loss=STLossWeights(masking="multiply")).to(kind)
    data = batch(net)
    out = net.network.branch(name, net.network.backbone(data.image.to(kind)))
    layer, s, y = net.network.layer(name), out.cosines.detach(), data.target
    own = layer.class_identity[:, y].T
    P = layer.prototypes.detach().flatten(1)
    dots = (P @ P.T).reshape(10, 2, 10, 2)
    gram = torch.stack([P[2 * c : 2 * c + 2] @ P[2 * c : 2 * c + 2].T for c in range(10)]) - torch.eye(2)
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    if name == "trivial":
        between, weight = sum(dots[a, :, b].max() for a, b in pairs) / 90, 0.08
    else:
        between, weight = -sum(dots[a, :, b].min() for a, b in pairs) / 90, 0.48
    wrong = net.network.head(name).weight[layer.class_identity.T == 0]
    expected = (
        F.cross_entropy(out.logits, y)
        - 0.8 * (s * own).amax(1).mean()
        + weight * (s * (1 - own)).amax(1).mean()
        + 1e-3 * gram.abs().sum()
        + between
        + 1e-4 * wrong.abs().sum()
    )
    near(net.branch_loss(name, out, y), expected.detach(), rtol=tolerance)


def test_rates_and_decay_are_the_authors():
    net = STProtoPNetModule("conv2", 4, in_channels=1)
    warmup, joint, heads = net.stages
    assert [(s.name, s.max_epochs) for s in net.stages] == [("warmup", 5), ("joint", 25), ("heads", 10)]
    assert (joint.milestones, joint.gamma, joint.project, heads.lr) == ((7, 9, 11, 13), 0.2, True, 1e-4)

    def groups(stage):
        enter_stage(net, stage)
        found = net.configure_optimizers().param_groups
        return [(round(g["lr"], 8), g["weight_decay"], len(g["params"])) for g in found]

    assert groups(warmup) == [(3e-3, 5e-4, 8), (3e-3, 0, 2)]
    assert groups(joint) == [(1e-4, 5e-4, 4), (3e-3, 5e-4, 8), (3e-3, 0, 2)]
    assert groups(heads) == [(1e-4, 0, 2)]
    net.train()
    assert not net.network.backbone.training


def test_rates_go_on_falling_over_the_rounds():
    schedule = STSchedule(warmup_epochs=1, joint_epochs=10, rounds=3, milestones=(7, 10, 13))
    stages = {stage.name: stage for stage in STProtoPNetModule("conv2", 4, in_channels=1, schedule=schedule).stages}
    assert list(stages) == ["warmup", "joint", "heads", "joint2", "heads2", "joint3", "heads3"]
    fallen = [
        sum(epoch >= milestone for milestone in stages[name].milestones)
        for name in ("joint", "joint2", "joint3")
        for epoch in range(10)
    ]
    assert fallen == [sum(epoch >= milestone for milestone in (7, 10, 13)) for epoch in range(30)]


def test_curriculum_projects_onto_training_images_and_explains_itself(tmp_path):
    import lightning.pytorch as pl

    data = Digits(image_size=16, batch_size=64)
    schedule = STSchedule(warmup_epochs=0, joint_epochs=2, head_epochs=1, backbone_lr=3e-3, head_lr=1e-3, milestones=())
    net = module(schedule=schedule)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Curriculum()],
    )
    trainer.fit(net, datamodule=data)
    trainer.test(net, datamodule=data, verbose=False)
    assert net.test_results["records"] == len(data.test_set)
    assert net.test_results["summary"]["accuracy"] == pytest.approx(float(trainer.callback_metrics["test/accuracy"]))
    again = STProtoPNetModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    layer = again.network.prototypes_support
    train = set(data.rows("train").tolist())
    assert set(layer.case_index.tolist()) <= train
    for p in range(20):
        assert layer.case_labels[p] == [str(p // 2)]
        row = data.find_row(layer.case_ids[p])
        with torch.no_grad():
            x = data.model_input(layer.case_ids[p])[None]
            features = F.normalize(again.network.features("support", again.network.backbone(x)), dim=1)
        assert row == layer.case_index[p]
        near(layer.prototypes[p, :, 0, 0], features[0].flatten(1)[:, layer.case_position[p]], rtol=1e-4, atol=1e-5)
    images = torch.stack([data.model_input(data.record_ids[i]) for i in data.rows("test")[:3]])
    for n, found in enumerate(again.explain(images, ["a", "b", "c"])):
        with torch.no_grad():
            logits = again(images).logits[n]
        assert found[0].label == again.class_names[int(logits.argmax())]
        assert found[0].predicted
        assert math.isclose(found[0].total, float(logits.max()), abs_tol=1e-4)
        assert len(found[0].evidence) == 40
        assert {e.group for e in found[0].evidence} == set(BRANCHES)
    two = again.explain(images[:1], ["a"], labels=["3", "5"])[0]
    assert [e.predicted for e in two].count(True) <= 1
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt", system="st_protopnet")
    with pytest.raises(ValueError, match="does not know"):
        again.explain(images[:1], ["a"], labels=["eleven"])


@pytest.mark.bad_input
def test_a_checkpoint_of_other_classes_is_refused():
    net, other = module(), module(class_names=list("012345678x"))
    checkpoint = {"state_dict": net.state_dict()}
    net.on_save_checkpoint(checkpoint)
    other_size = module(image_size=24)
    with pytest.raises(ValueError, match="another label set"):
        other.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="image_size 16"):
        other_size.on_load_checkpoint(checkpoint)


def test_places_of_a_map_cover_the_image_once():
    for size, image in ((4, 32), (7, 224), (5, 32)):
        rows = [pixels_of(r, 0, (size, size), image)[0] for r in range(size)]
        assert rows[0][0] == 0
        assert rows[-1][0] + rows[-1][1] == image
        assert all(a[0] + a[1] >= b[0] for a, b in pairwise(rows))
    assert pixels_of(1, 2, (3, 3), 32, patch=2) == ((8, 16), (16, 16))


def test_pretrained_folder_gives_the_same_logits(tmp_path):
    net = module().eval()
    net.save_pretrained(tmp_path)
    again = STProtoPNetModule.from_pretrained(tmp_path)
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x).logits, net(x).logits)
    with pytest.raises(ValueError, match="no such file"):
        STProtoPNetModule.from_pretrained(tmp_path / "none")
