"""Prob-PSENN: the authors' values of network, loss and uncertainties, edge cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde
from torch import nn

from proto_core import metrics, prototypes
from proto_vision import ProbPSENN, prob_psenn
from proto_vision.prob_psenn import (
    ProbPSENNLoss,
    aleatoric_uncertainty,
    cnn32_autoencoder,
    epistemic_uncertainty,
    explanatory_epistemic_uncertainty,
    overlap_index,
    predictive_entropy,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "prob_psenn.npz")


def near(found, expected, **tolerance):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, **(tolerance or EXACT))


def arrays_of(golden, prefix):
    keys = [key for key in golden.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(np.asarray(golden[key])) for key in keys}


def filled(a, covariance):
    """The network of a golden case around the identity: its inputs are latent vectors."""
    classes, dim = a["loc"].shape
    net = ProbPSENN(nn.Identity(), nn.Identity(), classes, dim, covariance).double()
    net.prototypes.set_parameters(a["loc"], a["scale_tril"])
    with torch.no_grad():
        net.classifier.weight.copy_(a["classifier_weight"])
    return net


@pytest.mark.parametrize(("case", "covariance"), [("a_", "full"), ("b_", "diag"), ("c_", "full")])
def test_network_and_loss_equal_the_authors_code(golden, case, covariance):
    a = arrays_of(golden, case)
    net = filled(a, covariance)
    z, targets = a["z"].clone().requires_grad_(), a["targets"]
    out = net(z, noise=a["noise"])
    near(net.sample(noise=a["noise"]), a["samples"])
    for name in ("logits", "distances", "log_prob"):
        near(getattr(out, name), a[name])
    probabilities = out.logits.softmax(2)
    near(probabilities, a["probabilities"])
    near(net.predict_proba(z, noise=a["noise"]), a["mean_probabilities"])
    near(net.predict_mode(z), (-a["mode_distances"] @ -a["classifier_weight"].T).softmax(1))
    near(net.prototypes.kl_to_prior(prior_std=1.5), a["kl_to_prior"])
    near(net.prototypes.entropy(), a["entropy"])
    near(predictive_entropy(probabilities), a["predictive_entropy"])
    near(aleatoric_uncertainty(probabilities), a["aleatoric"])
    near(epistemic_uncertainty(probabilities), a["epistemic"])
    loss, drawn = ProbPSENNLoss(*a["lambdas"].tolist()), a["reconstruction"].clone().requires_grad_()
    arguments = (out.logits, targets, drawn, a["inputs"], out.log_prob)
    for name, value in loss.terms(*arguments).items():
        near(value, a[f"loss_{name}"])
    total = loss(*arguments)
    near(total, a["total"])
    wanted = {
        "z": z,
        "loc": net.prototypes.loc,
        "classifier_weight": net.classifier.weight,
        "reconstruction": drawn,
    }
    for name, found in zip(wanted, torch.autograd.grad(total, list(wanted.values()), retain_graph=True)):
        near(found, a[f"grad_{name}"], rtol=1e-7, atol=1e-9 * max(1, float(a[f"grad_{name}"].abs().max())))
    # the gradient to L reaches the raw numbers by the chain rule of softplus on the diagonal
    raw = torch.autograd.grad(total, net.prototypes.raw_scale)[0]
    grad, scale = a["grad_scale_tril"], net.prototypes.scale_tril.detach()
    slope = 1 - (-(scale.diagonal(dim1=1, dim2=2) - (1e-5 if covariance == "full" else 0))).exp()
    diagonal = grad.diagonal(dim1=1, dim2=2) * slope
    expected = diagonal if covariance == "diag" else grad.tril(-1) + torch.diag_embed(diagonal)
    near(raw, expected, rtol=1e-6, atol=1e-8 * max(1, float(expected.abs().max())))


def test_density_gradients_and_fit_equal_the_reference(golden):
    for case in ("a_", "b_", "c_"):
        a = arrays_of(golden, case)
        inputs = [a[name].clone().requires_grad_() for name in ("z", "loc", "scale_tril")]
        found = torch.autograd.grad(prob_psenn.gaussian_log_prob(*inputs).sum(), inputs)
        for value, name in zip(found, ("z", "loc", "scale_tril")):
            expected = a[f"log_prob_grad_{name}"]
            near(value, expected, rtol=1e-7, atol=1e-9 * max(1, float(expected.abs().max())))
        near(prob_psenn.sampled_distances(a["z"], a["loc"].unsqueeze(0)).squeeze(2), a["mode_distances"])
    a = arrays_of(golden, "fit_")
    full = prob_psenn.GaussianPrototypes(3, 3).double().fit(a["z"], a["targets"])
    near(full.loc, a["loc"])
    near(full.scale_tril, a["scale_tril"])
    diagonal = prob_psenn.GaussianPrototypes(3, 3, "diag").double().fit(a["z"], a["targets"])
    near(diagonal.scale_tril.diagonal(dim1=1, dim2=2), a["std"])


def test_uncertainties_of_explanations_equal_the_authors_code(golden):
    a = arrays_of(golden, "overlap_")
    found = overlap_index(a["distances"], a["predicted"], int(a["num_points"]))
    near(found, a["index"], rtol=1e-6, atol=1e-9)
    a = arrays_of(golden, "expl_")
    near(explanatory_epistemic_uncertainty(list(a["train"]), a["mean_distances"]), a["distance"])
    near(
        explanatory_epistemic_uncertainty(list(a["train"]), a["mean_distances"], "class", a["class_probabilities"]),
        a["class"],
    )


def test_names_of_the_core_are_the_cores():
    for name in ("GaussianPrototypes", "gaussian_log_prob", "sample_gaussian", "sampled_distances"):
        assert getattr(prob_psenn, name) is getattr(prototypes, name)
    for name in ("predictive_entropy", "aleatoric_uncertainty", "epistemic_uncertainty"):
        assert getattr(prob_psenn, name) is getattr(metrics, name)


# -- network


def test_samples_are_shared_and_predictions_average_probabilities():
    torch.manual_seed(0)
    net = ProbPSENN(nn.Identity(), nn.Identity(), 3, 2, num_samples=7)
    z = torch.randn(1, 2).expand(4, -1)
    out = net(z)
    assert out.logits.shape == (4, 7, 3)
    assert torch.equal(out.distances[0], out.distances[3])
    assert net(z, 2).distances.shape == (4, 3, 2)
    noise = torch.randn(5, 3, 2)
    near(net.predict_proba(z, noise=noise), net(z, noise=noise).logits.softmax(2).mean(1).detach(), rtol=1e-6)
    near(net.predict_proba(z).sum(1), np.ones(4), rtol=1e-6)
    single = net(z, 1).logits.softmax(2)
    near(epistemic_uncertainty(single), np.zeros(4), atol=1e-6)


def test_classifier_starts_at_minus_half():
    torch.manual_seed(0)
    weight = ProbPSENN(nn.Identity(), nn.Identity(), 4, 2).classifier.weight.detach()
    near(weight, -0.5 * np.eye(4), atol=1e-7)
    assert weight[0, 1] != 0
    assert ProbPSENN(nn.Identity(), nn.Identity(), 4, 2).classifier.bias is None


def test_gradient_reaches_mean_and_scale_through_samples():
    torch.manual_seed(0)
    net = ProbPSENN(nn.Identity(), nn.Identity(), 3, 2)
    net(torch.randn(5, 2)).logits.log_softmax(2)[:, :, 0].mean().backward()
    for parameter in net.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_half_precision_is_computed_in_full():
    torch.manual_seed(0)
    net = ProbPSENN(nn.Linear(4, 2), nn.Linear(2, 4), 3, 2)
    x, noise = torch.randn(5, 4), torch.randn(6, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, noise=noise)
        assert out.latents.dtype == torch.bfloat16
        for value in (out.logits, out.distances, out.log_prob):
            assert value.dtype == torch.float32
    near(out.logits, net.decide(out.latents.float(), net.sample(noise=noise))[0].detach(), rtol=1e-5)


@pytest.mark.bad_input
def test_bad_input_of_the_network_is_refused():
    net = ProbPSENN(nn.Identity(), nn.Identity(), 3, 2)
    with pytest.raises(ValueError, match=r"noise: found shape \(5, 3, 3\), needed \[S, 3, 2\]"):
        net(torch.rand(4, 2), noise=torch.rand(5, 3, 3))
    with pytest.raises(ValueError, match=r"encoder: found latents of shape \(4, 3\), needed \[N, 2\]"):
        net(torch.rand(4, 3))
    with pytest.raises(ValueError, match="noise: found 5 samples, needed num_samples = 4"):
        net(torch.rand(4, 2), 4, torch.rand(5, 3, 2))
    with pytest.raises(ValueError, match="covariance: found 'half'"):
        ProbPSENN(nn.Identity(), nn.Identity(), 3, 2, "half")
    with pytest.raises(ValueError, match="num_samples: found 0"):
        ProbPSENN(nn.Identity(), nn.Identity(), 3, 2, num_samples=0)
    with pytest.raises(ValueError, match="scale_tril: found 0"):
        net.prototypes.set_parameters(torch.zeros(3, 2), torch.zeros(3, 2, 2))


def test_autoencoder_is_the_cards():
    encoder, decoder = cnn32_autoencoder(3, 40, (64, 128, 256, 512))
    assert [type(layer).__name__ for layer in encoder] == [
        *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 4,
        "Conv2d",
        "Flatten",
    ]
    names = [type(layer).__name__ for layer in decoder]
    first, later = ["Conv2d", "BatchNorm2d", "LeakyReLU"], ["ConvTranspose2d", "BatchNorm2d", "LeakyReLU"]
    assert names == ["Unflatten", *first, *later * 3, "ConvTranspose2d", "Tanh"]
    for layer in (*encoder, *decoder):
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.eps, layer.momentum) == (1e-3, 0.01)
        if isinstance(layer, nn.LeakyReLU):
            assert layer.negative_slope == 0.2
    assert [layer.out_channels for layer in encoder if isinstance(layer, nn.Conv2d)] == [64, 128, 256, 512, 40]
    codes = encoder(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 40)
    assert decoder(codes).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="needed sizes of 1 or more, and four widths"):
        cnn32_autoencoder(widths=(4, 4, 4))


# -- loss


def inputs(n, s=3, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    images, other = torch.rand(2, n, 1, 4, 4, generator=g)
    targets = torch.randint(classes, (n,), generator=g)
    log_prob = 6 * torch.randn(n, classes, generator=g) - 3
    return torch.randn(n, s, classes, generator=g), targets, images, other, log_prob


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_terms_by_loops(n, s, seed):
    logits, targets, reconstruction, x, log_prob = inputs(n, s, seed=seed)
    terms = ProbPSENNLoss().terms(logits, targets, reconstruction, x, log_prob)
    rows, y = range(n), targets.tolist()
    said = [float(logits[i, k].log_softmax(0)[y[i]]) for i in rows for k in range(s)]
    near(terms["nll"], -np.mean(said), rtol=1e-5)
    near(terms["reconstruction"], float((reconstruction - x).square().mean()), rtol=1e-5)
    near(
        terms["prototype"], np.mean([min(-float(log_prob[i, c]) for i in rows) for c in range(4)]), rtol=1e-5, atol=1e-6
    )
    near(terms["data"], np.mean([min(max(-float(log_prob[i, y[i]]), -1), 10_000) for i in rows]), rtol=1e-5, atol=1e-6)


def test_clamps_stop_the_gradient_and_nothing_gives_nothing():
    log_prob = torch.tensor([[5.0, 0.0], [-20_000.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    arguments = (torch.zeros(3, 2, 2), torch.zeros(3).long(), torch.zeros(3, 1), torch.zeros(3, 1))
    data = ProbPSENNLoss().terms(*arguments, log_prob)["data"]
    assert float(data.detach()) == pytest.approx((-1 + 10_000 + 3) / 3)
    data.backward()
    near(log_prob.grad, [[0, 0], [0, 0], [-1 / 3, 0]], rtol=1e-6)
    none = inputs(0)
    loss = ProbPSENNLoss(1, 1, 1, 1)(none[0].requires_grad_(), *none[1:])
    assert float(loss.detach()) == 0
    loss.backward()
    everything = inputs(5)
    terms = ProbPSENNLoss().terms(*everything)
    near(ProbPSENNLoss()(*everything), terms["nll"] + 10 * terms["reconstruction"] + 0.05 * terms["data"], rtol=1e-6)
    half = ProbPSENNLoss()(*(value.bfloat16() if value.is_floating_point() else value for value in everything))
    assert half.dtype == torch.float32


@pytest.mark.bad_input
def test_bad_input_of_the_loss_is_refused():
    logits, targets, reconstruction, x, log_prob = inputs(3)
    loss = ProbPSENNLoss()
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=f"targets: found {wrong}, needed classes 0 to 3"):
            loss(logits, torch.tensor([0, 1, wrong]), reconstruction, x, log_prob)
    with pytest.raises(ValueError, match=r"log_prob: found shape \(3, 3\), needed \(3, 4\)"):
        loss(logits, targets, reconstruction, x, log_prob[:, :3])
    with pytest.raises(ValueError, match="reconstruction, inputs"):
        loss(logits, targets, reconstruction[:, :, :3], x, log_prob)
    with pytest.raises(ValueError, match=r"logits: found shape \(3, 4\)"):
        loss(logits[:, 0], targets, reconstruction, x, log_prob)
    for name in ("nll", "reconstruction", "prototype", "data"):
        with pytest.raises(ValueError, match=f"lambda_{name}: found -1"):
            ProbPSENNLoss(**{f"lambda_{name}": -1})


# -- uncertainty of explanations


@given(st.integers(1, 4), st.integers(2, 4), st.integers(2, 20), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_overlap_by_scipys_density(n, classes, samples, seed):
    rng = np.random.default_rng(seed)
    distances = rng.gamma(3, 2, (n, classes, samples)) + rng.uniform(0, 15, (n, classes, 1))
    predicted = rng.integers(classes, size=n)
    found = overlap_index(torch.from_numpy(distances), torch.from_numpy(predicted), 200, 4.0, 3.0)
    for row, p, value in zip(distances, predicted, found.tolist()):
        overlaps = []
        for j in set(range(classes)) - {int(p)}:
            edges = np.linspace(-3, row[j].max() + 4, 201)
            middle = (edges[1:] + edges[:-1]) / 2
            lower = np.minimum(gaussian_kde(row[j])(middle), gaussian_kde(row[p])(middle))
            overlaps.append(lower.sum() * (edges[1] - edges[0]))
        assert value == pytest.approx(max(overlaps), rel=1e-6, abs=1e-12)


def test_overlap_does_not_depend_on_how_many_rows_go_at_once(monkeypatch):
    distances, predicted = torch.rand(9, 3, 6).double(), torch.arange(9) % 3
    whole = overlap_index(distances, predicted, 50)
    monkeypatch.setitem(prob_psenn.uncertainty.CACHED, "cpu", 1)
    near(overlap_index(distances, predicted, 50), whole)
    assert overlap_index(distances[:0], predicted[:0]).shape == (0,)


def test_collapsed_distances_overlap_with_nothing():
    distances = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.5]]]).expand(2, -1, -1)
    with pytest.warns(UserWarning, match="all of a class are equal"):
        found = overlap_index(distances, torch.tensor([0, 1]))
    assert float(found[0]) == 0
    assert float(found[1]) > 0.8


@pytest.mark.bad_input
def test_bad_input_of_the_uncertainties_is_refused():
    distances = torch.rand(2, 3, 5)
    with pytest.raises(ValueError, match="with S at least 2"):
        overlap_index(distances[..., :1], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"predicted: found classes \[0, 3\], needed 0 to 2"):
        overlap_index(distances, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="needed 2 integers"):
        overlap_index(distances, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="num_points: found 0"):
        overlap_index(distances, torch.tensor([0, 1]), 0)
    known, means = [torch.ones(2)] * 3, torch.rand(4, 3)
    with pytest.raises(ValueError, match="reference: found 'mean'"):
        explanatory_epistemic_uncertainty(known, means, "mean")
    with pytest.raises(ValueError, match="class_probabilities: found none"):
        explanatory_epistemic_uncertainty(known, means, "class")
    with pytest.raises(ValueError, match=r"class_probabilities: found shape \(4, 2\)"):
        explanatory_epistemic_uncertainty(known, means, "class", means[:, :2])
    with pytest.raises(ValueError, match="found none of class 1"):
        explanatory_epistemic_uncertainty([torch.ones(2), torch.ones(0), torch.ones(1)], means)
    with pytest.raises(ValueError, match=r"found \(4, 3\) and 2 classes"):
        explanatory_epistemic_uncertainty(known[:2], means)


def test_equal_training_distances_do_not_count_and_arrays_are_taken():
    known = [np.array([2.0, 2.0, 1.0, 3.0]), np.array([9.0])]
    near(explanatory_epistemic_uncertainty(known, torch.tensor([[2.0, 8.0], [9.0, 0.1]])), [0.25, 0])
