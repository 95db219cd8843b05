"""Prob-PSENN as a system: its stages, what training fits, evaluation that can be repeated, the report."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, ProbPSENNModule
from proto_vision.data.augmentation import augmentation
from proto_vision.data.dataset import ImageBatch
from proto_vision.prob_psenn import PSENNSchedule


def near(found, expected, **tolerance):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, **tolerance)


def module(**changed):
    torch.manual_seed(0)
    schedule = PSENNSchedule(1, 1, keep="last")
    options = {"dim": 4, "widths": (4, 4, 4, 8), "eval_samples": 5, "schedule": schedule}
    return ProbPSENNModule(**options | {"class_names": list("0123456789")} | changed)


def batch_of(n):
    every = torch.arange(n)
    return ImageBatch(torch.rand(n, 1, 32, 32) * 2 - 1, every % 10, every, every >= 0)


def test_stages_and_weights():
    net = ProbPSENNModule()
    assert net.loss.weights == {"nll": 1.0, "reconstruction": 10.0, "prototype": 0.0, "data": 0.05}
    assert (net.network.prototypes.covariance, net.network.num_samples) == ("full", 10)
    assert net.network.prototypes.loc.shape == (10, 40)
    assert [(stage.name, stage.max_epochs, stage.lr) for stage in net.stages] == [
        ("autoencoder", 20, 1e-3),
        ("joint", 60, 1e-3),
    ]
    optimizer = net.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    enter_stage(net, net.stages[0])
    assert not net.network.prototypes.loc.requires_grad
    assert len(net.configure_optimizers().param_groups[0]["params"]) == len(
        [*net.network.encoder.parameters(), *net.network.decoder.parameters()]
    )


def test_each_stage_has_its_loss():
    net, batch = module(), batch_of(12)
    net.stage = net.stages[0]
    net.eval()
    x = net.inputs(batch.image)
    near(x, batch.image, rtol=1e-5, atol=1e-6)  # the default normalisation is the autoencoder's range
    drawn = net.network.decoder(net.network.encoder(x))
    near(net.training_step(batch, 0), (drawn - x).square().mean().detach(), rtol=1e-5)
    net.stage = net.stages[1]
    torch.manual_seed(4)
    found = net.training_step(batch, 0)
    torch.manual_seed(4)
    out = net(batch.image)
    near(found, net.loss(out.logits, batch.target, out.reconstruction, x, out.log_prob).detach(), rtol=1e-5)
    with pytest.raises(ValueError, match="batch: found one image"):
        net.training_step(batch_of(1), 0)


def test_evaluation_can_be_repeated():
    net, batch = module(), batch_of(6)
    net.eval()
    first, again = net.predict_step(batch, 0), net.predict_step(batch, 1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
    expected = net.network.predict_proba(net.inputs(batch.image), noise=net.eval_noise)
    near(first["probabilities"], expected.detach(), rtol=1e-5)
    near(net.class_logits(batch.image).exp(), expected.detach(), rtol=1e-5)
    assert first["epistemic"].shape == (6,)


@pytest.mark.bad_input
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="image_size: found 28, needed 32"):
        ProbPSENNModule(image_size=28)
    with pytest.raises(ValueError, match="start: found 'cold'"):
        ProbPSENNModule(schedule=PSENNSchedule(start="cold"))
    with pytest.raises(ValueError, match="keep: found 'all'"):
        ProbPSENNModule(schedule=PSENNSchedule(keep="all"))
    with pytest.raises(ValueError, match="eval_samples: found 0"):
        ProbPSENNModule(eval_samples=0)


def test_their_augmentation_shifts_brightness_and_scale():
    torch.manual_seed(0)
    grey = Image.new("RGB", (16, 16), (128, 128, 128))
    steps = v2.Compose(augmentation("zoom", [], 16))
    drawn = [np.asarray(steps(grey)) for _ in range(20)]
    assert all(image.shape == (16, 16, 3) and (image == image[0, 0]).all() for image in drawn)  # no dark border
    values = [int(image[0, 0, 0]) for image in drawn]
    assert 77 <= min(values) < 100 < 150 < max(values) <= 179


def trainer(folder, *callbacks):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def test_training_fits_the_prototypes_once_and_the_report_shows_them(tmp_path, monkeypatch):
    data = Digits(image_size=32, batch_size=128)
    net, fits = module(schedule=PSENNSchedule(1, 2, keep="last"), eval_samples=3), []
    fit = ProbPSENNModule.fit_prototypes

    def watched(self, source):
        fit(self, source)
        fits.append((self.stage.name, self.network.prototypes.loc.detach().clone(), *self.codes(source)))

    monkeypatch.setattr(ProbPSENNModule, "fit_prototypes", watched)
    runner = trainer(tmp_path, Curriculum())
    runner.fit(net, datamodule=data)
    ((stage, loc, codes, targets),) = fits
    assert stage == "joint"
    near(loc[3], codes[targets == 3].mean(0), rtol=1e-4, atol=1e-5)
    runner.test(net, datamodule=data, verbose=False)
    summary = net.test_results["summary"]
    assert {f"auroc_errors_{name}" for name in ("predictive_entropy", "aleatoric", "epistemic")} <= set(summary)
    assert 0 <= summary["auroc_errors_epistemic"] <= 1
    again = ProbPSENNModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    assert bool(again.fitted)
    names = [data.record_ids[int(row)] for row in data.test_set.rows[:2]]
    images = torch.stack([data.model_input(name) for name in names])
    logits, distances = again.sampled_logits(images)
    for n, (found,) in enumerate(again.explain(images, names)):
        c = again.class_names.index(found.label)
        assert c == int(logits.softmax(2).mean(1)[n].argmax())
        assert found.total == pytest.approx(float(logits.mean(1)[n, c]), rel=1e-4)
        assert found.probability == pytest.approx(float(logits.softmax(2).mean(1)[n, c]), rel=1e-4)
        for item in found.evidence:
            assert item.similarity == pytest.approx(float(distances.mean(2)[n, item.prototype]), rel=1e-4)
    known = again.training_distances(data)
    assert [len(part) for part in known] == torch.bincount(data.targets[torch.from_numpy(data.rows("train"))]).tolist()
    html = again.explain_images(data, names, top=2, source="final.ckpt")
    assert html.count("<article") == 2
    assert "<script" not in html
    for text in (
        "mean distance × weight",
        "Overlap of distances",
        "(epistemic)",
        "Nearer training images",
        "Spread of",
    ):
        assert text in html
    shown = again.decoded_prototypes()
    assert shown.samples.shape == (3, 10, 1, 32, 32)
    assert float(shown.images.min()) >= 0
    assert float(shown.images.max()) <= 1
    near(shown.spread, shown.samples.std(0, correction=0).mean(1).detach(), rtol=1e-4)


def test_random_start_needs_no_data_module(tmp_path):
    data = Digits(image_size=32, batch_size=64)
    data.setup("fit")
    net = module(schedule=PSENNSchedule(0, 1, start="random", keep="last"))
    runner = trainer(tmp_path, Curriculum())
    runner.fit(net, train_dataloaders=data.train_dataloader())
    assert not bool(net.fitted)
    net.schedule = PSENNSchedule(0, 1, keep="last")
    with pytest.raises(ValueError, match="'fitted' needs a data module"):
        net.on_train_epoch_start()
