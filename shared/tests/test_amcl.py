"""AMCL: the reference's values and gradients in all forms, the formula pair by pair, kNN, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from proto_core.losses import (
    AdaptiveMultiHeadContrastiveLoss,
    AdaptiveTemperature,
    BarlowTwinsLoss,
    temperature_regularizer,
)
from proto_core.metrics import knn_predict


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "amcl.npz")


def near(found, expected, rtol=1e-7, atol=1e-9):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


def fill(temperature, golden, case):
    """Weights of phi, and their names in the file."""
    names = {}
    for q, mlp in enumerate(temperature.mlps):
        for layer, number in ((mlp[0], 1), (mlp[2], 2)):
            for kind, parameter in (("w", layer.weight), ("b", layer.bias)):
                name = f"mlp{q}_{kind}{number}"
                parameter.data = torch.from_numpy(golden[f"{case}_{name}"])
                names[name] = parameter
    return names


CASES = {
    "max": {},
    "lse": {"shared": False, "negatives": "logsumexp"},
    "moco": {},
    "siam": {"kind": "simsiam"},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(golden, case):
    def value(name):
        return torch.from_numpy(golden[f"{case}_{name}"])

    beta, lower, upper = golden["hp"]
    loss = AdaptiveMultiHeadContrastiveLoss(
        5, 3, beta=beta, lower=lower, upper=upper, hidden_dim=int(golden["h"]), **CASES[case]
    ).double()
    parameters = fill(loss.temperature, golden, case)
    one, two = value("z1").requires_grad_(), value("z2").requires_grad_()
    options = {"queue": value("queue")} if case == "moco" else {}
    if case == "siam":
        options["targets"] = (value("h1"), value("h2"))
    found = loss(one, two, **options)
    near(found, golden[f"{case}_loss"])
    wanted = {"z1": one, "z2": two, **parameters}
    wanted = {name: x for name, x in wanted.items() if f"{case}_grad_{name}" in golden}
    assert len(wanted) >= 5
    for name, gradient in zip(wanted, torch.autograd.grad(found, list(wanted.values()))):
        near(gradient, golden[f"{case}_grad_{name}"])


def test_barlow_form_equals_the_reference(golden):
    beta, lower, upper = golden["hp"]
    loss = AdaptiveMultiHeadContrastiveLoss(
        5, 3, "barlow", beta, lower, upper, offdiag_weight=float(golden["bar_lam"])
    ).double()
    assert (loss.theta == 0).all()
    loss.theta.data = torch.from_numpy(golden["bar_theta"])
    one, two = (torch.from_numpy(golden[f"bar_z{i}"]).requires_grad_() for i in (1, 2))
    found = loss(one, two)
    near(found, golden["bar_loss"])
    for name, gradient in zip(["z1", "z2", "theta"], torch.autograd.grad(found, [one, two, loss.theta])):
        near(gradient, golden[f"bar_grad_{name}"])


def test_barlow_twins_equals_the_authors_code(golden):
    one, two = (torch.from_numpy(golden[f"bt_{name}"]).requires_grad_() for name in "ab")
    found = BarlowTwinsLoss()(one, two)
    near(found, golden["bt_loss"])
    for name, gradient in zip("ab", torch.autograd.grad(found, [one, two])):
        near(gradient, golden[f"bt_g{name}"])


def test_temperature_equals_the_authors_module(golden):
    _, lower, upper = golden["hp"]
    for bounds in ((1e-5, 2.0), (lower, upper)):
        temperature = AdaptiveTemperature(3, 2, 128, *bounds, shared=False).double()
        fill(temperature, golden, "t")
        a, b = torch.from_numpy(golden["t_za"]), torch.from_numpy(golden["t_zb"])
        found = temperature(a, b)
        near(temperature.pairwise(a, b).diagonal(dim1=1, dim2=2), found.detach().numpy())
        if np.allclose(found.detach().numpy(), golden["t_tau"], rtol=1e-7):
            return
    pytest.fail("neither pair of bounds gives the stored temperatures")


def slow(loss, one, two, queue=None):
    """The definition, pair by pair."""
    heads, n, d = one.shape
    total = torch.zeros((), dtype=torch.float64)
    for c in range(heads):
        phi = loss.temperature.mlps[0 if len(loss.temperature.mlps) == 1 else c]

        def tau(a, b, phi=phi):
            return loss.lower + (loss.upper - loss.lower) * torch.sigmoid(phi(torch.cat([a, b])))[0]

        def omega(t):
            return loss.beta * (d / 2 * t.log() + 1 / t)

        rows = one[c] if queue is not None else torch.cat([one[c], two[c]])
        mates = two[c] if queue is not None else torch.cat([two[c], one[c]])
        terms = []
        for i, (a, p) in enumerate(zip(rows, mates)):
            others = list(queue[c]) if queue is not None else [rows[j] for j in range(2 * n) if j % n != i % n]
            t = tau(a, p)
            pull = -F.cosine_similarity(a, p, dim=0) / t + omega(t)
            cosines = [F.cosine_similarity(a, o, dim=0) for o in others]
            taus = [tau(a, o) for o in others]
            if loss.negatives == "max":
                k = max(range(len(others)), key=lambda k: cosines[k].item())
                push = cosines[k] / taus[k] - omega(taus[k])
            else:
                push = torch.stack([s / t - omega(t) for s, t in zip(cosines, taus)]).logsumexp(0)
            terms.append(pull + push)
        total = total + torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("negatives", ["max", "logsumexp"])
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_definition(negatives, with_queue, shared):
    g = torch.Generator().manual_seed(1)
    one, two, queue = (torch.randn(2, 4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    loss = AdaptiveMultiHeadContrastiveLoss(3, 2, hidden_dim=5, lower=0.2, negatives=negatives, shared=shared).double()
    queue = queue if with_queue else None
    near(loss(one, two, queue), slow(loss, one, two, queue).item(), rtol=1e-10)


def test_regularizer_is_smallest_at_two_over_d():
    tau = torch.linspace(0.05, 2, 400, dtype=torch.float64)
    assert tau[temperature_regularizer(tau, 8).argmin()].item() == pytest.approx(0.25, abs=0.01)
    near(temperature_regularizer(torch.tensor([0.5]).double(), 4), [2 * math.log(0.5) + 2])


def test_zero_projections_and_constant_columns_are_finite():
    loss = AdaptiveMultiHeadContrastiveLoss(4, 2, lower=0.1, negatives="logsumexp")
    views = torch.zeros(2, 3, 4, requires_grad=True)
    value = loss(views, views)
    assert value.isfinite()
    assert torch.autograd.grad(value, views)[0].isfinite().all()
    constant = torch.ones(5, 3, requires_grad=True)
    value = BarlowTwinsLoss()(constant, constant)
    assert value == 3
    assert torch.autograd.grad(value, constant)[0].isfinite().all()


@pytest.mark.parametrize("rows", [6, 7, 64])
def test_columns_that_are_constant_but_for_rounding_are_nothing(rows):
    one, two = torch.full((rows, 3), 0.3), torch.full((rows, 3), 0.1)
    assert BarlowTwinsLoss()(one, two) == 3
    view = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    leaf = one.clone().requires_grad_()
    value = BarlowTwinsLoss()(leaf, view)
    assert value == 3
    assert (torch.autograd.grad(value, leaf)[0] == 0).all()


def test_regularizer_of_half_precision_is_computed_in_full():
    tau = torch.tensor([0.1, 1.7]).bfloat16()
    torch.testing.assert_close(temperature_regularizer(tau, 128), temperature_regularizer(tau.float(), 128))


def test_targets_and_the_choice_of_negatives_have_no_gradient():
    loss = AdaptiveMultiHeadContrastiveLoss(4, 2, "simsiam", lower=0.1)
    targets = tuple(torch.randn(3, 4, requires_grad=True) for _ in range(2))
    value = loss(torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4), targets=targets)
    assert torch.autograd.grad(value, targets, allow_unused=True) == (None, None)


def test_short_integers_are_labels_too():
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    assert torch.equal(knn_predict(x, x, y.to(torch.int16), 3, k=4), knn_predict(x, x, y, 3, k=4))


def test_temperatures_stay_between_their_bounds():
    temperature = AdaptiveTemperature(4, 2, lower=0.1, upper=1.0)
    tau = temperature(100 * torch.randn(2, 50, 4), 100 * torch.randn(2, 50, 4))
    assert ((tau >= 0.1) & (tau <= 1.0)).all()
    a, b = torch.randn(2, 2, 50, 4)
    assert not torch.allclose(temperature(a, b), temperature(b, a))


def test_neighbours_vote_as_the_reference_and_scikit_learn(golden):
    features, bank, labels = (torch.from_numpy(golden[f"knn_{name}"]) for name in ("f", "bank", "y"))
    found = knn_predict(features, bank, labels, 4, k=int(golden["knn_k"]))
    assert found.shape == (10, 4)
    assert torch.equal(found[:, 0], torch.from_numpy(golden["knn_top1"]))
    assert (found.sort(dim=1).values == torch.arange(4)).all()
    g = np.random.default_rng(0)
    points, places = g.normal(size=(40, 5)), g.integers(0, 3, 40)
    peer = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1)).fit(points, places)
    queries = g.normal(size=(30, 5))
    ours = knn_predict(torch.from_numpy(queries), torch.from_numpy(points), torch.from_numpy(places), 3, k=7)
    assert (ours[:, 0].numpy() == peer.predict(queries)).all()
    everything = knn_predict(torch.from_numpy(queries), torch.from_numpy(points), torch.from_numpy(places), 3, k=999)
    assert everything.shape == (30, 3)


V = torch.ones(3, 4, 5)
H = (torch.ones(4, 5), torch.ones(4, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveTemperature(4, lower=0.0), "lower, upper: found 0.0"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(4, lower=2.0, upper=1.0), "lower, upper: found 2.0"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(4, kind="moco"), "kind: found 'moco'"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(4, negatives="mean"), "negatives: found 'mean'"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(4, beta=-1.0), "beta: found -1.0"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5)(V[:, :1], V[:, :1]), "found 1 sample, needed 2"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5, kind="barlow")(V[:, :1], V[:, :1]), "found 1 sample, needed 2"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5, 2)(V, V), r"view1, view2: found shapes"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(6)(V, V), r"view1, view2: found shapes"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5)(V, V[:, :2]), r"view1, view2: found shapes"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5, kind="simsiam")(V, V), "targets: found none"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5)(V, V, targets=H), "targets: found some"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5, kind="simsiam")(V, V, targets=(H[0], H[1][:2])), "targets: found"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5, kind="simsiam")(V, V, V, H), "queue: found one with kind"),
        (lambda: AdaptiveMultiHeadContrastiveLoss(5)(V, V, V[:2]), "queue: found shape"),
        (lambda: AdaptiveTemperature(5)(V, V[:, :2]), "b: found shape"),
        (lambda: AdaptiveTemperature(6).pairwise(V, V), "a: found shape"),
        (lambda: BarlowTwinsLoss()(V[0, :1], V[0, :1]), "view1, view2: found shapes"),
        (lambda: BarlowTwinsLoss(-1.0), "offdiag_weight: found -1.0"),
        (lambda: knn_predict(V[0], V[0], torch.tensor([0, 1, 2, 3]), 3), "targets: found 3"),
        (lambda: knn_predict(V[0], V[0], torch.tensor([0, 1, 2, 3]), 4, k=0), "k: found 0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
