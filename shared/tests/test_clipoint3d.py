"""Transport and prototype alignment: converged reference values, POT, limits, degenerate sets."""

import math

import numpy as np
import ot
import pytest
import torch

from proto_core.losses import (
    SinkhornLoss,
    UncertaintyPrototypeAlignmentLoss,
    confidence_score,
    uncertainty_prototypes,
)
from proto_core.transport import sinkhorn_plan, symmetric_potential

CLOSE = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "clipoint3d.npz")


def tensor(golden, name):
    return torch.from_numpy(np.asarray(golden[name])).clone()


@pytest.mark.parametrize("case", ["sink0", "sink1"])
def test_divergence_equals_the_converged_reference(golden, case):
    x, y = tensor(golden, f"{case}/x").requires_grad_(), tensor(golden, f"{case}/y")
    p, blur = int(golden[f"{case}/p"]), float(golden[f"{case}/blur"])
    loss = SinkhornLoss(p, blur)(x, y)
    np.testing.assert_allclose(loss.detach(), golden[f"{case}/value"], **CLOSE)
    np.testing.assert_allclose(torch.autograd.grad(loss, x)[0], golden[f"{case}/grad_x"], rtol=1e-6, atol=1e-8)
    biased = SinkhornLoss(p, blur, debias=False)(x, y)
    np.testing.assert_allclose(biased.detach(), golden[f"{case}/cost_xy"], **CLOSE)
    cost = torch.cdist(x, y) if p == 1 else torch.cdist(x, y) ** 2 / 2
    plan, f, g = sinkhorn_plan(cost, epsilon=blur**p)
    np.testing.assert_allclose(plan, golden[f"{case}/plan"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(f.mean() + g.mean(), golden[f"{case}/cost_xy"], **CLOSE)
    # the authors' annealed form stops within about 2 per cent of the converged one
    np.testing.assert_allclose(loss.detach(), golden[f"{case}/geomloss_value"], rtol=0.03)


def test_prototypes_equal_the_authors_code(golden):
    features, logits, labels = (tensor(golden, f"proto0/{name}") for name in ("features", "logits", "labels"))
    np.testing.assert_allclose(confidence_score(logits), golden["proto0/confidence"], **CLOSE)
    found = uncertainty_prototypes(features, logits, labels, 4)
    np.testing.assert_allclose(found, golden["proto0/prototypes_weighted"], **CLOSE)
    alone = uncertainty_prototypes(features, logits, labels, 4, num_subsets=24)
    np.testing.assert_allclose(alone, golden["proto0/prototypes_mean"], **CLOSE)
    target = tensor(golden, "proto0/target").requires_grad_()
    prototypes = tensor(golden, "proto0/prototypes_weighted")
    loss = UncertaintyPrototypeAlignmentLoss()
    value = loss(target, prototypes)
    np.testing.assert_allclose(value.detach(), golden["proto0/loss"], **CLOSE)
    np.testing.assert_allclose(torch.autograd.grad(value, target)[0], golden["proto0/grad"], **CLOSE)
    details = loss.details(target, prototypes)
    np.testing.assert_allclose(details["alpha"], golden["proto0/alpha"], **CLOSE)
    np.testing.assert_array_equal(details["pseudo_labels"], golden["proto0/pseudo_labels"])
    assert details["confidence"].shape == (6,)
    fixed = UncertaintyPrototypeAlignmentLoss(detach_weights=True)(target, prototypes)
    assert fixed == value
    assert not torch.allclose(torch.autograd.grad(fixed, target)[0], torch.from_numpy(golden["proto0/grad"]))


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 2e-3])
def test_plan_agrees_with_pot(epsilon):
    g = np.random.default_rng(0)
    x, y = g.normal(size=(40, 2)), g.normal(size=(30, 2)) + 1
    a, b = g.random(40) + 0.1, g.random(30) + 0.1
    a, b = a / a.sum(), b / b.sum()
    cost = ot.dist(x, y)
    cost = cost / cost.max()
    expected = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", numItermax=100_000, stopThr=1e-10)
    found, f, h = sinkhorn_plan(*map(torch.from_numpy, (cost, a, b)), epsilon=epsilon, max_iter=100_000, tol=1e-10)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(0), b, rtol=1e-9)
    np.testing.assert_allclose(found.sum(1), a, atol=1e-9)
    rebuilt = (
        torch.from_numpy(a)[:, None] * torch.from_numpy(b) * ((f[:, None] + h - torch.from_numpy(cost)) / epsilon).exp()
    )
    torch.testing.assert_close(found, rebuilt, rtol=1e-9, atol=1e-15)


def test_costs_far_beyond_the_range_of_the_exponential():
    cost = torch.tensor([[0.0, 1e6], [1e6, 0.0]])
    plan, f, g = sinkhorn_plan(cost, epsilon=0.01)
    torch.testing.assert_close(plan, torch.eye(2) / 2)
    assert f.isfinite().all()
    assert g.isfinite().all()


def test_onto_itself_the_potential_is_symmetric():
    x = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cost, a = torch.cdist(x, x), torch.full((12,), 1 / 12, dtype=torch.float64)
    f = symmetric_potential(cost, a, 0.3)
    _, left, right = sinkhorn_plan(cost, a, a, 0.3)
    torch.testing.assert_close((left + right) / 2, f, rtol=1e-6, atol=1e-8)


def test_same_set_has_divergence_and_gradient_zero():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for p in (1, 2):
        loss = SinkhornLoss(p, 0.1)(x, x.detach())
        assert abs(loss.item()) < 1e-5
        assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-3
    wide = x.detach().double().requires_grad_()
    loss = SinkhornLoss(1, 0.1)(wide, wide.detach())
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, wide)[0].abs().max() < 1e-6


def test_gradient_is_that_of_the_value():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(4, 2, generator=g).double().requires_grad_(), torch.randn(5, 2, generator=g).double()
    for p in (1, 2):
        loss = SinkhornLoss(p, 0.4, tol=1e-13)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, y), (x,), eps=1e-5, atol=1e-6)


def test_shifted_sets_and_weights():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(4)).double()
    assert SinkhornLoss(2, 0.05)(x, x + torch.tensor([3.0, 4.0])).item() == pytest.approx(12.5, rel=1e-6)
    double = SinkhornLoss(2, 0.3)(x[[0, 0, 1]], x[2:])
    weighted = SinkhornLoss(2, 0.3)(x[:2], x[2:], torch.tensor([2 / 3, 1 / 3]), torch.full((4,), 0.25))
    torch.testing.assert_close(double, weighted, rtol=1e-6, atol=1e-8)


def test_confidence_of_certain_and_uniform():
    assert confidence_score(torch.tensor([80.0, 0.0, 0.0])).item() == pytest.approx(1, abs=1e-6)
    assert confidence_score(torch.zeros(2, 3)).abs().max() < 1e-6
    assert confidence_score(torch.zeros(3).bfloat16()).dtype == torch.float32


def test_empty_class_and_subsets():
    features = torch.tensor([[1.0], [2.0], [4.0]])
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    weight = confidence_score(logits)
    found = uncertainty_prototypes(features, logits, torch.tensor([1, 1, 1]), 2)
    assert found[0] == 0
    torch.testing.assert_close(found[1], (weight[:, None] * features).sum(0) / weight.sum())
    flat = uncertainty_prototypes(features, torch.zeros(3, 2), torch.tensor([1, 1, 1]), 2)
    torch.testing.assert_close(flat[1], features.mean(0), rtol=1e-3, atol=1e-3)
    pairs = {
        round(
            uncertainty_prototypes(features, logits, torch.ones(3).long(), 2, 2, torch.Generator().manual_seed(s))[
                1
            ].item(),
            4,
        )
        for s in range(30)
    }
    expected = set()
    for one in range(3):
        two = [k for k in range(3) if k != one]
        both = (weight[two, None] * features[two]).sum() / weight[two].sum()
        expected.add(round(((both + features[one, 0]) / 2).item(), 4))
    assert pairs == expected


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, cost = torch.randn(4, 3), torch.rand(4, 4)
    quarter = torch.full((4,), 0.25)
    for call, says in [
        (lambda: SinkhornLoss(3), "p: found 3"),
        (lambda: SinkhornLoss(blur=0.0), "blur: found 0.0"),
        (lambda: SinkhornLoss()(x, x[:, :2]), "x, y: found shapes"),
        (lambda: SinkhornLoss()(x, x[:0]), "x, y: found shapes"),
        (lambda: SinkhornLoss()(x, x, quarter * 2), "a: found a sum of 2"),
        (lambda: SinkhornLoss()(x, x, quarter, quarter[:2]), "b: found shape"),
        (lambda: SinkhornLoss(gather_distributed=True)(x, x, quarter), "a, b: found weights"),
        (lambda: sinkhorn_plan(cost, torch.tensor([0.5, 0.5, 0.0, 0.0])), "a: found 0.0"),
        (lambda: sinkhorn_plan(cost * torch.nan), "cost: found NaN"),
        (lambda: sinkhorn_plan(cost[:0]), "cost: found shape"),
        (lambda: sinkhorn_plan(cost, epsilon=0.0), "epsilon: found 0.0"),
        (lambda: sinkhorn_plan(cost, max_iter=0), "max_iter: found 0"),
        (lambda: confidence_score(x[:, :1]), "logits: found shape"),
        (lambda: UncertaintyPrototypeAlignmentLoss()(x, x[:, :2]), "features, prototypes: found shapes"),
        (lambda: UncertaintyPrototypeAlignmentLoss()(x, x[:1]), "logits: found shape"),
        (lambda: uncertainty_prototypes(x, x, torch.arange(4), 3), "targets: found 3"),
        (lambda: uncertainty_prototypes(x, x[:2], torch.arange(4), 4), "logits: found shape"),
        (lambda: uncertainty_prototypes(x, x, torch.arange(4), 4, 0), "num_subsets: found 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    assert math.isfinite(SinkhornLoss()(x, x[:1]).item())
