"""CPC: DivideMix's values, the cleaner's reference values, the card's edge cases, how networks teach each other."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from proto_core.training import Curriculum
from proto_vision import CPCModule, Digits
from proto_vision.cpc import (
    ClassPrototypeCleaner,
    CPCSchedule,
    SemiLoss,
    gmm_clean_probability,
    guess_labels,
    mix_up,
    negative_entropy,
    refine_labels,
    uniform_prior_penalty,
)
from proto_vision.cpc.system import _Division
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.noise import SymmetricNoise


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "cpc.npz")


def arrays_of(golden, prefix):
    keys = [key for key in golden.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(np.asarray(golden[key])) for key in keys}


def near(found, expected, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), np.asarray(expected), rtol=rtol, atol=atol)


# -- golden values


def test_mixtures_equal_dividemix(golden):
    a = arrays_of(golden, "gmm/")
    near(gmm_clean_probability(a["losses"]), a["probability"], atol=1e-3)
    found = gmm_clean_probability(a["losses"], labels=a["labels"], num_classes=int(a["num_classes"]))
    near(found, a["probability_per_class"], atol=1e-3)
    near(gmm_clean_probability(a["losses"], labels=a["labels"]), found)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("case", ["mix_a/", "mix_b/"])
def test_labels_and_losses_equal_dividemix(golden, case):
    a = arrays_of(golden, case)
    temperature = float(a["temperature"])
    near(guess_labels(a["guess_logits"], temperature=temperature), a["guessed"])
    refined = refine_labels(a["labels"], a["clean_probability"], a["refine_logits"], temperature=temperature)
    near(refined, a["refined"])
    x, u = a["logits_x"].requires_grad_(), a["logits_u"].requires_grad_()
    semi = SemiLoss(float(a["lambda_u"]))
    loss_x, loss_u, weight = semi(x, a["targets_x"], u, a["targets_u"], float(a["epoch"]), float(a["warm_up"]))
    penalty = uniform_prior_penalty(torch.cat([x, u]))
    total = loss_x + weight * loss_u + penalty
    for found, name in ((loss_x, "loss_x"), (loss_u, "loss_u"), (weight, "weight"), (penalty, "prior_penalty")):
        near(found, a[name])
    near(total, a["total"])
    for found, name in zip(torch.autograd.grad(total, [x, u]), ("grad_x", "grad_u")):
        near(found, a[name])
    entropy = negative_entropy(x)
    near(entropy, a["negative_entropy"])
    near(torch.autograd.grad(entropy, x)[0], a["negative_entropy_grad"])


@pytest.mark.parametrize("case", ["cleaner_a/", "cleaner_b/"])
def test_cleaner_equals_its_reference(golden, case):
    a = arrays_of(golden, case)
    classes, dim = a["prototypes"].shape
    cleaner = ClassPrototypeCleaner(
        dim, classes, temperature=float(a["temperature"]), balanced=bool(a["balanced"])
    ).double()
    cleaner.load_state_dict({"prototypes": a["prototypes"], "bias": a["bias"]})
    features = a["features"].requires_grad_()
    near(cleaner(features, a["labels"]), a["logits"])
    loss = cleaner.loss(features, a["labels"], a["targets"])
    near(loss, a["loss"])
    loss.backward()
    near(features.grad, a["grad_features"])
    near(cleaner.prototypes.grad, a["grad_prototypes"])
    near(cleaner.bias.grad, a["grad_bias"])


# -- the mixture


def test_losses_that_cannot_be_told_apart_count_as_clean():
    for losses in (torch.zeros(0), torch.ones(1), torch.full((7,), 0.3)):
        with pytest.warns(UserWarning, match="cannot be told apart"):
            found = gmm_clean_probability(losses)
        assert found.tolist() == [1.0] * len(losses)


def test_small_classes_ask_the_mixture_of_all():
    g = torch.Generator().manual_seed(0)
    losses = torch.cat(
        [torch.rand(30, generator=g) * 0.1, 1 + torch.rand(30, generator=g) * 0.1, torch.tensor([0.05, 1.05])]
    )
    labels = torch.cat([torch.arange(60) % 2, torch.tensor([2, 2])])
    found = gmm_clean_probability(losses, labels=labels, num_classes=4)
    near(found[60:], gmm_clean_probability(losses)[60:])
    near(found[:60][labels[:60] == 0], gmm_clean_probability(losses[labels == 0]))
    alone = gmm_clean_probability(losses, labels=labels, min_samples=2)
    near(alone[60:], gmm_clean_probability(losses[60:]))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50), st.floats(-10, 10))
def test_the_mixture_sees_neither_scale_nor_order(seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    losses = torch.cat([torch.rand(40, generator=g), 2 + torch.rand(30, generator=g)]).double()
    found = gmm_clean_probability(losses)
    assert bool(((found >= 0) & (found <= 1)).all())
    near(gmm_clean_probability(scale * losses + shift), found, rtol=1e-5, atol=1e-6)
    assert torch.equal(found > 0.5, losses < 1.5)


@pytest.mark.bad_input
def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match="losses: found nan"):
        gmm_clean_probability(torch.tensor([0.1, math.nan]))
    with pytest.raises(ValueError, match=r"losses: found shape \(1, 2\)"):
        gmm_clean_probability(torch.rand(1, 2))
    with pytest.raises(ValueError, match=r"needed .* with classes 0 to 1"):
        gmm_clean_probability(torch.rand(3), labels=torch.tensor([0, 1, 2]), num_classes=2)
    with pytest.raises(ValueError, match=r"labels: found shape \(2,\)"):
        gmm_clean_probability(torch.rand(3), labels=torch.tensor([0, 1]))


# -- labels and losses


def test_full_trust_keeps_the_label_and_none_has_a_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.tensor([1, 0, 3])
    near(refine_labels(labels, torch.ones(3), logits), F.one_hot(labels, 4))
    near(refine_labels(labels, torch.zeros(3), logits), guess_labels(logits))
    assert not guess_labels(logits).requires_grad
    sure = torch.tensor([[[200.0, 0.0, -200.0]]])
    near(guess_labels(sure, temperature=0.01), [[1.0, 0.0, 0.0]])


def test_the_weight_rises_and_stays():
    semi, x = SemiLoss(25.0, 16), torch.zeros(1, 2)
    weights = [semi(x, x, x, x, epoch, 10)[2] for epoch in (0, 10, 18.0, 26, 99)]
    assert weights == [0, 0, 12.5, 25, 25]
    assert SemiLoss(0.0)(x, x, x, x, 50, 10)[2] == 0


def test_empty_sets_and_certain_networks_stay_finite():
    empty = torch.zeros(0, 3, requires_grad=True)
    loss_x, loss_u, _ = SemiLoss()(empty, empty.detach(), empty, empty.detach(), 20, 10)
    (loss_x + loss_u + uniform_prior_penalty(empty) + negative_entropy(empty)).backward()
    assert float(loss_x.detach()) == float(loss_u.detach()) == 0
    sure = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    for loss in (uniform_prior_penalty(sure), negative_entropy(sure)):
        assert bool(loss.isfinite())
        assert bool(torch.autograd.grad(loss, sure)[0].isfinite().all())
    near(negative_entropy(sure), 0, atol=1e-6)


def test_half_precision_is_computed_in_full():
    x = torch.randn(4, 3)
    targets = torch.randn(4, 3).softmax(1)
    whole, half = (SemiLoss()(v, targets, v, targets, 20, 10)[:2] for v in (x.bfloat16().float(), x.bfloat16()))
    for one, other in zip(whole, half):
        assert other.dtype == torch.float32
        near(other, one)
    cleaner, labels = ClassPrototypeCleaner(3, 3), torch.arange(4) % 3
    near(cleaner(x.bfloat16(), labels), cleaner(x.bfloat16().float(), labels).detach())
    assert cleaner.loss(x.bfloat16(), labels, torch.rand(4)).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32])
def test_labels_of_any_signed_integer_type_are_the_same(kind):
    cleaner, features, labels, trust = (
        ClassPrototypeCleaner(3, 4),
        torch.randn(4, 3),
        torch.tensor([0, 1, 3, 1]),
        torch.rand(4),
    )
    logits, few = torch.randn(2, 4, 4), labels.to(kind)
    near(cleaner(features, few), cleaner(features, labels).detach())
    near(cleaner.loss(features, few, trust), cleaner.loss(features, labels, trust).detach())
    near(refine_labels(few, trust, logits), refine_labels(labels, trust, logits))
    near(gmm_clean_probability(trust, labels=few), gmm_clean_probability(trust, labels=labels))


def test_mixing_keeps_more_of_a_than_of_its_partner_and_the_sum():
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 2), torch.eye(6)
    mixed, soft = mix_up(inputs, targets)
    near(soft.sum(1), np.ones(6), rtol=1e-6)
    assert bool((soft.diagonal() >= 0.5).all())
    near(mixed, soft @ inputs, rtol=1e-5, atol=1e-6)
    assert len(soft[soft > 0].unique()) <= 3


@pytest.mark.bad_input
def test_bad_labels_and_settings_are_refused():
    with pytest.raises(ValueError, match="targets: found 4, needed classes 0 to 2"):
        refine_labels(torch.tensor([4]), torch.ones(1), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"clean_probability: found 1\.5"):
        refine_labels(torch.tensor([0]), torch.tensor([1.5]), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"clean_probability: found shape \(2,\)"):
        refine_labels(torch.tensor([0]), torch.ones(2), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"logits: found shape \(1, 3\)"):
        guess_labels(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="temperature: found 0"):
        guess_labels(torch.zeros(1, 1, 3), temperature=0)
    with pytest.raises(ValueError, match="lambda_u: found -1"):
        SemiLoss(-1)
    with pytest.raises(ValueError, match="rampup_length: found 0"):
        SemiLoss(1, 0)
    with pytest.raises(ValueError, match="logits_u, targets_u: found shapes"):
        SemiLoss()(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2, 2), 1, 1)
    with pytest.raises(ValueError, match="alpha: found 0"):
        mix_up(torch.zeros(2, 1), torch.zeros(2, 1), 0)
    with pytest.raises(ValueError, match="history: found 0"):
        CPCModule("mlp", history=0)
    with pytest.raises(ValueError, match="cleaner: found -1"):
        CPCModule("mlp", cleaner=-1)
    with pytest.raises(ValueError, match="warmup_epochs, epochs: found 9 and 3"):
        CPCSchedule(warmup_epochs=9, epochs=3)


# -- the cleaner


def test_a_zero_feature_says_the_bias_and_learns_no_direction():
    cleaner = ClassPrototypeCleaner(3, 2)
    with torch.no_grad():
        cleaner.bias.copy_(torch.tensor([0.5, -0.25]))
    features = torch.zeros(2, 3, requires_grad=True)
    found = cleaner(features, torch.tensor([0, 1]))
    near(found, [0.5, -0.25], rtol=1e-6)
    found.sum().backward()
    assert not features.grad.any()
    assert not cleaner.prototypes.grad.any()


def test_classes_count_alike_or_rows_do():
    features, labels = torch.randn(4, 3), torch.tensor([0, 0, 0, 2])
    targets = torch.tensor([1.0, 0.0, 0.5, 0.2])
    cleaner = ClassPrototypeCleaner(3, 3)
    rows = F.binary_cross_entropy_with_logits(cleaner(features, labels), targets, reduction="none")
    near(cleaner.loss(features, labels, targets), ((rows[:3].mean() + rows[3]) / 2).detach(), rtol=1e-6)
    cleaner.balanced = False
    near(cleaner.loss(features, labels, targets), rows.mean().detach(), rtol=1e-6)
    near(cleaner.loss(features[:1], labels[:1], targets[:1]), rows[0].detach(), rtol=1e-6)
    for balanced in (True, False):
        cleaner.balanced = balanced
        nothing = cleaner.loss(features[:0], labels[:0], targets[:0])
        nothing.backward()
        assert float(nothing.detach()) == 0


def test_targets_have_no_gradient_and_the_threshold_is_strict():
    cleaner = ClassPrototypeCleaner(2, 2, threshold=0.5)
    targets = torch.rand(3, requires_grad=True)
    labels = torch.tensor([0, 1, 1])
    cleaner.loss(torch.randn(3, 2), labels, targets).backward()
    assert targets.grad is None
    assert not cleaner.partition(torch.zeros(3, 2), labels).any()  # p is 0.5 there
    with torch.no_grad():
        cleaner.bias[1] = 0.1
    assert cleaner.partition(torch.zeros(3, 2), labels).tolist() == [False, True, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_only_the_direction_of_a_feature_counts(seed, scale):
    torch.manual_seed(seed)
    cleaner, features = ClassPrototypeCleaner(4, 3).double(), torch.randn(5, 4).double()
    labels = torch.randint(3, (5,))
    found = cleaner(features, labels)
    near(cleaner(scale * features, labels), found.detach(), rtol=1e-6)
    assert bool((found.abs() <= 10 + 1e-9).all())


def test_passes_over_features_find_wrong_labels():
    torch.manual_seed(0)
    centres = 3 * torch.eye(4)
    true = torch.arange(400) % 4
    features = centres[true] + 0.3 * torch.randn(400, 4)
    wrong = torch.rand(400) < 0.3
    labels = torch.where(wrong, (true + 1) % 4, true)
    targets = (~wrong).float() * 0.8 + 0.1
    cleaner = ClassPrototypeCleaner(4, 4)
    start = copy.deepcopy(cleaner)
    cleaner.fit(features, labels, targets, epochs=20, batch_size=16, generator=torch.Generator().manual_seed(0))
    assert (cleaner.partition(features, labels) == ~wrong).float().mean() > 0.97
    assert (start.partition(features, labels) == ~wrong).float().mean() < 0.9
    assert cleaner.prototypes.grad is None


@pytest.mark.bad_input
def test_bad_input_of_the_cleaner_is_refused():
    cleaner = ClassPrototypeCleaner(2, 3)
    with pytest.raises(ValueError, match="targets: found 3, needed classes 0 to 2"):
        cleaner(torch.zeros(1, 2), torch.tensor([3]))
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="targets: found"):
            cleaner.loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([wrong]))
    with pytest.raises(ValueError, match=r"targets: found shape \(2,\)"):
        cleaner.loss(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(2))
    with pytest.raises(ValueError, match="features: found 5 columns, needed 2"):
        cleaner(torch.zeros(1, 5), torch.tensor([0]))
    with pytest.raises(ValueError, match="threshold: found 2"):
        ClassPrototypeCleaner(2, 2, threshold=2)
    with pytest.raises(ValueError, match="temperature: found 0"):
        ClassPrototypeCleaner(2, 2, temperature=0)


# -- training


def module(**changed):
    torch.manual_seed(0)
    options = {"image_size": 8, "in_channels": 1, "class_names": list("0123456789")}
    options |= {"schedule": CPCSchedule(warmup_epochs=1, epochs=3, lr=0.05, milestones=(2,))}
    return CPCModule("mlp", **options | changed)


def data_of(**changed):
    options = {"batch_size": 64, "protocol": SymmetricNoise(0.4, true_class=False)}
    return Digits(image_size=8, **options | changed)


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


class Rates(pl.Callback):
    def __init__(self):
        self.seen, self.divisions = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append([round(o.param_groups[0]["lr"], 6) for o in trainer.optimizers])
            self.divisions.append(pl_module.division)


def test_training_divides_labels_and_resumes(tmp_path):
    net, data, rates = module(history=2), data_of(views=["none"]), Rates()
    trainer = trainer_of(tmp_path, Curriculum(), rates, limit_train_batches=3)
    trainer.fit(net, datamodule=data)
    assert rates.seen == [[0.05] * 2, [0.05] * 2, [0.005] * 2]
    assert rates.divisions[0] is None
    division, rows = rates.divisions[2], data.rows("train")
    others = np.setdiff1d(np.arange(len(data.record_ids)), rows)
    assert not division.clean[:, others].any()
    assert not division.mixture[:, others].any()
    assert bool((division.clean[:, rows] > 0).all())
    assert (bool(net.fitted), int(net.begun), len(net.past)) == (True, 2, 2)
    again = CPCModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    images = torch.rand(3, 1, 8, 8)
    near(again(images).logits, net.eval()(images).logits.detach(), rtol=1e-6)
    assert again.settings() == net.settings()
    resumed = module(history=2)
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    resumed.on_load_checkpoint(stored)
    assert all(torch.equal(one, other) for one, other in zip(resumed.past, net.past))
    assert len(resumed.past) == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(precision, tmp_path):
    net, data = module(), data_of(views=["none"], batch_size=241)  # 724 images, one is left for the last batch
    trainer_of(tmp_path, Curriculum(), precision=precision).fit(net, datamodule=data)
    assert bool(net.fitted)
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_losses_are_kept_by_row_and_scaled_over_the_data_set():
    net, data = module(), data_of()
    net.fitted.fill_(True)
    division = net.divide(data)
    rows = data.rows("train")
    images = torch.stack([data.model_input(data.record_ids[row]) for row in rows])
    labels = data.targets[rows]
    with torch.no_grad():
        for k in (0, 1):
            logits, features = net.networks[k].eval()(images)
            losses = F.cross_entropy(logits, labels, reduction="none")
            scaled = (losses - losses.min()) / (losses.max() - losses.min())
            near(net.past[-1][k], scaled, rtol=1e-4, atol=1e-5)
            near(division.mixture[k, rows], gmm_clean_probability(scaled).float(), rtol=1e-3, atol=1e-3)
            near(division.clean[k, rows], net.cleaners[k].clean_probability(features, labels), rtol=1e-4)


def test_history_means_the_losses_of_the_last_epochs():
    net, data = module(history=2), data_of()
    net.fitted.fill_(True)
    net.divide(data)
    with torch.no_grad():
        for network in net.networks:
            network.head.weight.mul_(3)
    net.divide(data)
    with torch.no_grad():
        for network in net.networks:
            network.head.weight.mul_(-1)
    division, rows = net.divide(data), data.rows("train")
    assert len(net.past) == 2
    near(
        division.mixture[0, rows], gmm_clean_probability(torch.stack(net.past).mean(0)[0]).float(), rtol=1e-4, atol=1e-5
    )


class Clock:
    num_training_batches = 4


def cleaning(net, clean, mixture=None, epoch=20.0):
    """A system in the stage that doubts labels, with a division of 12 images."""
    net.stage = net.stages[1]
    mixture = torch.full((2, 12), 0.5) if mixture is None else mixture
    inside = [0 < int((part > 0.5).sum()) < 12 for part in clean]
    net.division = _Division(mixture, clean, (inside[0], inside[1]))
    net.epoch = epoch
    return net


def batch_of(views=2):
    g = torch.Generator().manual_seed(1)
    every = torch.arange(12)
    return ImageBatch(torch.rand(12, views, 1, 8, 8, generator=g), every % 10, every, every >= 0)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(CPCModule, "trainer", Clock())


def test_each_network_learns_on_what_the_other_trusts(clock):
    clean = torch.zeros(2, 12)
    clean[0, :3], clean[1, 6:11] = 0.9, 0.8
    net, batch = cleaning(module(), clean), batch_of()
    seen = []
    semi = net.semi.forward
    net.semi.forward = lambda *args: seen.append(args) or semi(*args)  # type: ignore[method-assign]
    torch.manual_seed(0)
    terms = net.clean_terms(batch.image, batch, 2)
    assert [len(args[0]) for args in seen] == [10, 6]  # two views of 5 images that the second trusts, of 3 of the first
    assert [len(args[2]) for args in seen] == [14, 18]
    assert all(args[4:] == (20.5, 1) for args in seen)
    assert all(set(own) == {"labelled", "guessed", "prior", "cleaner"} for own in terms)


def test_one_sided_divisions_fall_back_to_all_labels(clock):
    for share in (0.0, 1.0):
        clean = torch.full((2, 12), share)
        clean[1, :4] = 0.7
        clean[1, 4:] = 0.2
        net, batch = cleaning(module(), clean), batch_of()
        first, second = net.clean_terms(batch.image, batch, 0)
        assert set(first) == {"labelled", "guessed", "prior", "cleaner"}
        assert set(second) == {"class", "cleaner"}
        logits = net.networks[1](batch.image[:, 0])[0]
        near(second["class"], F.cross_entropy(logits, batch.target).detach(), rtol=1e-6)


def test_the_cleaner_learns_from_given_labels_of_all_images(clock):
    clean = torch.rand(2, 12)
    mixture = torch.rand(2, 12)
    net, batch = cleaning(module(cleaner=2.0), clean, mixture), batch_of()
    terms = net.clean_terms(batch.image, batch, 0)
    for k in (0, 1):
        features = net.networks[k](batch.image[:, 0])[1]
        near(terms[k]["cleaner"], 2 * net.cleaners[k].loss(features, batch.target, mixture[k]).detach(), rtol=1e-5)
    terms[0]["cleaner"].backward()
    assert net.networks[0].encoder[1].weight.grad.any()
    assert net.networks[1].encoder[1].weight.grad is None


def test_batches_of_one_and_of_one_kind_work(clock):
    clean = torch.zeros(2, 12)
    clean[:, :2] = 0.9
    net = cleaning(module(), clean)
    for rows in ([0], [5], [0, 1]):
        batch = ImageBatch(*(part[rows] for part in batch_of(1)))
        for own in net.clean_terms(batch.image, batch, 0):
            assert all(bool(value.isfinite()) for value in own.values())


def test_asymmetric_noise_adds_a_penalty_to_the_warm_up():
    net, batch = module(asymmetric=True), batch_of()
    first, _ = net.warmup_terms(batch.image[:, 0], batch.target)
    near(first["confidence"], negative_entropy(net.networks[0](batch.image[:, 0])[0]).detach(), rtol=1e-6)
    plain, _ = module().warmup_terms(batch.image[:, 0], batch.target)
    assert set(plain) == {"class"}


def test_labels_are_judged_by_both_cleaners():
    net, batch = module().eval(), batch_of(1)
    images = batch.image[:, 0]
    with pytest.raises(ValueError, match="cleaners have not trained"):
        net.judge_labels(images, batch.target)
    net.fitted.fill_(True)
    suspicion, suggested = net.judge_labels(images, batch.target)
    with torch.no_grad():
        both = [net.networks[k](images) for k in (0, 1)]
        trust = [net.cleaners[k].clean_probability(both[k][1], batch.target) for k in (0, 1)]
    near(suspicion, 1 - (trust[0] + trust[1]) / 2, rtol=1e-5)
    assert torch.equal(suggested, (both[0][0] + both[1][0]).argmax(1))


def test_the_first_passes_are_the_same_on_every_rank():
    net, other = module(), module()
    data = data_of()
    torch.manual_seed(1)
    one = net.divide(data)
    torch.manual_seed(2)
    two = other.divide(data)
    near(one.clean, two.clean)
    assert torch.equal(net.cleaners[0].prototypes, other.cleaners[0].prototypes)
    assert bool(net.fitted)
    assert not torch.equal(net.cleaners[0].prototypes, copy.deepcopy(module().cleaners[0].prototypes))
