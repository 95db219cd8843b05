"""EvalProtoPNet: the authors' values of network, alignment and head, the card's edge cases, its training."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proto_core.losses import ClusterLoss, SeparationLoss, SubspaceOrthogonalityLoss
from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, EvalProtoPNet, EvalProtoPNetModule
from proto_vision.data.dataset import ImageBatch
from proto_vision.evalprotopnet import EvalSchedule, ScoreAggregation, SDFALoss


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "evalprotopnet.npz")


def arrays_of(golden, prefix):
    keys = [key for key in golden.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in keys}


def near(found, expected, rtol=1e-6, atol=1e-8):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


class Backbone(nn.Module):
    """The golden arrays' two convolutions with tanh."""

    def __init__(self, a):
        super().__init__()
        stride = int(a["stride"])
        one, two = a["shallow_conv_weight"], a["deep_conv_weight"]
        self.shallow = nn.Conv2d(one.shape[1], one.shape[0], 3, padding=1)
        self.deep = nn.Conv2d(two.shape[1], two.shape[0], stride, stride)
        with torch.no_grad():
            for name in ("shallow", "deep"):
                getattr(self, name).weight.copy_(a[f"{name}_conv_weight"])
                getattr(self, name).bias.copy_(a[f"{name}_conv_bias"])

    def forward(self, x):
        shallow = self.shallow(x).tanh()
        return shallow, self.deep(shallow).tanh()


@pytest.mark.parametrize("case", ["model_a/", "model_b/"])
def test_network_and_losses_equal_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    classes, per_class = int(a["num_classes"]), int(a["prototypes_per_class"])
    channels, deep = a["addon_weight"].shape[:2]
    net = EvalProtoPNet(
        Backbone(a), deep, classes, prototypes_per_class=per_class, prototype_channels=channels
    ).double()
    assert [type(layer) for layer in net.addon] == [nn.Conv2d, nn.Sigmoid]
    with torch.no_grad():
        net.backbone.load_state_dict(Backbone(a).double().state_dict())
        for name in ("shallow", "deep"):
            getattr(net.backbone, name).weight.copy_(a[f"{name}_conv_weight"])
            getattr(net.backbone, name).bias.copy_(a[f"{name}_conv_bias"])
        net.addon[0].weight.copy_(a["addon_weight"])
        net.addon[0].bias.copy_(a["addon_bias"])
        net.prototypes.prototypes.copy_(a["prototypes"])
        net.aggregation.weight.copy_(a["aggregation_weight"])
    x, targets = a["x"].requires_grad_(), a["targets"]
    out = net(x)
    for name in ("logits", "max_cosine", "maps"):
        near(getattr(out, name), a[name])
    layer = net.prototypes
    terms = {
        "cluster": ClusterLoss()(out.max_cosine, targets, layer.class_identity),
        "separation": SeparationLoss()(out.max_cosine, targets, layer.class_identity),
        "orthogonality": SubspaceOrthogonalityLoss()(layer.prototypes, classes),
        "sdfa": SDFALoss(per_class, threshold=float(a["threshold"]))(out.maps, out.shallow, out.deep, targets),
    }
    for name, value in terms.items():
        near(value, a[name])
    weights = {"cluster": 0.8, "separation": 0.08, "orthogonality": 1e-4, "sdfa": 0.5}
    total = F.cross_entropy(out.logits, targets) + sum(weights[name] * value for name, value in terms.items())
    near(total, a["total"])
    wanted = {"x": x, "prototypes": layer.prototypes, "aggregation_weight": net.aggregation.weight}
    for (name, _), found in zip(wanted.items(), torch.autograd.grad(total, list(wanted.values()))):
        near(found, a[f"grad_{name}"])


@pytest.mark.parametrize("case", ["model_a/", "model_b/"])
def test_alignment_and_head_alone_equal_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    shallow, deep = a["sdfa_shallow"].requires_grad_(), a["sdfa_deep"].requires_grad_()
    loss = SDFALoss(int(a["prototypes_per_class"]), threshold=float(a["threshold"]))
    found = loss(a["sdfa_maps"], shallow, deep, a["targets"])
    near(found, a["sdfa_loss"])
    found.backward()
    near(deep.grad, a["sdfa_deep_grad"])
    assert shallow.grad is None
    head = ScoreAggregation(int(a["num_classes"]), int(a["prototypes_per_class"])).double()
    with torch.no_grad():
        head.weight.copy_(a["aggregation_weight"])
    activations = a["sa_activations"].requires_grad_()
    logits = head(activations)
    near(logits, a["sa_logits"])
    (logits * a["sa_cotangent"]).sum().backward()
    near(activations.grad, a["sa_activations_grad"])
    near(head.weight.grad, a["sa_weight_grad"])


def test_zero_vectors_have_no_similarity_and_no_gradient(golden):
    a = arrays_of(golden, "zero/")
    deep = a["deep"].requires_grad_()
    loss = SDFALoss(int(a["prototypes_per_class"]), threshold=float(a["threshold"]))
    found = loss(a["maps"], a["shallow"], deep, a["targets"])
    near(found, a["sdfa"])
    found.backward()
    near(deep.grad, a["deep_grad"])
    assert deep.grad.isfinite().all()


def loop(maps, shallow, deep, targets, per_class, threshold):
    """The definition, place by place."""
    step = shallow.shape[2] // deep.shape[2]
    h, w = deep.shape[2:]
    total, count = 0.0, 0
    for n, target in enumerate(targets.tolist()):
        blocks = [
            shallow[n, :, r * step : (r + 1) * step, c * step : (c + 1) * step].flatten()
            for r in range(h)
            for c in range(w)
        ]
        cells = [deep[n, :, r, c] for r in range(h) for c in range(w)]
        for k in range(per_class):
            place = int(maps[n, target * per_class + k].flatten().argmax())
            for q in range(h * w):
                d = F.cosine_similarity(cells[place], cells[q], dim=0)
                s = F.cosine_similarity(blocks[place], blocks[q], dim=0)
                total += max(abs(float(d - s)) - threshold, 0)
                count += 1
    return total / count


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.4]))
def test_alignment_is_its_definition(seed, n, k, step, threshold):
    g = torch.Generator().manual_seed(seed)
    h, w, classes = 2, 3, 2
    maps = torch.randn(n, k * classes, h, w, generator=g).double()
    shallow = torch.randn(n, 2, h * step, w * step, generator=g).double()
    deep = torch.randn(n, 3, h, w, generator=g).double()
    targets = torch.randint(classes, (n,), generator=g)
    found = SDFALoss(k, threshold=threshold)(maps, shallow, deep, targets)
    near(found, loop(maps, shallow, deep, targets, k, threshold), rtol=1e-8)
    order = torch.randperm(n, generator=g)
    again = SDFALoss(k, threshold=threshold)(maps[order], shallow[order], deep[order] * 3, targets[order])
    near(again, found.detach(), rtol=1e-8)


def test_one_place_and_no_image_give_nothing():
    loss = SDFALoss(2, threshold=0)
    one = loss(torch.rand(3, 4, 1, 1), torch.rand(3, 2, 2, 2), torch.rand(3, 5, 1, 1), torch.tensor([0, 1, 1]))
    assert float(one) == pytest.approx(0, abs=1e-6)
    none = loss(torch.rand(0, 4, 2, 2), torch.rand(0, 2, 4, 4), torch.rand(0, 5, 2, 2), torch.zeros(0).long())
    assert float(none) == 0


def test_half_precision_is_computed_in_full():
    maps, shallow, deep, targets = (
        torch.rand(2, 4, 3, 3),
        torch.rand(2, 2, 6, 6),
        torch.rand(2, 5, 3, 3),
        torch.arange(2),
    )
    full = SDFALoss(2)(maps, shallow.bfloat16().float(), deep.bfloat16().float(), targets)
    half = SDFALoss(2)(maps.bfloat16(), shallow.bfloat16(), deep.bfloat16(), targets)
    assert half.dtype == torch.float32
    near(half, full.detach(), rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        near(SDFALoss(2)(maps, shallow.bfloat16().float(), deep.bfloat16().float(), targets), full.detach(), rtol=1e-5)


def test_equal_maps_take_the_first_place():
    deep = torch.zeros(1, 2, 1, 2)
    deep[0, 0, 0, 0], deep[0, 1, 0, 1] = 1, 1
    shallow = torch.tensor([[[[1.0, 1.0]]]])
    # from place 0: deep similarity to place 1 is 0, shallow is 1
    found = SDFALoss(1, threshold=0.25)(torch.zeros(1, 1, 1, 2), shallow, deep, torch.tensor([0]))
    assert float(found) == pytest.approx((0 + 0.75) / 2)


@pytest.mark.unchecked  # bytes are no Int to the checker
def test_targets_may_be_bytes():
    g = torch.Generator().manual_seed(0)
    inputs = (
        torch.rand(1, 270, 2, 2, generator=g),
        torch.rand(1, 2, 4, 4, generator=g),
        torch.rand(1, 3, 2, 2, generator=g),
    )
    expected = SDFALoss(10, threshold=0)(*inputs, torch.tensor([26]))  # 26 x 10 is no byte
    assert torch.equal(SDFALoss(10, threshold=0)(*inputs, torch.tensor([26], dtype=torch.uint8)), expected)


def test_head_is_a_plain_sum_at_first_and_never_lets_other_classes_speak():
    head = ScoreAggregation(3, 2)
    a = torch.rand(4, 6)
    torch.testing.assert_close(head(a), a.reshape(4, 3, 2).sum(2))
    nn.init.normal_(head.weight)
    torch.testing.assert_close(head.shares().sum(1), torch.full((3,), 2.0))
    changed = a.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(head(changed)[:, :2], head(a)[:, :2])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("maps", "shallow", "deep", "targets", "message"),
    [
        ((2, 5, 2, 2), (2, 1, 4, 4), (2, 3, 2, 2), [0, 1], "found 5 prototypes, needed a multiple of 2"),
        ((2, 4, 2, 2), (2, 1, 5, 4), (2, 3, 2, 2), [0, 1], "s whole"),
        ((2, 4, 2, 2), (2, 1, 4, 8), (2, 3, 2, 2), [0, 1], "s whole"),
        ((2, 4, 2, 2), (2, 1, 4, 4), (2, 3, 2, 2), [0, 2], "targets: found 2, needed classes 0 to 1"),
        ((2, 4, 2, 2), (2, 1, 4, 4), (2, 3, 2, 2), [0, -1], "targets: found -1"),
        ((2, 4, 2, 2), (2, 1, 6, 6), (2, 3, 3, 3), [0, 1], "maps of the deep ones' size"),
        ((2, 4, 3, 3), (2, 1, 4, 4), (2, 3, 2, 2), [0, 1], "maps of the deep ones' size"),
        ((2, 4, 2, 2), (1, 1, 4, 4), (2, 3, 2, 2), [0, 1], "needed N images each"),
        ((2, 4, 2, 2), (3, 1, 4, 4), (3, 3, 2, 2), [0, 1], "needed N images each"),
        ((2, 4), (2, 1, 4, 4), (2, 3, 2, 2), [0, 1], r"found \(2, 4\), .* needed four axes each"),
        ((2, 4, 2, 2), (2, 1, 4, 4), (3, 2, 2), [0, 1], r"found .*, \(3, 2, 2\), needed four axes each"),
    ],
)
def test_bad_input_of_the_alignment_is_refused(maps, shallow, deep, targets, message):
    with pytest.raises(ValueError, match=message):
        SDFALoss(2)(torch.rand(maps), torch.rand(shallow), torch.rand(deep), torch.tensor(targets))


@pytest.mark.bad_input
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"threshold: found -0\.1"):
        SDFALoss(2, threshold=-0.1)
    with pytest.raises(ValueError, match="prototypes_per_class: found 0"):
        SDFALoss(0)
    with pytest.raises(ValueError, match=r"needed \[N, 6\]"):
        ScoreAggregation(3, 2)(torch.rand(4, 5))
    with pytest.raises(ValueError, match="num_classes: found 0"):
        ScoreAggregation(0, 2)
    with pytest.raises(ValueError, match="deep_channels"):
        EvalProtoPNet(nn.Identity(), 0, 3)
    with pytest.raises(ValueError, match="num_classes: found 1"):
        EvalProtoPNetModule("conv3", 1)


# -- training


def module(**changed):
    torch.manual_seed(0)
    settings = {"image_size": 16, "in_channels": 1, "prototypes_per_class": 2, "prototype_channels": 8}
    return EvalProtoPNetModule("conv3", **settings | {"class_names": list("0123456789")} | changed)


def test_stages_rates_and_weights_are_the_authors():
    net = module()
    warmup, joint = net.stages
    assert (warmup.max_epochs, joint.max_epochs, joint.milestones, joint.gamma) == (5, 7, (3, 6), 0.2)
    assert (warmup.project, joint.project, joint.overwrite) == (False, True, False)
    assert net.weights == {"cluster": 0.8, "separation": 0.08, "orthogonality": 1e-4, "alignment": 0.5}

    def groups(stage):
        enter_stage(net, stage)
        found = net.configure_optimizers().param_groups
        return [(round(g["lr"], 9), round(g["lr"] / g["lr_scale"], 9), g["weight_decay"]) for g in found]

    assert groups(warmup) == [(3e-3, 3e-3, 1e-3), (3e-3, 3e-3, 0), (1e-6, 3e-3, 0)]
    assert groups(joint) == [(1e-4, 3e-3, 1e-3), (3e-3, 3e-3, 1e-3), (3e-3, 3e-3, 0), (1e-6, 3e-3, 0)]
    enter_stage(net, warmup)
    net.train()
    assert net.network.backbone.training


def test_alignment_waits_for_the_joint_stage():
    net = module()
    g = torch.Generator().manual_seed(0)
    every = torch.arange(10)
    batch = ImageBatch(torch.rand(10, 1, 16, 16, generator=g), every, every, every >= 0)
    terms = net.loss_terms(net(batch.image), batch.target)
    plain = terms["class"] + 0.8 * terms["cluster"] + 0.08 * terms["separation"] + 1e-4 * terms["orthogonality"]
    net.stage = net.stages[0]
    near(net.training_step(batch, 0), plain.detach(), rtol=1e-5)
    net.stage = net.stages[1]
    near(net.training_step(batch, 0), (plain + 0.5 * terms["alignment"]).detach(), rtol=1e-5)
    assert float(terms["alignment"].detach()) > 0
    net.on_train_batch_end(None, batch, 0)
    near(net.network.prototypes.prototypes.flatten(1).norm(dim=1), np.ones(20), rtol=1e-5)


def test_every_term_keeps_the_precision_of_the_network():
    net, every = module().double(), torch.arange(10)
    out = net(torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double())
    terms = net.loss_terms(out, every)
    assert {value.dtype for value in terms.values()} == {torch.float64}
    near(terms["class"], F.cross_entropy(out.logits, every).detach(), rtol=1e-12)


def test_training_notes_the_best_images_and_keeps_the_vectors(tmp_path):
    data = Digits(image_size=16, batch_size=64)
    schedule = EvalSchedule(1, 2, backbone_lr=3e-3, aggregation_lr=3e-3, milestones=())
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
    assert [item["stage"] for item in trainer.callbacks[0].history] == ["warmup", "joint", "joint"]
    again = EvalProtoPNetModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    layer = again.network.prototypes
    near(layer.prototypes.flatten(1).norm(dim=1), np.ones(20), rtol=1e-5)
    train = data.rows("train")
    with torch.no_grad():
        maps = again(torch.stack([data.model_input(data.record_ids[i]) for i in train])).maps.flatten(2)
    for p in range(20):
        own = data.table.targets[train] == p // 2
        best = maps[own, p].max()
        case = int(np.flatnonzero(train == int(layer.case_index[p]))[0])
        near(maps[case, p, layer.case_position[p]], best, rtol=1e-5)
    image = data.record_ids[int(data.rows("test")[0])]
    found = again.explain(data.model_input(image)[None], [image])[0][0]
    assert abs(found.total - found.logit) < 1e-4
    assert all(e.weight == 0 for e in found.evidence if e.classes != (found.label,))
    before = copy.deepcopy(again.state_dict())
    again.similarity_maps(data.model_input(image)[None])
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items() if isinstance(v, torch.Tensor))
