"""Case-based reasoning: the authors' values of network and loss, SciPy's deformation, edge cases, training, report."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from torch.nn import functional as F

from proto_core.training import Curriculum, Stage, enter_stage
from proto_vision import CaseBasedModule, Digits, PrototypeAutoencoder
from proto_vision.case_based import CaseBasedLoss, ElasticDeformation, elastic_deform, squared_distances
from proto_vision.data.dataset import ImageBatch
from proto_vision.pixels import Pixels

NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "case_based.npz")


def arrays_of(golden, prefix):
    keys = [key for key in golden.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in keys}


def near(found, expected, **tolerance):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, **(tolerance or NEAR))


def filled(a):
    """The network of a golden case."""
    hidden = [len(a[f"enc{n}_bias"]) for n in (1, 2, 3)]
    classes, prototypes = a["classifier_weight"].shape
    net = PrototypeAutoencoder(28, 1, classes, prototypes, hidden, len(a["enc4_bias"]))
    with torch.no_grad():
        for kind, layers in (("enc", net.encoder_convs), ("dec", net.decoder_convs)):
            for n, layer in enumerate(layers, 1):
                layer.weight.copy_(a[f"{kind}{n}_weight"])
                layer.bias.copy_(a[f"{kind}{n}_bias"])
        net.prototypes.copy_(a["prototypes"])
        net.classifier.weight.copy_(a["classifier_weight"])
    return net


@pytest.mark.parametrize("case", ["a_", "b_"])
def test_network_loss_and_gradients_equal_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    net = filled(a)
    x = a["x"].clone().requires_grad_()
    out = net(x)
    for name in ("latents", "reconstruction", "distances", "logits"):
        near(getattr(out, name), a[name])
    near(net.prototype_images(), a["prototype_images"])
    near(squared_distances(out.latents, net.prototypes), a["distances"])
    loss = CaseBasedLoss(*a["lambdas"].tolist())
    arguments = (out.logits, a["targets"], out.reconstruction, x, out.distances)
    for name, value in loss.terms(*arguments).items():
        near(value, a[f"loss_{name}"])
    total = loss(*arguments)
    near(total, a["total"])
    wanted = {
        "x": x,
        "prototypes": net.prototypes,
        "classifier": net.classifier.weight,
        "enc1_weight": net.encoder_convs[0].weight,
        "dec1_weight": net.decoder_convs[0].weight,
        "dec4_bias": net.decoder_convs[3].bias,
    }
    for name, found in zip(wanted, torch.autograd.grad(total, list(wanted.values()))):
        near(found, a[f"grad_{name}"], rtol=1e-4, atol=1e-5 * max(1, float(a[f"grad_{name}"].abs().max())))


# -- deformation


def scipy_deformed(image, noise, sigma, alpha):
    rows, columns = (alpha * gaussian_filter(field, sigma, mode="constant") for field in noise)
    r, c = np.mgrid[: image.shape[0], : image.shape[1]]
    return map_coordinates(image, [r + rows, c + columns], order=1, mode="constant")


def test_deformation_equals_the_authors_code(golden):
    found = elastic_deform(golden["elastic_images"], golden["elastic_noise"])
    np.testing.assert_allclose(found, golden["elastic_output"], rtol=0, atol=1e-8)


@given(
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([0.0, 3.0, 20.0]),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_deformation_equals_scipy(n, height, width, sigma, alpha, seed):
    rng = np.random.default_rng(seed)
    images, noise = rng.uniform(size=(n, height, width)), rng.uniform(-1, 1, (n, 2, height, width))
    found = elastic_deform(images, noise, sigma, alpha)
    assert found.shape == images.shape
    for image, field, result in zip(images, noise, found):
        np.testing.assert_allclose(result, scipy_deformed(image, field, sigma, alpha), rtol=0, atol=1e-10)
    if alpha == 0:
        np.testing.assert_array_equal(found, images)


def test_deformation_draws_rows_before_columns_and_is_repeatable():
    images = np.random.default_rng(1).uniform(size=(3, 8, 6))
    found = elastic_deform(images, generator=np.random.default_rng(5))
    noise = np.random.default_rng(5).uniform(-1, 1, (3, 2, 8, 6))
    np.testing.assert_array_equal(found, elastic_deform(images, noise))
    down = np.zeros((1, 2, 4, 4))
    down[:, 0] = 1
    image = np.arange(16.0).reshape(1, 4, 4)
    moved = elastic_deform(image, down, sigma=0, alpha=1)[0]
    np.testing.assert_array_equal(moved, [*image[0, 1:], np.zeros(4)])
    assert elastic_deform(images.astype(np.float32)).dtype == np.float32
    assert elastic_deform((images * 255).astype(np.uint8)).dtype == np.float64


def test_channels_of_an_image_move_alike_and_images_do_not():
    torch.manual_seed(0)
    grey = torch.rand(1, 1, 10, 10)
    found = ElasticDeformation(2.0, 8.0)(grey.expand(2, 3, -1, -1))
    assert torch.equal(found[:, 0], found[:, 2])
    assert not torch.equal(found[0], found[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert ElasticDeformation()(grey).dtype == torch.float32


@pytest.mark.bad_input
def test_bad_deformations_are_refused():
    with pytest.raises(ValueError, match=r"images: found shape \(2, 2\)"):
        elastic_deform(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"noise: found shape \(1, 1, 2, 2\), needed \(1, 2, 2, 2\)"):
        elastic_deform(np.ones((1, 2, 2)), np.ones((1, 1, 2, 2)))
    with pytest.raises(ValueError, match="sigma: found -1"):
        elastic_deform(np.ones((1, 2, 2)), sigma=-1)
    with pytest.raises(ValueError, match="alpha: found nan"):
        ElasticDeformation(alpha=float("nan"))


# -- network


@given(st.integers(1, 33), st.integers(1, 33))
@settings(max_examples=25, deadline=None)
def test_any_size_halves_upwards_and_comes_back(height, width):
    net = PrototypeAutoencoder((height, width), 2, 3, 4, (2, 3, 2), 5)
    h, w = -(-height // 16), -(-width // 16)
    assert net.prototypes.shape == (4, 5 * h * w)
    out = net(torch.rand(2, 2, height, width))
    assert out.reconstruction.shape == (2, 2, height, width)
    assert out.latents.shape == (2, 5 * h * w)


@pytest.mark.parametrize("size", [1, 4, 7, 14, 28])
def test_decoder_layers_are_the_adjoint_of_the_encoders(size):
    torch.manual_seed(size)
    net = PrototypeAutoencoder(size, 2, 2, 1, (), 3, conv_std=None).double()
    convolution, transposed = net.encoder_convs[0], net.decoder_convs[0]
    with torch.no_grad():
        transposed.weight.copy_(convolution.weight)
        convolution.bias.fill_(50.0)  # keeps the ReLU open
        transposed.bias.zero_()
    x = torch.rand(1, 2, size, size, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, net.latent_dim, dtype=torch.float64)
    adjoint = torch.autograd.grad((net.encode(x) * y).sum(), x)[0]
    torch.testing.assert_close(torch.logit(net.decode(y)), adjoint)


def test_start_is_the_authors():
    torch.manual_seed(0)
    net = PrototypeAutoencoder()
    weights = torch.cat([layer.weight.flatten() for layer in (*net.encoder_convs, *net.decoder_convs)])
    assert float(weights.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert all(not layer.bias.any() for layer in (*net.encoder_convs, *net.decoder_convs))
    for values in (net.prototypes, net.classifier.weight):
        assert 0 <= float(values.detach().min()) < 0.1 < 0.9 < float(values.detach().max()) < 1
    assert float(PrototypeAutoencoder(conv_std=None).encoder_convs[1].weight.detach().std()) > 0.02


def test_half_precision_distances_are_computed_in_full():
    torch.manual_seed(0)
    net = PrototypeAutoencoder(8, conv_std=None)
    x = torch.rand(3, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        assert out.latents.dtype == torch.bfloat16
        for value in (out.distances, out.logits, out.reconstruction):
            assert value.dtype == torch.float32
    near(out.distances, squared_distances(out.latents.float(), net.prototypes).detach(), rtol=1e-6)
    near(out.logits, (out.distances @ net.classifier.weight.T).detach(), rtol=1e-6)
    half = net.bfloat16()(x.bfloat16())
    assert half.logits.dtype == torch.float32


def test_dead_latents_give_equal_distances():
    net = PrototypeAutoencoder(8)
    with torch.no_grad():
        net.encoder_convs[3].bias.fill_(-100)
    out = net(torch.rand(4, 1, 8, 8))
    near(out.distances, net.prototypes.square().sum(1).expand(4, -1).detach(), rtol=1e-5)


@pytest.mark.bad_input
def test_bad_input_of_the_network_is_refused():
    net = PrototypeAutoencoder(8)
    for shape in ((2, 1, 8, 9), (2, 3, 8, 8), (1, 8, 8)):
        with pytest.raises(ValueError, match=r"needed \[N, 1, 8, 8\]"):
            net(torch.rand(shape))
    with pytest.raises(ValueError, match=r"latents: found shape \(2, 11\), needed \[N, 10\]"):
        net.decode(torch.rand(2, 11))
    for name in ("image_size", "in_channels", "num_classes", "num_prototypes", "latent_channels"):
        with pytest.raises(ValueError, match=f"{name}: found 0, needed 1 or more"):
            PrototypeAutoencoder(**{name: 0})
    with pytest.raises(ValueError, match="hidden_channels: found 0"):
        PrototypeAutoencoder(hidden_channels=(3, 0))
    with pytest.raises(ValueError, match="conv_std: found 0"):
        PrototypeAutoencoder(conv_std=0)
    with pytest.raises(ValueError, match="keep: found 'first'"):
        CaseBasedModule(keep="first")


# -- loss


def inputs(n, m=3, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    images, other = torch.rand(2, n, 1, 4, 4, generator=g)
    targets = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, classes, generator=g), targets, images, other, 9 * torch.rand(n, m, generator=g)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_terms_by_loops(n, m, seed):
    logits, targets, reconstruction, x, distances = inputs(n, m, seed=seed)
    terms = CaseBasedLoss().terms(logits, targets, reconstruction, x, distances)
    d, rows = distances.numpy(), range(n)
    near(terms["class"], np.mean([-float(logits[i].log_softmax(0)[targets[i]]) for i in rows]))
    near(terms["reconstruction"], np.mean([float((reconstruction[i] - x[i]).square().sum()) for i in rows]))
    near(terms["prototype"], np.mean([min(d[i, j] for i in rows) for j in range(m)]))
    near(terms["feature"], np.mean([min(d[i]) for i in rows]))


def test_one_sample_no_sample_ties_and_weights():
    logits, targets, reconstruction, x, distances = inputs(1)
    near(CaseBasedLoss().terms(logits, targets, reconstruction, x, distances)["prototype"], distances.mean())
    none = inputs(0)
    loss = CaseBasedLoss()(none[0].requires_grad_(), *none[1:])
    assert float(loss.detach()) == 0
    loss.backward()
    tied = torch.ones(2, 2, requires_grad=True)
    CaseBasedLoss(0, 0, 1, 0)(*inputs(2)[:4], tied).backward()
    assert float(tied.grad.sum()) == pytest.approx(1)
    everything = inputs(5)
    terms = CaseBasedLoss().terms(*everything)
    expected = 20 * terms["class"] + terms["reconstruction"] + terms["prototype"] + terms["feature"]
    near(CaseBasedLoss()(*everything), expected)
    half = CaseBasedLoss()(*(value.bfloat16() if value.is_floating_point() else value for value in everything))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8])
def test_targets_may_be_integers_of_any_width(kind):
    logits, targets, *others = inputs(5)
    assert torch.equal(CaseBasedLoss()(logits, targets.to(kind), *others), CaseBasedLoss()(logits, targets, *others))


@pytest.mark.bad_input
def test_bad_input_of_the_loss_is_refused():
    logits, targets, reconstruction, x, distances = inputs(3)
    loss = CaseBasedLoss()
    with pytest.raises(ValueError, match="targets: found 4, needed classes 0 to 3"):
        loss(logits, torch.tensor([0, 1, 4]), reconstruction, x, distances)
    with pytest.raises(ValueError, match="targets: found -1"):
        loss(logits, torch.tensor([0, -1, 3]), reconstruction, x, distances)
    with pytest.raises(ValueError, match=r"reconstruction, inputs: found shapes \(3, 1, 4, 3\)"):
        loss(logits, targets, reconstruction[..., :3], x, distances)
    with pytest.raises(ValueError, match=r"distances, inputs: .* needed 3 rows"):
        loss(logits, targets, reconstruction, x, distances[:2])
    with pytest.raises(ValueError, match="with m at least 1"):
        loss(logits, targets, reconstruction, x, distances[:, :0])
    for name in ("class", "reconstruction", "prototype", "feature"):
        with pytest.raises(ValueError, match=rf"lambda_{name}: found -0\.1"):
            CaseBasedLoss(**{f"lambda_{name}": -0.1})


# -- the system


def module(**changed):
    torch.manual_seed(0)
    settings = {"image_size": 8, "num_prototypes": 12, "conv_std": None, "elastic_alpha": 0.0, "epochs": 2}
    return CaseBasedModule(**settings | {"class_names": list("0123456789")} | changed)


def test_defaults_are_the_authors():
    net = CaseBasedModule()
    optimizer = net.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.002
    assert net.loss.weights == {"class": 20.0, "reconstruction": 1.0, "prototype": 1.0, "feature": 1.0}
    assert (net.deformation.sigma, net.deformation.alpha) == (4.0, 20.0)
    assert net.network.prototypes.shape == (15, 40)
    assert net.stages == [Stage("training", ("*",), 1500, 0.002, monitor=None, patience=None)]
    assert CaseBasedModule(keep="best").stages[0].monitor == "val/accuracy"


def test_training_deforms_and_reconstructs_what_it_deformed():
    batch = ImageBatch(torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6), torch.arange(6), torch.ones(6).bool())
    net = module(elastic_alpha=20.0)
    torch.manual_seed(3)
    found = net.training_step(batch, 0)
    torch.manual_seed(3)
    moved = net.deformation(net.pixels(batch.image))
    assert not torch.equal(moved, net.pixels(batch.image))
    out = net.network(moved)
    near(found, net.loss(out.logits, batch.target, out.reconstruction, moved, out.distances).detach())
    plain = module()
    out = plain(batch.image)
    expected = plain.loss(out.logits, batch.target, out.reconstruction, (batch.image + 1) / 2, out.distances)
    near(plain.training_step(batch, 0), expected.detach())
    twice = ImageBatch(batch.image[:, None].expand(-1, 2, -1, -1, -1), *batch[1:])
    near(plain.training_step(twice, 0), expected.detach())


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 20.0])
def test_training_in_other_precisions(kind, alpha):
    image = torch.rand(1, 1, 8, 8).to(kind)
    batch = ImageBatch(image, torch.tensor([3]), torch.tensor([0]), torch.ones(1).bool())
    net = module(elastic_alpha=alpha).to(kind)
    loss = net.training_step(batch, 0)
    loss.backward()
    assert loss.dtype == torch.promote_types(kind, torch.float32)
    assert all(p.grad.isfinite().all() for p in net.network.parameters())
    assert net.deformation(image).dtype == loss.dtype


def test_pixels_undo_the_normalisation():
    x = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    shown = [t.reshape(3, 1, 1) for t in (torch.tensor(mean), torch.tensor(std))]
    near(Pixels(3, mean, std)((x - shown[0]) / shown[1]), x, atol=1e-6)
    near(Pixels(3)(torch.zeros(1, 3, 1, 1)).flatten(), [0.485, 0.456, 0.406], rtol=1e-6)
    for bad, message in (({"mean": (0.5,)}, "mean: found 1 values for 3"), ({"std": (1.0, 1.0, 0.0)}, "std: found")):
        with pytest.raises(ValueError, match=message):
            Pixels(3, **bad)


def test_training_and_report(tmp_path):
    data = Digits(image_size=8, batch_size=64)
    net = module(epochs=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[Curriculum()],
    )
    trainer.fit(net, datamodule=data)
    again = CaseBasedModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    names = [data.record_ids[int(row)] for row in data.test_set.rows[:2]]
    images = torch.stack([data.model_input(name) for name in names])
    out = again(images)
    weight = again.network.classifier.weight.detach()
    for n, (found,) in enumerate(again.explain(images, names)):
        assert found.label == again.class_names[int(out.logits[n].argmax())]
        assert found.total == pytest.approx(float(out.logits[n].max()), abs=1e-3)
        assert found.probability == pytest.approx(float(out.logits[n].softmax(0).max()), abs=1e-5)
        assert sorted(item.prototype for item in found.evidence) == list(range(12))
        for item in found.evidence:
            assert item.similarity == pytest.approx(float(out.distances[n, item.prototype]), rel=1e-4)
            assert item.classes == (str(int(weight[:, item.prototype].argmin())),)
    both = again.explain(images[:1], names[:1], labels=["3", "7"])[0]
    assert {found.label for found in both} == {"3", "7"}
    with pytest.raises(ValueError, match=r"does not know \['x'\]"):
        again.explain(images, names, ["x"])
    html = again.explain_images(data, names, top=2, source="final.ckpt")
    assert html.count("<article") == 2
    assert "<script" not in html
    assert "distance × weight" in html
    assert "never projected" not in html
    assert html.count('alt="prototype') >= 2 * 12
    assert "Reconstruction error" in html


def test_stage_trains_everything():
    net = module()
    enter_stage(net, net.stages[0])
    x = torch.rand(20, 1, 8, 8)
    batch = ImageBatch(x, torch.arange(20) % 10, torch.arange(20), torch.ones(20).bool())
    net.training_step(batch, 0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    said = net.predict_step(batch, 0)
    near(said["probabilities"], F.softmax(net(x).logits, 1).detach())
