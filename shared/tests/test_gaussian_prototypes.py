"""Gaussian prototypes: the core's arrays of prob_psenn.npz and gpam.npz, torch's distributions, fits, edges."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from proto_core.metrics import aleatoric_uncertainty, epistemic_uncertainty, predictive_entropy
from proto_core.prototypes import GaussianPrototypes, gaussian_log_prob, sample_gaussian, sampled_distances

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "prob_psenn.npz")


@pytest.mark.parametrize("case", ["a", "b", "c"])
class TestGolden:
    def layer(self, golden, case):
        loc, scale = (torch.from_numpy(golden[f"{case}_{name}"]) for name in ("loc", "scale_tril"))
        layer = GaussianPrototypes(len(loc), loc.shape[1], "diag" if case == "b" else "full", prior_std=1.5).double()
        layer.set_parameters(loc, scale)
        torch.testing.assert_close(layer.scale_tril, scale, rtol=1e-12, atol=1e-12)
        return layer

    def value(self, golden, case, name):
        return torch.from_numpy(np.asarray(golden[f"{case}_{name}"]))

    def test_samples_distances_density(self, golden, case):
        layer = self.layer(golden, case)
        z, noise = self.value(golden, case, "z"), self.value(golden, case, "noise")
        found = {
            "samples": layer.sample(len(noise), noise),
            "distances": layer.distances(z, len(noise), noise),
            "mode_distances": sampled_distances(z, layer.mode().unsqueeze(0)).squeeze(-1),
            "log_prob": layer.log_prob(z),
            "kl_to_prior": layer.kl_to_prior(),
            "entropy": layer.entropy(),
        }
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.detach(), self.value(golden, case, name), **EXACT, msg=name)
        torch.testing.assert_close(layer.kl_to_prior(), layer.kl_to_prior(0.0, 1.5))

    def test_density_gradients(self, golden, case):
        inputs = [self.value(golden, case, name).clone().requires_grad_() for name in ("z", "loc", "scale_tril")]
        gradients = torch.autograd.grad(gaussian_log_prob(*inputs).sum(), inputs)
        for gradient, name in zip(gradients, ("z", "loc", "scale_tril")):
            expected = self.value(golden, case, f"log_prob_grad_{name}")
            torch.testing.assert_close(
                gradient, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max().clamp_min(1))
            )

    def test_whole_objective(self, golden, case):
        """The loss of the card from the core's functions: its parts and the gradients through samples and densities."""
        z, loc, scale, weight = (
            self.value(golden, case, name).clone().requires_grad_()
            for name in ("z", "loc", "scale_tril", "classifier_weight")
        )
        reconstruction = self.value(golden, case, "reconstruction").clone().requires_grad_()
        targets, lambdas = self.value(golden, case, "targets"), golden[f"{case}_lambdas"]
        distances = sampled_distances(z, sample_gaussian(loc, scale, self.value(golden, case, "noise")))
        logits = torch.einsum("cp,nps->nsc", weight, distances)
        torch.testing.assert_close(logits.detach(), self.value(golden, case, "logits"), **EXACT)
        probabilities = logits.softmax(-1)
        torch.testing.assert_close(probabilities.detach(), self.value(golden, case, "probabilities"), **EXACT)
        torch.testing.assert_close(
            probabilities.mean(1).detach(), self.value(golden, case, "mean_probabilities"), **EXACT
        )
        log_prob = gaussian_log_prob(z, loc, scale)
        rows = torch.arange(len(z))
        parts = {
            "nll": -logits.log_softmax(-1)[rows, :, targets].mean(),
            "reconstruction": (self.value(golden, case, "inputs") - reconstruction).square().mean(),
            "prototype": (-log_prob).amin(dim=0).mean(),
            "data": (-log_prob[rows, targets]).clamp(-1, 10_000).mean(),
        }
        for name, part in parts.items():
            torch.testing.assert_close(part.detach(), self.value(golden, case, f"loss_{name}"), **EXACT, msg=name)
        total = sum(float(factor) * part for factor, part in zip(lambdas, parts.values()))
        torch.testing.assert_close(total.detach(), self.value(golden, case, "total"), **EXACT)
        inputs = {
            "z": z,
            "loc": loc,
            "scale_tril": scale,
            "classifier_weight": weight,
            "reconstruction": reconstruction,
        }
        for name, gradient in zip(inputs, torch.autograd.grad(total, list(inputs.values()))):
            expected = self.value(golden, case, f"grad_{name}")
            size = float(expected.abs().max().clamp_min(1))
            torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9 * size, msg=name)

    def test_uncertainty(self, golden, case):
        probabilities = self.value(golden, case, "probabilities")
        for function, name in [
            (predictive_entropy, "predictive_entropy"),
            (aleatoric_uncertainty, "aleatoric"),
            (epistemic_uncertainty, "epistemic"),
        ]:
            torch.testing.assert_close(function(probabilities), self.value(golden, case, name), **EXACT)


def test_fit_equals_the_reference(golden):
    z, targets = torch.from_numpy(golden["fit_z"]), torch.from_numpy(golden["fit_targets"])
    full = GaussianPrototypes(3, 3).double().fit(z, targets)
    np.testing.assert_allclose(full.loc.detach(), golden["fit_loc"], **EXACT)
    np.testing.assert_allclose(full.scale_tril.detach(), golden["fit_scale_tril"], **EXACT)
    diagonal = GaussianPrototypes(3, 3, "diag").double().fit(z, targets)
    found = diagonal.scale_tril.detach().diagonal(dim1=1, dim2=2)
    np.testing.assert_allclose(found, golden["fit_std"], **EXACT)


@pytest.mark.parametrize("case", ["a", "b"])
def test_gpam_distance_is_the_density_of_a_diagonal(golden_dir, case):
    """log_prob = -D distance - D/2 log(2 pi), with the arrays of gpam.npz, episode by episode."""
    arrays = np.load(golden_dir / "gpam.npz")
    loc, var, query = (torch.from_numpy(arrays[f"{case}_{name}"]) for name in ("loc", "var", "query"))
    for b in range(len(loc)):
        dim = loc.shape[2]
        layer = GaussianPrototypes(loc.shape[1], dim, "diag").double()
        layer.set_parameters(loc[b], torch.diag_embed(var[b].sqrt()))
        distance = -(layer.log_prob(query[b]) + dim / 2 * math.log(2 * math.pi)) / dim
        np.testing.assert_allclose(distance.detach(), arrays[f"{case}_distance"][b], rtol=1e-9, atol=1e-9)


def test_agrees_with_torch_distributions():
    torch.manual_seed(0)
    layer = GaussianPrototypes(4, 5, prior_std=0.7).double()
    z = torch.randn(6, 5, dtype=torch.float64)
    peer = MultivariateNormal(layer.loc, scale_tril=layer.scale_tril)
    torch.testing.assert_close(layer(z), peer.log_prob(z.unsqueeze(1)))
    torch.testing.assert_close(layer.entropy(), peer.entropy())
    prior = MultivariateNormal(torch.full((5,), 0.3).double(), scale_tril=2 * torch.eye(5).double())
    torch.testing.assert_close(layer.kl_to_prior(0.3, 2.0), kl_divergence(peer, prior))
    diagonal = GaussianPrototypes(4, 5, "diag").double()
    expected = Normal(diagonal.loc, diagonal.scale_tril.diagonal(dim1=1, dim2=2)).log_prob(z.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(diagonal(z), expected)


def test_samples_have_the_moments_and_are_shared_by_the_batch():
    torch.manual_seed(1)
    layer = GaussianPrototypes(2, 3).double()
    drawn = layer.sample(40_000)
    torch.testing.assert_close(drawn.mean(0), layer.loc, atol=0.05, rtol=0)
    scale = layer.scale_tril
    for p in range(2):
        torch.testing.assert_close(torch.cov(drawn[:, p].T), scale[p] @ scale[p].T, atol=0.05, rtol=0.05)
    distances = layer.distances(torch.zeros(2, 3, dtype=torch.float64), 4)
    assert torch.equal(distances[0], distances[1])


def test_upper_triangle_is_not_read():
    loc, scale = torch.zeros(1, 2), torch.tensor([[[1.0, 9.0], [0.5, 1.0]]])
    clean = scale.tril()
    z, noise = torch.ones(1, 2), torch.ones(1, 1, 2)
    assert torch.equal(gaussian_log_prob(z, loc, scale), gaussian_log_prob(z, loc, clean))
    assert torch.equal(sample_gaussian(loc, scale, noise), sample_gaussian(loc, clean, noise))


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(2)
    layer = GaussianPrototypes(3, 4)
    z = torch.randn(5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(z).dtype == torch.float32
        assert layer.distances(z, 2).dtype == torch.float32
        torch.testing.assert_close(layer(z), layer(z.float()))


def test_class_identity_names_the_class_that_is_fitted():
    identity = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z, labels = torch.tensor([[0.0], [2.0], [10.0], [14.0]]).double(), torch.tensor([0, 0, 1, 1])
    layer = GaussianPrototypes(3, 1, class_identity=identity).double().fit(z, labels)
    torch.testing.assert_close(layer.loc.detach().flatten(), torch.tensor([1.0, 1.0, 12.0]).double())
    torch.testing.assert_close(layer.scale_tril.detach().flatten() ** 2, torch.tensor([2.0, 2.0, 8.0]).double())


def test_few_samples_are_made_regular_with_a_warning():
    z = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    layer = GaussianPrototypes(2, 3)
    with pytest.warns(UserWarning, match=r"prototypes \[0, 1\] have \[2, 2\] samples in 3 dimensions"):
        layer.fit(z, torch.tensor([0, 0, 1, 1]))
    assert layer(z).isfinite().all()
    one = GaussianPrototypes(1, 2, "diag")
    with pytest.warns(UserWarning, match="singular"):
        one.fit(torch.ones(1, 2), torch.tensor([0]))
    torch.testing.assert_close(one.scale_tril.diagonal(dim1=1, dim2=2), torch.full((1, 2), 1e-3), rtol=1e-4, atol=0)


def test_state_survives():
    torch.manual_seed(3)
    layer = GaussianPrototypes(3, 4, "diag", class_identity=torch.tensor([[1.0, 0], [0, 1], [0, 1]]))
    z = torch.randn(2, 4)
    again = GaussianPrototypes(3, 4, "diag", class_identity=torch.ones(3, 2))
    again.load_state_dict(layer.state_dict())
    for other in (again, copy.deepcopy(layer)):
        assert torch.equal(other(z), layer(z))
        assert torch.equal(other.class_identity, layer.class_identity)
    assert "covariance='diag'" in repr(layer)
    before = layer.loc.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.loc, before)


@pytest.mark.unchecked
def test_compiles():
    torch._dynamo.reset()
    layer = GaussianPrototypes(3, 4)
    z = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(z), layer(z))


def test_single_sample_has_no_epistemic_uncertainty():
    probs = torch.rand(4, 1, 3).softmax(-1)
    assert epistemic_uncertainty(probs).abs().max() < 1e-6
    certain = torch.eye(3)[[0, 1]].unsqueeze(1).expand(2, 5, 3)
    assert predictive_entropy(certain).abs().max() < 1e-6


@pytest.mark.bad_input
def test_bad_input_is_named():
    layer = GaussianPrototypes(2, 3)
    z, eye = torch.ones(4, 3), torch.eye(3).expand(2, 3, 3)
    for call, says in [
        (lambda: GaussianPrototypes(0, 3), "num_prototypes: found 0"),
        (lambda: GaussianPrototypes(2, 3, "tied"), "covariance: found 'tied'"),
        (lambda: GaussianPrototypes(2, 3, prior_std=0.0), "prior_std: found 0.0"),
        (lambda: GaussianPrototypes(2, 3, class_identity=torch.eye(3)), "class_identity: found 3"),
        (lambda: layer(z[:, :2]), "z: found shape"),
        (lambda: layer.distances(z[:, :2], 2), "z, samples: found shapes"),
        (lambda: layer.sample(0), "num_samples: found 0"),
        (lambda: layer.sample(2, torch.ones(3, 2, 3)), "noise: found 3 samples"),
        (lambda: layer.sample(3, torch.ones(3, 2, 2)), "noise: found shape"),
        (lambda: gaussian_log_prob(z, z[:2], -eye), "scale_tril: found -1.0"),
        (lambda: gaussian_log_prob(z, z[:1], eye), "loc, scale_tril: found shapes"),
        (lambda: layer.set_parameters(z[:2], eye[:, :2]), "loc, scale_tril: found shapes"),
        (lambda: GaussianPrototypes(2, 3, "diag").set_parameters(z[:2], eye + 1), "off the diagonal"),
        (lambda: layer.fit(z, torch.tensor([0, 0, 0, 0])), r"prototypes \[1\]"),
        (lambda: layer.fit(z, torch.tensor([0, 1, 2, 0])), "targets: found 2"),
        (lambda: layer.fit(z[:, :2], torch.tensor([0, 1, 1, 0])), "z: found 2 features"),
        (lambda: layer.kl_to_prior(0.0, 0.0), "prior_std: found 0.0"),
        (lambda: predictive_entropy(torch.ones(2, 3)), "probs: found shape"),
        (lambda: predictive_entropy(torch.ones(2, 3, 2) * 2), "outside"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
