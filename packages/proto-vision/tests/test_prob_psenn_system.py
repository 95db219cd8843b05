"""Prob-PSENN as a system: its stages, what training fits, evaluation that can be repeated, the report."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, ProbPSENNModule
from proto_vision.data.augmentation import augmentation
from proto_vision.data.dataset import ImageBatch
from proto_vision.prob_psenn import PSENNSchedule, VariationalProbPSENN, cnn32_autoencoder, latent_divergence


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


def trainer(folder, *callbacks, **options):
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
        **options,
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


# -- random latents


def test_random_latents_are_means_in_evaluation_and_samples_in_training():
    torch.manual_seed(0)
    net = VariationalProbPSENN(*cnn32_autoencoder(dim=3, widths=(4, 4, 4, 8), variational=True), num_classes=2, dim=3)
    net.encoder[-2].bias.data[3:] -= 4  # a spread of about an eighth
    x = torch.rand(6, 1, 32, 32)
    net.eval()
    mean, log_variance = net.posterior(x)
    near(torch.cat([mean, log_variance], 1), net.encoder(x).detach())
    assert torch.equal(net(x).latents, mean)
    assert torch.equal(net.encode(x), mean)
    net.train()
    drawn = torch.stack([net.draw(mean, log_variance) for _ in range(4000)])
    near(drawn.mean(0), mean.detach(), atol=0.02)
    near(drawn.var(0), log_variance.exp().detach(), rtol=0.2)
    net(x).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.encoder.parameters())
    assert net.encoder[-2].weight.grad[3:].any(), "the log-variance has a gradient through the sample"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4))
def test_divergence_is_that_of_gaussians(seed, count, dim):
    g = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, count, dim, generator=g).double()
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    near(latent_divergence(mean, log_variance), expected, rtol=1e-9, atol=1e-12)
    half = latent_divergence(mean.bfloat16(), log_variance.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.bad_input
def test_random_latents_refuse_what_does_not_fit():
    assert latent_divergence(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    with pytest.raises(ValueError, match=r"found shapes \(2, 3\) and \(2, 2\)"):
        latent_divergence(torch.zeros(2, 3), torch.zeros(2, 2))
    plain = VariationalProbPSENN(*cnn32_autoencoder(dim=4, widths=(4, 4, 4, 8)), num_classes=2, dim=4)
    with pytest.raises(ValueError, match=r"encoder: found latents of shape \(2, 4\), needed \[N, 8\]"):
        plain(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match="lambda_divergence: found -1"):
        module(lambda_divergence=-1)


def test_random_latents_train_and_come_back(tmp_path):
    net, batch = module(variational=True, lambda_divergence=0.5), batch_of(12)
    x = net.inputs(batch.image)
    net.eval()
    mean, log_variance = net.network.posterior(x)
    divergence = 0.5 * latent_divergence(mean, log_variance)
    net.stage = net.stages[0]
    shown = (net.network.decoder(mean) - x).square().mean()
    near(net.training_step(batch, 0), (shown + divergence).detach(), rtol=1e-5)
    net.stage = net.stages[1]
    torch.manual_seed(3)
    out = net.network(x)
    expected = net.loss(out.logits, batch.target, out.reconstruction, x, out.log_prob) + divergence
    torch.manual_seed(3)
    near(net.training_step(batch, 0), expected.detach(), rtol=1e-5)
    data = Digits(image_size=32, batch_size=128)
    runner = trainer(tmp_path, Curriculum())
    runner.fit(net.train(), datamodule=data)
    again = ProbPSENNModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    assert again.settings()["variational"]
    near(again.eval().class_logits(batch.image), net.eval().class_logits(batch.image).detach(), rtol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("variational", [False, True])
def test_every_precision_trains(precision, variational, tmp_path):
    data = Digits(image_size=32, batch_size=64)
    data.setup("fit")
    net = module(variational=variational, schedule=PSENNSchedule(1, 1, start="random", keep="last"))
    trainer(tmp_path, Curriculum(), precision=precision).fit(net, train_dataloaders=data.train_dataloader())
    assert all(parameter.isfinite().all() for parameter in net.parameters())
