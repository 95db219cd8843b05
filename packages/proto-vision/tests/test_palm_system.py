"""PALM as a system: the authors' values through its step, nearest prototypes, rates, resuming, detection."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from proto_core.losses import PALMLoss
from proto_core.metrics import auroc, fpr_at_tpr
from proto_core.ood import MahalanobisOOD
from proto_core.training import Curriculum
from proto_vision import PALM, Digits
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.protocols import UnseenClasses
from proto_vision.palm import PALMSchedule

SMALL = {"image_size": 8, "in_channels": 1, "embedding_dim": 8, "prototypes_per_class": 2, "momentum": 0.5}


def module(classes=3, **changed):
    torch.manual_seed(0)
    return PALM("conv2", classes, **SMALL | changed)


def batch(count=12, classes=3, views=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.arange(count)
    shape = (count, *([views] if views else []), 1, 8, 8)
    return ImageBatch(torch.rand(shape, generator=g), index % classes, index, index >= 0)


def trainer(folder, epochs=3, **more):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings_ = {"accelerator": "cpu", "max_epochs": epochs, "default_root_dir": folder, "enable_checkpointing": False}
    return pl.Trainer(**settings_ | quiet | {"limit_train_batches": 3, "limit_val_batches": 1} | more)


# -- the step


def test_the_systems_step_is_the_authors(golden_dir):
    golden = np.load(golden_dir / "palm.npz")
    for case in "abcde":
        a = {key.removeprefix(f"{case}_"): golden[key] for key in golden.files if key.startswith(f"{case}_")}
        momentum, temperature, weight, epsilon = map(float, a["hyper"])
        net = PALM(
            *("conv2", int(a["num_classes"])),
            image_size=8,
            embedding_dim=a["prototypes_init"].shape[1],
            prototypes_per_class=int(a["per_class"]),
            top_k=int(a["top_k"]),
            momentum=momentum,
            temperature=temperature,
            proto_temperature=float(a.get("proto_temperature", 0.5)),
            lambda_pcon=weight,
            epsilon=epsilon,
            sinkhorn_iterations=int(a.get("sinkhorn_iterations", 3)),
        ).double()
        net.encoder, net.head = nn.Flatten(), nn.Identity()
        net.loss.prototypes.set_(torch.from_numpy(a["prototypes_init"]))
        for step in range(2):
            # golden views are stacked already, so they come as single views of more images
            z, y = torch.from_numpy(a[f"emb_s{step}"]), torch.from_numpy(a[f"lab_s{step}"])
            loss = net.training_step(ImageBatch(z[:, :, None, None], y, y, y >= 0), 0)
            np.testing.assert_allclose(loss.detach(), a[f"loss_s{step}"], rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(net.loss.terms["mle"], a[f"mle_s{step}"], rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(net.loss.prototypes.prototypes, a[f"protos_s{step}"], rtol=1e-7, atol=1e-9)


def test_views_are_stacked_with_their_labels():
    net, data = module(), batch()
    again = copy.deepcopy(net)
    loss = net.training_step(data, 0)
    both = torch.cat([again.embed(again.encoder(data.image[:, view])) for view in (0, 1)])
    torch.testing.assert_close(loss, again.loss(both, data.target.repeat(2)))
    torch.testing.assert_close(net.loss.prototypes.prototypes, again.loss.prototypes.prototypes)
    assert float(sum(net.loss.terms.values())) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_one_view_is_enough_and_evaluation_leaves_the_prototypes():
    net = module()
    before = net.loss.prototypes.prototypes.clone()
    net.eval()
    value = net.training_step(batch(views=0), 0)
    assert torch.equal(net.loss.prototypes.prototypes, before)
    net.train()
    torch.testing.assert_close(net.training_step(batch(views=0), 0), value)
    assert not torch.equal(net.loss.prototypes.prototypes, before)


def test_half_precision_is_computed_in_full():
    net = module()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.training_step(batch(), 0)
        out = net(batch(views=0).image)
    assert (loss.dtype, out.logits.dtype) == (torch.float32, torch.float32)
    assert bool(loss.isfinite())
    torch.testing.assert_close(out.embeddings.norm(dim=1), torch.ones(12))


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_logits_are_the_nearest_prototypes_of_each_class(classes, per_class, seed):
    net = module(classes, prototypes_per_class=per_class, temperature=0.2).eval()
    torch.manual_seed(seed)
    net.loss.prototypes.reset_parameters()
    with torch.no_grad():
        out = net(batch(views=0, seed=seed).image)
    layer = net.loss.prototypes
    for c in range(classes):
        own = layer.prototypes[layer.class_identity[:, c] > 0]
        torch.testing.assert_close(out.logits[:, c], (out.embeddings @ own.T).amax(1) / 0.2)


# -- rates, checkpoints


def test_rates_rise_in_a_line_and_fall_as_a_cosine():
    schedule = PALMSchedule()
    assert schedule.rate(5) == pytest.approx(0.25)
    assert schedule.rate(10) == pytest.approx(0.5)
    assert schedule.rate(255) == pytest.approx(0.5 * (1 + 1e-3) / 2)
    assert schedule.rate(500) == pytest.approx(5e-4)
    assert PALMSchedule(3, 3, 0.6).rate(3) == pytest.approx(0.6)


class Rates(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen += [group["lr"] for group in optimizer.param_groups]


def test_every_step_has_the_rate_of_its_end(tmp_path):
    rates, schedule = Rates(), PALMSchedule(3, 1, 0.3)
    net, data = module(10, schedule=schedule), Digits(image_size=8, batch_size=32)
    runner = trainer(tmp_path, callbacks=[Curriculum(), rates])
    runner.fit(net, datamodule=data)
    assert rates.seen == pytest.approx([schedule.rate(step / 3) for step in range(1, 10)])
    group = net.configure_optimizers().param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-6)
    history = runner.callbacks[0].history
    assert [item["epoch"] for item in history] == [1, 2, 3]
    best = min(item["train/loss"] for item in history)
    assert runner.callbacks[0].best == pytest.approx(best)


def test_resumed_training_ends_where_the_whole_did(tmp_path):
    data = {"image_size": 8, "batch_size": 32, "augment": "affine", "views": ["affine"]}
    options = {"schedule": PALMSchedule(2, 1, 0.1, keep="last")}

    def states(folder, stop):
        for epochs in stop:
            pl.seed_everything(3)
            net = module(10, **options)
            path = folder / "checkpoints" / "last.ckpt"
            runner = trainer(folder, epochs, callbacks=[Curriculum()])
            runner.fit(net, datamodule=Digits(**data), ckpt_path=path if path.is_file() else None)
        return net.state_dict()

    whole, cut = states(tmp_path / "whole", [2]), states(tmp_path / "cut", [1, 2])
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, msg=name)
    again = PALM.from_checkpoint(tmp_path / "cut" / "checkpoints" / "final.ckpt")
    assert torch.equal(again.loss.prototypes.prototypes, whole["loss.prototypes.prototypes"])
    assert again.settings() == module(10, **options).settings()


def test_prediction_is_a_probability_of_each_class():
    net = module().eval()
    found = net.predict_step(batch(views=0), 0)
    assert set(found) == {"index", "probabilities", "decisions"}
    torch.testing.assert_close(found["probabilities"].sum(1), torch.ones(12))
    assert bool((found["decisions"].sum(1) == 1).all())


# -- detection


def split(**more):
    return Digits(image_size=8, protocol=UnseenClasses(4, **more))


def test_the_test_scores_unknown_classes(tmp_path):
    data = split(seen_tested=True)
    net = module(class_names=data.class_names)
    trainer(tmp_path, limit_test_batches=None).test(net, datamodule=data, verbose=False)
    summary = net.test_results["summary"]

    def images(rows):
        return torch.stack([data.model_input(data.record_ids[row]) for row in rows])

    tested = data.rows("test")
    known = tested[data.table.targets[tested] < 6]
    unknown = tested[data.table.targets[tested] >= 6]
    with torch.no_grad():
        detector = MahalanobisOOD().fit(net.ood_features(images(data.rows("train"))))
        inside, outside = (detector.score(net.ood_features(images(rows))) for rows in (known, unknown))
        right = net(images(known)).logits.argmax(1) == data.targets[torch.from_numpy(known)]
    # scores are kept in float32
    assert summary["unknown_auroc"] == pytest.approx(auroc(inside, outside), abs=1e-4)
    assert summary["unknown_fpr95"] == pytest.approx(fpr_at_tpr(inside, outside), abs=2e-3)
    assert summary["accuracy"] == pytest.approx(float(right.float().mean()))
    assert net.test_results["records"] == len(known)


def test_without_unknown_classes_there_is_nothing_to_detect(tmp_path):
    net, data = module(10), Digits(image_size=8)
    trainer(tmp_path).test(net, datamodule=data, verbose=False)
    assert net.detector is None
    assert "unknown_auroc" not in net.test_results["summary"]
    net = module(10)
    trainer(tmp_path).test(net, dataloaders=data.test_dataloader(), verbose=False)
    assert net.test_results["records"] == len(data.rows("test"))


@pytest.mark.bad_input
def test_bad_input_is_refused(tmp_path):
    data = split()
    with pytest.raises(ValueError, match=r"no image of the 6 classes that were trained.*seen_tested"):
        trainer(tmp_path).test(module(6), datamodule=data, verbose=False)
    for wrong, message in [
        ({"num_classes": 1}, "num_classes: found 1"),
        ({"temperature": 0.0}, "temperature: found 0"),
        ({"momentum": 1.5}, "momentum"),
        ({"lambda_pcon": -1.0}, "lambda_pcon"),
        ({"top_k": -1}, "top_k"),
        ({"backbone": "nothing"}, "nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            PALM(**{"backbone": "conv2", "num_classes": 3} | SMALL | wrong)
    with pytest.raises(ValueError, match="targets: found 3, needed classes 0 to 2"):
        module().training_step(batch(classes=6), 0)
    for epochs, warmup in ((0, 0), (2, 3), (2, -1)):
        with pytest.raises(ValueError, match="warmup_epochs, epochs"):
            PALMSchedule(epochs, warmup)
    with pytest.raises(ValueError, match="another label set"):
        module().on_load_checkpoint({"proto": {"settings": module(4).settings()}})


def test_what_the_system_is_stands_with_its_loss():
    assert PALM.paper is PALMLoss.paper
    stage = PALM("conv2", 3).stages[0]
    assert (stage.max_epochs, stage.lr, stage.monitor, stage.mode) == (500, 0.5, "train/loss", "min")
