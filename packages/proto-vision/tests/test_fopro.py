"""FoPro: the authors' values of a whole step and of prototypes, the card's edge cases, its stages."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, FoPro, FoProModule
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.noise import SymmetricNoise, TrustedShots
from proto_vision.fopro import (
    BilinearPool,
    FoProSchedule,
    RelationModule,
    initial_prototypes,
    polish_prototypes,
    prototype_density,
)

CASES = ("warmup", "prototypes", "confidence", "relation", "fusion")
CLEANINGS = ("none", "confidence", "relation", "fusion")
LOSSES = ("cls", "proto", "inst", "low_dim", "reconstruction", "relation")


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "fopro.npz")


def arrays_of(golden, prefix):
    keys = [key for key in golden.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(np.asarray(golden[key])) for key in keys}


def near(found, expected, rtol=1e-7, atol=1e-9):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), np.asarray(expected), rtol=rtol, atol=atol)


def encoder_of(a):
    layer = nn.Linear(*a["encoder_weight"].shape[::-1])
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh()).double()


WEIGHTS = {
    "encoder_weight": "encoder.1.weight",
    "encoder_bias": "encoder.1.bias",
    "projector_weight": "projector.0.weight",
    "projector_bias": "projector.0.bias",
    "reconstructor_weight": "reconstructor.0.weight",
    "reconstructor_bias": "reconstructor.0.bias",
    "relation_fc1": "relation.fc1.weight",
    "relation_fc2": "relation.fc2.weight",
    "classifier_weight": "classifier.weight",
    "low_dim_classifier_weight": "low_dim_classifier.weight",
}
STATE = {"momentum_encoder_weight": "momentum_encoder.1.weight", "momentum_encoder_bias": "momentum_encoder.1.bias"}
BUFFERS = ("prototypes", "density", "queue", "queue_ptr")


def network_of(a):
    features, low = a["encoder_weight"].shape[0], a["prototypes"].shape[1]
    names = ("temperature", "encoder_momentum", "prototype_momentum", "margin", "alpha", "threshold")
    options = {name: float(a[name]) for name in (*names, "distance_threshold")}
    net = FoPro(
        encoder_of(a),
        features,
        int(a["num_classes"]),
        low_dim=low,
        projection_hidden=None,
        relation_hidden=a["relation_fc1"].shape[0],
        queue_size=a["queue"].shape[1],
        use_density=bool(a["use_density"]),
        soft_labels=bool(a["soft_labels"]),
        **options,
    ).double()
    state = net.state_dict()
    for name, key in (WEIGHTS | STATE | {name: name for name in BUFFERS}).items():
        assert state[key].shape == a[name].shape
        state[key] = a[name]
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_authors_code(golden, case):
    a = arrays_of(golden, f"{case}/")
    net, fewshot = network_of(a), a["fewshot"].bool()
    given_labels = a["labels"].clone()
    step = net.compute_losses(
        a["images"],
        a["augmented"],
        a["labels"],
        fewshot,
        use_prototypes=bool(a["use_prototypes"]),
        cleaning=CLEANINGS[int(a["cleaning"])],
        train_relation=bool(a["train_relation"]),
        pretrain_relation=bool(a["pretrain_relation"]),
        update_momentum=bool(a["update_momentum"]),
    )
    assert torch.equal(a["labels"], given_labels)
    assert tuple(step.losses) == LOSSES
    for name in LOSSES:
        near(step.losses[name], a[f"loss_{name}"])
    near(step.total, a["total"])
    step.total.backward()
    parameters = dict(net.named_parameters())
    for name, key in WEIGHTS.items():
        found = parameters[key].grad
        near(torch.zeros_like(parameters[key]) if found is None else found, a[f"grad_{name}"])
    near(step.labels, a["labels_after"])
    near(step.labels[step.clean], a["used_labels"])
    near(step.soft_targets[step.clean], a["used_soft_targets"])
    near(step.gt_score[step.clean], a["used_gt_score"])
    assert int(step.low_dim_rows.sum()) == int(a["num_arcface"])
    assert int(step.relation_rows.sum()) == int(a["num_relation"])
    for name in ("prototypes", "visited", "distance", "queue", "queue_ptr"):
        near(getattr(net, name), a[f"{name}_after"])
    near(net.state_dict()["momentum_encoder.1.weight"], a["momentum_encoder_weight_after"])
    assert all(p.grad is None for p in net.momentum_encoder.parameters())


def test_prototypes_and_densities_equal_the_authors_code(golden):
    a = arrays_of(golden, "init/")
    found = initial_prototypes(a["embeddings"], a["labels"], int(a["num_classes"]))
    near(found, a["prototypes"])
    near(prototype_density(a["distance"], a["visited"]), a["density"])


# -- prototypes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_polishing_at_once_is_polishing_row_by_row(seed, n, classes, momentum):
    g = torch.Generator().manual_seed(seed)
    keys = F.normalize(torch.randn(n, 3, generator=g).double(), dim=1)
    before = F.normalize(torch.randn(classes, 3, generator=g).double(), dim=1)
    labels, mask = torch.randint(classes, (n,), generator=g), torch.rand(n, generator=g) < 0.7
    expected, visited, distance = before.clone(), torch.zeros(classes), torch.zeros(classes).double()
    for key, label, takes in zip(keys, labels, mask):
        if takes:
            expected[label] = momentum * expected[label] + (1 - momentum) * key
            visited[label] += 1
            distance[label] += (key - before[label]).norm()
    kept = before.clone()
    found = polish_prototypes(before, keys, labels, mask, momentum)
    for one, other in zip(found, (F.normalize(expected, dim=1), visited, distance)):
        near(one, other, rtol=1e-9)
    assert torch.equal(before, kept)


def test_a_class_without_a_visit_keeps_its_density_and_none_is_zero():
    distance, visited = torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0.0, 3.0, 10.0])
    found = prototype_density(distance, visited, previous=torch.tensor([0.25, 0.3, 0.4]))
    near(found, [0.25, 1e-3, 5 / (10 * np.log(20))], rtol=1e-5)
    near(prototype_density(distance, visited)[0], 1e-3, rtol=1e-5)


def small(**changed):
    torch.manual_seed(0)
    options = {
        "low_dim": 4,
        "projection_hidden": 6,
        "queue_size": 8,
        "encoder_momentum": 0.9,
        "prototype_momentum": 0.9,
    }
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh())
    return FoPro(encoder, 5, 3, **options | changed)


def batch_of(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    images, augmented = torch.rand(2, n, 3, 2, 2, generator=g)
    return images, augmented, torch.arange(n) % 3, torch.arange(n) < n // 3


def test_prototypes_begin_with_the_keys_of_trusted_images():
    net = small()
    images, _, labels, _ = batch_of()
    trusted = torch.tensor([True, True, True, False, False, True])
    with torch.no_grad():
        net.momentum_encoder[1].weight.mul_(2)
        expected = initial_prototypes(net.embed(net.momentum_encoder(images))[trusted], labels[trusted], 3)
    net.visited.fill_(3)
    net.train()
    net.initialise_prototypes([(images[:4], labels[:4], trusted[:4]), (images[4:], labels[4:], trusted[4:])])
    near(net.prototypes, expected, rtol=1e-5)
    assert net.training
    assert not net.visited.any()
    again = small()
    again.momentum_encoder.load_state_dict(net.momentum_encoder.state_dict())
    again.initialise_prototypes([ImageBatch(images, labels, labels, trusted)])
    near(again.prototypes, expected, rtol=1e-5)


def test_missing_shots_are_refused_unless_they_may_be_missing():
    net, (images, _, labels, _) = small(), batch_of()
    with pytest.raises(ValueError, match="no trusted image of 1 classes, such as \\[2\\]"):
        net.initialise_prototypes([(images[:2], labels[:2])])
    with pytest.raises(ValueError, match="batches: found none"):
        net.initialise_prototypes([])
    net.initialise_prototypes([(images[:2], labels[:2])], allow_missing=True)
    assert not net.prototypes[2].any()
    step = net.compute_losses(*batch_of(), use_prototypes=True, cleaning="fusion", train_relation=True)
    assert bool(step.total.isfinite())


# -- a step


def test_trusted_rows_are_never_relabelled_and_always_clean():
    for cleaning in CLEANINGS[1:]:
        net = small(threshold=0.0)
        images, augmented, labels, fewshot = batch_of(30)
        net.initialise_prototypes([(images, labels)])
        step = net.compute_losses(images, augmented, labels, fewshot, use_prototypes=True, cleaning=cleaning)
        assert torch.equal(step.labels[fewshot], labels[fewshot])
        assert step.clean[fewshot].all()
        near(step.soft_targets[fewshot], F.one_hot(labels[fewshot], 3).float())


def test_a_threshold_is_met_only_from_above():
    net = small(threshold=1.0)
    images, augmented, labels, fewshot = batch_of()
    net.initialise_prototypes([(images, labels)])
    none = torch.zeros_like(fewshot)
    step = net.compute_losses(images, augmented, labels, none, use_prototypes=True, cleaning="relation")
    assert not step.clean.any()
    for name in ("cls", "proto", "low_dim", "relation"):
        assert float(step.losses[name].detach()) == 0
    step.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    near(net.prototypes.norm(dim=1), np.ones(3), rtol=1e-5)


def test_no_image_gives_no_nan():
    net, (images, augmented, labels, fewshot) = small(), batch_of()
    net.initialise_prototypes([(images, labels)])
    nothing = (part[:0] for part in (images, augmented, labels, fewshot))
    step = net.compute_losses(*nothing, use_prototypes=True, cleaning="fusion", train_relation=True)
    assert float(step.total.detach()) == 0


def test_the_queue_wraps_around_and_keeps_the_last_keys():
    net = small(queue_size=8)
    images, augmented, labels, fewshot = batch_of(6)
    before = net.queue.clone()
    net.compute_losses(images, augmented, labels, fewshot, use_prototypes=False)
    key = net.embed(net.momentum_encoder(augmented)).detach()
    near(net.queue[:, :6].T, key, rtol=1e-5)
    near(net.queue[:, 6:], before[:, 6:])
    net.compute_losses(images, augmented, labels, fewshot, use_prototypes=False, update_momentum=False)
    near(net.queue[:, [6, 7, 0, 1, 2, 3]].T, key, rtol=1e-5)
    assert net.queue_ptr.tolist() == [4]
    tiny = small(queue_size=4)
    tiny.compute_losses(images, augmented, labels, fewshot, use_prototypes=False)
    key = tiny.embed(tiny.momentum_encoder(augmented)).detach()
    assert tiny.queue_ptr.tolist() == [2]
    near(tiny.queue[:, [2, 3, 0, 1]].T, key[2:], rtol=1e-5)


def test_the_slow_copy_follows_by_its_parameters_alone():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    net = FoPro(encoder, 5, 3, low_dim=4, projection_hidden=None, queue_size=8, encoder_momentum=0.9)
    with torch.no_grad():
        net.encoder[1].weight.add_(1)
    net.encoder[2].running_mean.fill_(7)
    slow = net.momentum_encoder[1].weight.clone()
    net.eval()
    net.compute_losses(*batch_of(), use_prototypes=False)
    near(net.momentum_encoder[1].weight, slow + 0.1, rtol=1e-5)
    assert not net.momentum_encoder[2].running_mean.any()


def test_margin_zero_switches_margins_off():
    images, augmented, labels, fewshot = batch_of()
    losses = []
    for margin, trusted in ((0.0, fewshot), (0.5, torch.zeros_like(fewshot))):
        net = small(margin=margin)
        net.initialise_prototypes([(images, labels)])
        losses.append(net.compute_losses(images, augmented, labels, trusted, use_prototypes=True).losses["proto"])
    near(losses[0], losses[1].detach(), rtol=1e-6)


def test_half_precision_is_divided_in_full():
    net, (images, augmented, labels, fewshot) = small(), batch_of()
    net.initialise_prototypes([(images, labels)])
    with torch.autocast("cpu", torch.bfloat16):
        step = net.compute_losses(
            images, augmented, labels, fewshot, use_prototypes=True, cleaning="fusion", train_relation=True
        )
    assert {value.dtype for value in step.losses.values()} == {torch.float32}
    assert bool(step.total.isfinite())


def test_prototypes_and_visits_are_polished_in_full():
    torch.manual_seed(0)
    before, keys = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(40, 8), dim=1)
    labels, mask = torch.arange(40) % 3, torch.arange(40) % 4 > 0
    expected = polish_prototypes(before, keys, labels, mask, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = polish_prototypes(before, keys, labels, mask, 0.5)
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        near(one, other, rtol=1e-6)


def test_distances_to_a_class_are_told_apart_in_full():
    net, (images, _, labels, fewshot) = small(), batch_of()
    net.initialise_prototypes([(images, labels)])
    with torch.no_grad():
        cosine = net.embed(net.encoder(images)) @ net.prototypes.T
        distance = (0.5 * (net.prototypes @ net.prototypes.T)[labels] - 0.5 * cosine).abs().sum(1)
    net.distance_threshold = float(distance.sort().values[2:4].mean())
    with torch.autocast("cpu", torch.bfloat16):
        found = net._low_dim_rows(labels, fewshot & False, distance, cosine, fewshot, True, "none")
    assert torch.equal(found, distance <= net.distance_threshold)


def test_margins_are_not_rounded_in_double_precision():
    net, (images, augmented, labels, _) = small(margin=0.3, use_density=False).double(), batch_of()
    images, augmented, trusted = images.double(), augmented.double(), torch.ones(6, dtype=torch.bool)
    net.initialise_prototypes([(images, labels)])
    with torch.no_grad():
        z, other = (net.embed(net.encoder(part)) for part in (images, augmented))
        off = torch.full((6, 3), 0.0).double()
        off[torch.arange(6), labels] = 0.3
        proto = F.cross_entropy((z @ net.prototypes.T - off) / 0.1, labels)
        low = [F.cross_entropy((net.low_dim_classifier(part) - off) / 0.1, labels) for part in (z, other)]
    step = net.compute_losses(images, augmented, labels, trusted, use_prototypes=True)
    near(step.losses["proto"], proto, rtol=1e-12)
    near(step.losses["low_dim"], (low[0] + low[1]) / 2, rtol=1e-12)


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32])
def test_labels_of_any_signed_integer_type_are_the_same(kind):
    steps = []
    for labels in (torch.arange(6) % 3, (torch.arange(6) % 3).to(kind)):
        net, (images, augmented, _, fewshot) = small(), batch_of()
        net.initialise_prototypes([(images, labels)])
        step = net.compute_losses(
            images, augmented, labels, fewshot, use_prototypes=True, cleaning="fusion", train_relation=True
        )
        assert step.labels.dtype == torch.int64
        steps.append((step.total.detach(), net.prototypes))
    for one, other in zip(*steps):
        near(one, other)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_relation_scores_of_other_precisions(kind):
    module = RelationModule(3, 5)
    z, c = torch.randn(4, 3).to(kind), torch.randn(2, 3).to(kind)
    near(module(z, c), module(z.float(), c.float()).detach(), rtol=1e-4, atol=1e-5)
    near(module.to(kind)(z, c), module(z.float(), c.float()).detach(), rtol=1e-4, atol=1e-5)


def test_relation_scores_are_those_of_pairs_side_by_side():
    module = RelationModule(3, 5)
    z, c = torch.randn(4, 3), torch.randn(2, 3)
    pairs = torch.cat([z[:, None].expand(4, 2, 3), c[None].expand(4, 2, 3)], 2)
    near(module(z, c), module.fc2(module.fc1(pairs).relu()).squeeze(2).detach(), rtol=1e-5, atol=1e-6)
    assert module.fc1.bias is None
    assert module.fc2.bias is None


def test_bilinear_pooling_is_its_definition():
    maps = torch.rand(2, 3, 4, 5)
    pairs = torch.einsum("nbhw,nchw->nbc", maps, maps) / 20
    near(BilinearPool()(maps), F.normalize((pairs + 1e-5).sqrt().flatten(1), dim=1), rtol=1e-5, atol=1e-7)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    net, (images, augmented, labels, fewshot) = small(), batch_of()
    with pytest.raises(ValueError, match="cleaning: found 'often'"):
        net.compute_losses(images, augmented, labels, fewshot, use_prototypes=True, cleaning="often")
    with pytest.raises(ValueError, match="without prototypes"):
        net.compute_losses(images, augmented, labels, fewshot, use_prototypes=False, cleaning="fusion")
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"targets: found {wrong}, needed classes 0 to 2"):
            net.compute_losses(images, augmented, labels.clone().fill_(wrong), fewshot, use_prototypes=False)
        with pytest.raises(ValueError, match=f"targets: found {wrong}, needed classes 0 to 2"):
            net.initialise_prototypes([(images, torch.full_like(labels, wrong))])
    with pytest.raises(ValueError, match=r"fewshot: found shape \(2,\)"):
        net.compute_losses(images, augmented, labels, fewshot[:2], use_prototypes=False)
    with pytest.raises(ValueError, match="queue_size: found 0"):
        small(queue_size=0)
    with pytest.raises(ValueError, match=r"alpha: found 1\.5"):
        small(alpha=1.5)
    with pytest.raises(ValueError, match="targets: found 5"):
        initial_prototypes(torch.rand(1, 2), torch.tensor([5]), 3)
    with pytest.raises(ValueError, match="targets: found 5"):
        polish_prototypes(torch.rand(3, 2), torch.rand(1, 2), torch.tensor([5]), torch.tensor([True]), 0.9)
    with pytest.raises(ValueError, match="pooling: found 'max'"):
        module(pooling="max")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frozen_epochs": 30}, "needed each within the next"),
        ({"epochs": 10}, "needed each within the next"),
        ({"init_epoch": 27}, "init_epoch: found 27"),
        ({"optimizer": "lion"}, "optimizer: found 'lion'"),
        ({"warmup_epochs": -1}, "warmup_epochs: found -1"),
    ],
)
def test_bad_schedules_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        FoProSchedule(**changed)


# -- training


SHORT = {"frozen_epochs": 1, "pretrain_epochs": 3, "init_epoch": 1, "relation_epochs": 1, "epochs": 4, "lr": 1e-3}


def module(**changed):
    torch.manual_seed(0)
    options = {"image_size": 8, "in_channels": 1, "low_dim": 8, "projection_hidden": 16, "queue_size": 64}
    options |= {"schedule": FoProSchedule(**SHORT, late_momentum=0.1, late_epoch=3)}
    options |= {"backbone": "mlp", "class_names": list("0123456789")}
    return FoProModule(**options | changed)


def data_of(**changed):
    options = {"views": ["none"], "protocol": TrustedShots(2, SymmetricNoise(0.4))}
    return Digits(image_size=8, **{"batch_size": 128} | options | changed)


def trainer_of(folder, *callbacks, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        limit_val_batches=0,
        **options,
    )


class Watch(pl.Callback):
    """What each epoch's steps are made with."""

    def __init__(self, net):
        self.calls, self.rates, self.decays = [], [], []
        compute = net.network.compute_losses

        def watched(*args, **options):
            self.calls.append({"stage": net.stage.name, **options})
            return compute(*args, **options)

        net.network.compute_losses = watched

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (group,) = trainer.optimizers[0].param_groups
        self.decays.append(group["betas"][0])

    def on_train_batch_end(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_stages_follow_the_papers_plan(tmp_path):
    net, data = module(), data_of()
    watch = Watch(net)
    slow = copy.deepcopy(net.network.momentum_encoder.state_dict())
    encoder = copy.deepcopy(net.network.encoder.state_dict())
    trainer = trainer_of(tmp_path, Curriculum(), watch, limit_train_batches=2)
    trainer.fit(net, datamodule=data)
    asked = ("stage", "use_prototypes", "cleaning", "train_relation", "pretrain_relation")
    plan = [tuple(call[name] for name in asked) for call in watch.calls[::2]]
    assert plan == [
        ("frozen", False, "none", False, False),
        ("pretrain", False, "none", False, False),
        ("pretrain", True, "none", False, False),
        ("relation", True, "confidence", True, True),
        ("clean", True, "fusion", True, False),
    ]
    assert [c["update_momentum"] for c in watch.calls[::2]] == [True, True, True, False, True]
    assert watch.decays[::2] == [0.9, 0.9, 0.9, 0.9, 0.1]
    schedule = net.schedule
    ends = (0.5, 1, 1.5, 2, 2.5, 3), (3.5, 4)
    expected = [*map(schedule.rate, ends[0]), 1e-4, 1e-4, *map(schedule.rate, ends[1])]
    near(torch.tensor(watch.rates), expected, rtol=1e-6)
    first = torch.load(tmp_path / "checkpoints" / "frozen.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[f"network.encoder.{name}"], value) for name, value in encoder.items())
    kept = net.network.state_dict()
    assert not all(torch.equal(kept[f"momentum_encoder.{name}"], value) for name, value in slow.items())
    before, after = (
        torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("pretrain", "relation")
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {
        *(f"network.{name}" for name in ("relation.fc1.weight", "relation.fc2.weight", "prototypes", "visited")),
        *(f"network.{name}" for name in ("distance", "queue")),  # 256 keys go four times round 64 places
    }
    again = FoProModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    images = torch.rand(3, 1, 8, 8)
    near(again(images).logits, net.eval()(images).logits.detach(), rtol=1e-6)
    assert again.settings() == net.settings()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(precision, tmp_path):
    net, data = module(), data_of(batch_size=241)  # 724 images, one is left for the last batch
    trainer_of(tmp_path, Curriculum(), precision=precision).fit(net, datamodule=data)
    assert bool(net.initialised)
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_the_plan_goes_on_where_an_earlier_epoch_was_kept():
    net = module(schedule=FoProSchedule(**SHORT))
    net.initialised.fill_(True)
    net.begun.fill_(2)  # the second of three epochs of pretraining was the best
    enter_stage(net, net.stages[-1])
    net.trainer = pl.Trainer(accelerator="cpu", logger=False)
    net.on_train_epoch_start()
    assert (net.epoch, int(net.begun)) == (3, 4)
    net.on_train_epoch_start()
    assert (net.epoch, int(net.begun)) == (4, 5)


def test_labels_are_judged_by_soft_targets():
    net = module().eval()
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    with pytest.raises(ValueError, match="prototypes are not made yet"):
        net.judge_labels(images, labels)
    net.network.prototypes.copy_(F.normalize(torch.randn(10, 8), dim=1))
    net.initialised.fill_(True)
    soft = net.network.soft_targets(images)
    with torch.no_grad():
        z = net.network.embed(net.network.encoder(images))
        expected = 0.5 * net(images).logits.softmax(1) + 0.5 * (z @ net.network.prototypes.T / 0.1).softmax(1)
    near(soft, expected, rtol=1e-5)
    suspicion, suggested = net.judge_labels(images, labels)
    near(suspicion, 1 - expected[torch.arange(6), labels], rtol=1e-4)
    assert torch.equal(suggested, expected.argmax(1))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": None}, "found 724 trusted images of 724"),
        ({"protocol": TrustedShots(500)}, "found 724 trusted images of 724"),
        ({"views": []}, r"data\.views: found \[\]"),
    ],
)
def test_data_without_trust_or_views_is_refused(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, Curriculum(), limit_train_batches=1).fit(module(), datamodule=data_of(**changed))


def test_the_papers_encoder_pools_pairs_of_channels():
    net = module(backbone="conv2", pooling="bilinear", projection_hidden=None)  # type: ignore[call-arg]
    assert net.network.classifier.in_features == 64**2
    enter_stage(net, net.stages[0])
    trained = {name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"projector", "reconstructor", "classifier", "low_dim_classifier"}
    assert FoProModule.from_settings(net.settings()).settings() == net.settings()
