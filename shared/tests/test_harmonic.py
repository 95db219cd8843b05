"""Harmonic loss and distance layers: every head of harmonic.npz with all its gradients, centres, PCA, emissions."""

import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from proto_core.distances import METRICS
from proto_core.emissions import track_emissions
from proto_core.layers import DistanceLayer
from proto_core.losses import HarmonicLoss, harmonic_log_probs
from proto_core.metrics import circularity, pca_concentration

HEADS = {
    "sqeuclidean": ("sq_euclidean", {}),
    "manhattan": ("manhattan", {}),
    "cosine_stable": ("cosine", {}),
    "cosine_unstable": ("cosine", {"stable": False}),
    "minkowski_p1.5": ("minkowski", {}),
    "minkowski_p3": ("minkowski", {"p": 3.0}),
    "hamming_soft": ("hamming", {}),
    "hamming_gumbel_eval": ("hamming", {"variant": "gumbel", "temperature": 0.5}),
    "hamming_hard": ("hamming", {"variant": "hard", "temperature": 0.1}),
    "chebyshev_softmax": ("chebyshev", {"variant": "softmax"}),
    "chebyshev_smooth": ("chebyshev", {"variant": "smooth"}),
    "canberra_standard": ("canberra", {}),
    "canberra_robust": ("canberra", {"variant": "robust", "min_denom": 1e-2}),
    "canberra_weighted": ("canberra", {"variant": "weighted", "weight_power": 0.5}),
    "bray_curtis_standard": ("bray_curtis", {}),
    "bray_curtis_abs": ("bray_curtis", {"variant": "abs"}),
    "bray_curtis_normalized": ("bray_curtis", {"variant": "normalized"}),
    "mahalanobis_standard": ("mahalanobis", {}),
    "mahalanobis_diagonal": ("mahalanobis", {"variant": "diagonal"}),
    "mahalanobis_cholesky": ("mahalanobis", {"variant": "cholesky"}),
}
EXACT = {"rtol": 1e-6, "atol": 1e-8}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "harmonic.npz")


@pytest.mark.parametrize("head", HEADS)
def test_head_equals_the_authors_code(golden, head):
    metric, options = HEADS[head]
    layer = DistanceLayer(5, 4, metric=metric, **options).double().eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.from_numpy(golden[name]))
    x, targets = torch.from_numpy(golden["x"]).requires_grad_(), torch.from_numpy(golden["targets"])
    distances = layer(x)
    np.testing.assert_allclose(distances.detach(), golden[f"{head}/distances"], rtol=1e-6, atol=1e-7)
    eps = 1e-3 if metric == "bray_curtis" else 1e-4
    for n, exponent in enumerate(golden["exponents"].tolist()):
        prefix = f"{head}/n{n}"
        found = harmonic_log_probs(distances, exponent, eps)
        np.testing.assert_allclose(found.detach(), golden[f"{prefix}/log_probs"], **EXACT)
        loss = HarmonicLoss(exponent, eps)(distances, targets)
        np.testing.assert_allclose(loss.detach(), golden[f"{prefix}/loss"], **EXACT)
        if head == "hamming_hard":
            continue
        names = dict(layer.named_parameters())
        gradients = torch.autograd.grad(loss, (x, *names.values()), retain_graph=True)
        for name, gradient in zip(("x", *names), gradients):
            np.testing.assert_allclose(gradient, golden[f"{prefix}/grad_{name}"], err_msg=name, **EXACT)


def test_other_distances_equal_the_reference(golden):
    x, c = torch.from_numpy(golden["x"]), torch.from_numpy(golden["centers"])
    for name, metric in (("chebyshev_max", "chebyshev"), ("euclidean", "euclidean")):
        np.testing.assert_allclose(METRICS[metric](x, c), golden[f"{name}/distances"], **EXACT)


def test_concentration_equals_the_reference(golden):
    found = pca_concentration(torch.from_numpy(golden["pca/features"]), int(golden["pca/n_components"]))
    np.testing.assert_allclose(found["cumulative"], golden["pca/cumulative"], **EXACT)
    for name in ("effective_rank", "participation_ratio", "intrinsic_dim_90", "intrinsic_dim_95"):
        np.testing.assert_allclose(found[name], golden[f"pca/{name}"], err_msg=name, **EXACT)
    reps = torch.from_numpy(golden["circle/reps"])
    np.testing.assert_allclose(circularity(reps), golden["circle/metric"], **EXACT)
    centred = reps - reps.mean(0)
    variances = torch.linalg.svdvals(centred).square() / (len(reps) - 1)
    np.testing.assert_allclose(
        variances / variances.sum(), golden["circle/variances"] / golden["circle/variances"].sum()
    )


def test_concentration_agrees_with_scikit_learn():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    peer = PCA().fit(x.double().numpy())
    found = pca_concentration(x, standardize=False)
    np.testing.assert_allclose(found["explained_variance_ratio"], peer.explained_variance_ratio_, rtol=1e-9)
    constant = torch.cat([x, torch.full((30, 1), 5.0)], dim=1)
    a, b = pca_concentration(constant), pca_concentration(x)
    torch.testing.assert_close(a["cumulative"][:6], b["cumulative"])
    few = pca_concentration(x, n_components=1, standardize=False)
    assert few["intrinsic_dim_95"] == 1
    assert few["participation_ratio"] == pytest.approx(1 / peer.explained_variance_ratio_[0] ** 2)


def test_constant_features_are_constant_whatever_their_mean_rounds_to():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tenth = torch.full((7, 1), 0.1, dtype=torch.float64)
    assert tenth.std(correction=0) > 0  # the mean of seven tenths is no tenth
    found = pca_concentration(torch.cat([x, tenth], dim=1))
    torch.testing.assert_close(found["cumulative"][:3], pca_concentration(x)["cumulative"])
    for standardize in (True, False):
        with pytest.raises(ValueError, match="no variance"):
            pca_concentration(tenth, standardize=standardize)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(0.01, 100), exponent=st.floats(0.2, 20))
def test_scaling_a_row_changes_nothing(seed, factor, exponent):
    d = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    found = harmonic_log_probs(d, exponent, eps=1e-12)
    torch.testing.assert_close(found, harmonic_log_probs(d * factor, exponent, eps=1e-12), rtol=1e-6, atol=1e-8)
    expected = d.pow(-exponent) / d.pow(-exponent).sum(1, keepdim=True)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.argmax(1), d.argmin(1))
    root = harmonic_log_probs(d.sqrt(), 2 * exponent, eps=1e-12)
    torch.testing.assert_close(found, root, rtol=1e-6, atol=1e-6)


def test_smoothing_by_its_formula():
    d = torch.rand(3, 4).double()
    plain, smooth = harmonic_log_probs(d).exp(), harmonic_log_probs(d, smoothing=0.2).exp()
    torch.testing.assert_close(smooth, (plain + 0.2 / 4) / 1.2)
    each = HarmonicLoss(smoothing=0.2, reduction="none")(d, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(each, -smooth.log()[range(3), [0, 1, 2]])


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_sample_on_its_centre_and_zero_vectors(metric):
    layer = DistanceLayer(3, 4, metric=metric)
    x = torch.cat([layer.centers.detach()[:2], torch.zeros(1, 3)]).requires_grad_()
    loss = HarmonicLoss()(layer(x), torch.tensor([0, 1, 2]))
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, (x, *layer.parameters())):
        assert gradient.isfinite().all()


def test_on_the_centre_the_probability_is_nearly_one():
    layer = DistanceLayer(4, 3).double()
    found = harmonic_log_probs(layer(layer.centers.detach()))
    assert (found.diagonal() > torch.tensor(1 - 3 * 1e-3).log()).all()


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_layer_survives(metric):
    layer, x = DistanceLayer(4, 3, metric=metric), torch.randn(2, 5, 4)
    assert layer(x).shape == (2, 5, 3)
    assert (layer(x) >= 0).all()
    other = DistanceLayer(4, 3, metric=metric)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert metric in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.float32


def test_gumbel_noise_in_training_only():
    layer, x = DistanceLayer(4, 3, metric="hamming", variant="gumbel"), torch.randn(5, 4)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_emissions_are_measured_or_left_out(tmp_path, monkeypatch):
    with track_emissions(output_dir=tmp_path, country_iso_code="DEU") as emissions:
        assert emissions.kg_co2 is None
        sum(range(10_000))
    assert emissions.kg_co2 is None or emissions.kg_co2 >= 0
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with track_emissions() as emissions:
        pass
    assert emissions.kg_co2 is None


def test_tracker_that_fails_is_left_out_and_one_that_runs_is_stopped(monkeypatch):
    stopped = []

    class Tracker:
        def __init__(self, broken=False, **settings):
            assert settings["save_to_file"] is False

        def start(self):
            pass

        def stop(self):
            stopped.append(True)
            return 0.5

    class Broken(Tracker):
        def start(self):
            raise RuntimeError("no power meter")

    import codecarbon

    monkeypatch.setattr(codecarbon, "EmissionsTracker", Broken)
    with pytest.warns(UserWarning, match="no power meter"), track_emissions(save_to_file=False) as emissions:
        pass
    assert emissions.kg_co2 is None
    monkeypatch.setattr(codecarbon, "EmissionsTracker", Tracker)
    with pytest.raises(KeyError), track_emissions(save_to_file=False) as emissions:
        raise KeyError
    assert stopped == [True]
    assert emissions.kg_co2 == 0.5


@pytest.mark.bad_input
def test_bad_input_is_named():
    d, y = torch.rand(3, 4), torch.arange(3)
    for call, says in [
        (lambda: HarmonicLoss(0.0), "exponent: found 0.0"),
        (lambda: HarmonicLoss(eps=0.0), "eps: found 0.0"),
        (lambda: HarmonicLoss(smoothing=-0.1), "smoothing: found -0.1"),
        (lambda: HarmonicLoss(reduction="sum"), "reduction: found 'sum'"),
        (lambda: HarmonicLoss()(d - 1, y), "distances: found -"),
        (lambda: HarmonicLoss()(d, y + 2), "targets: found 4"),
        (lambda: HarmonicLoss()(d, y[:2]), "distances, targets: found shapes"),
        (lambda: HarmonicLoss()(d, y.float()), "targets: found torch.float32"),
        (lambda: DistanceLayer(4, 3, metric="hyperbolic"), "metric: found 'hyperbolic'"),
        (lambda: DistanceLayer(4, 3, metric="canberra", variant="soft"), "variant: found 'soft'"),
        (lambda: DistanceLayer(4, 3, metric="mahalanobis", variant="soft"), "variant: found 'soft'"),
        (lambda: DistanceLayer(4, 3, metric="mahalanobis", reg_lambda=0.0), "reg_lambda: found 0.0"),
        (lambda: DistanceLayer(4, 3, metric="minkowski", p=0.5), "p: found 0.5"),
        (lambda: DistanceLayer(4, 3, metric="hamming", temperature=0.0), "temperature: found 0.0"),
        (lambda: DistanceLayer(4, 3, q=2), "q: found for metric 'sq_euclidean'"),
        (lambda: DistanceLayer(4, 3)(d[:, :3]), "x: found shape"),
        (lambda: pca_concentration(d[:1]), "features: found shape"),
        (lambda: pca_concentration(d, 0), "n_components: found 0"),
        (lambda: pca_concentration(torch.ones(4, 2)), "no variance"),
        (lambda: pca_concentration(d * torch.nan), "features: found NaN"),
        (lambda: pca_concentration(torch.cat([d, d[:, :1] / 0], dim=1)), "features: found NaN or infinite"),
        (lambda: circularity(d[:, :1]), "reps: found 1 feature"),
        (lambda: circularity(d[:1]), "reps: found shape"),
        (lambda: circularity(d * torch.nan), "reps: found NaN"),
        (lambda: circularity(torch.ones(4, 2)), "fewer than two directions"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
