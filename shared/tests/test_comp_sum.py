"""Comp-sum losses and their theory: the 40-digit reference, torch's losses, brute force over distributions, attacks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proto_core import theory
from proto_core.attacks import comp_sum_adversary
from proto_core.losses import CompSumLoss, SmoothAdversarialCompSumLoss

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "comp_sum.npz")


@pytest.mark.parametrize("i", range(5))
def test_losses_equal_the_reference(golden, i):
    tau = float(golden["taus"][i])
    logits, adv = (torch.from_numpy(golden[name]).requires_grad_() for name in ("logits", "adv_logits"))
    targets = torch.from_numpy(golden["targets"])
    each = CompSumLoss(tau, "none")(logits, targets)
    np.testing.assert_allclose(each.detach(), golden[f"t{i}/per_sample"], **EXACT)
    loss = CompSumLoss(tau)(logits, targets)
    np.testing.assert_allclose(loss.detach(), golden[f"t{i}/loss"], **EXACT)
    np.testing.assert_allclose(torch.autograd.grad(loss, logits)[0], golden[f"t{i}/grad"], **EXACT)
    torch.testing.assert_close(CompSumLoss(tau, "sum")(logits, targets), each.sum())
    settings_ = {"tau": tau, "rho": float(golden["rho"]), "nu": float(golden["nu"])}
    each = SmoothAdversarialCompSumLoss(**settings_, reduction="none")(logits, targets, adv)
    np.testing.assert_allclose(each.detach(), golden[f"t{i}/smooth_adv_per_sample"], **EXACT)
    loss = SmoothAdversarialCompSumLoss(**settings_)(logits, targets, adv)
    np.testing.assert_allclose(loss.detach(), golden[f"t{i}/smooth_adv_loss"], **EXACT)
    for name, gradient in zip(("logits", "adv"), torch.autograd.grad(loss, (logits, adv))):
        np.testing.assert_allclose(gradient, golden[f"t{i}/smooth_adv_grad_{name}"], **EXACT)


def test_theory_equals_the_reference(golden):
    classes, p, w = int(golden["num_classes"]), golden["cond_probs"], golden["weights"]
    for i, tau in enumerate(golden["taus"].tolist()):
        close = {"rtol": 1e-7, "atol": 1e-8}
        np.testing.assert_allclose(
            theory.h_consistency_transform(golden["betas"], tau, classes), golden["transform"][i], **close
        )
        excess = golden["surrogate_excess"]
        np.testing.assert_allclose(theory.h_consistency_bound(excess, tau, classes), golden["bound"][i], **close)
        np.testing.assert_allclose(theory.bayes_conditional_risk(p, tau), golden["bayes_cond_risk"][i], **close)
        gap = theory.minimizability_gap(float(golden["best_in_class_risk"][i]), p, w, tau)
        np.testing.assert_allclose(gap, golden["gap"][i], **close)
        best = float(golden["sum_exp_best_risk"])
        np.testing.assert_allclose(theory.minimizability_gap_upper(best, p, w, tau), golden["gap_upper"][i], **close)
        upper = theory.minimizability_gap_upper_deterministic(best, float(golden["score_bound"]), classes, tau)
        np.testing.assert_allclose(upper, golden["gap_upper_deterministic"][i], **close)


def test_relatives_have_their_names():
    logits, targets = torch.randn(8, 5).double(), torch.arange(8) % 5
    p = logits.softmax(1)[torch.arange(8), targets]
    for name, expected in [
        ("sum_exponential", (1 / p - 1).mean()),
        ("logistic", F.cross_entropy(logits, targets)),
        ("gce", ((1 - p**0.7) / 0.7).mean()),
        ("mae", (1 - p).mean()),
    ]:
        torch.testing.assert_close(CompSumLoss.from_name(name)(logits, targets), expected)
    torch.testing.assert_close(CompSumLoss.from_name("gce", q=0.3)(logits, targets), ((1 - p**0.3) / 0.3).mean())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tau=st.floats(0, 3))
def test_gradient_has_its_closed_form(seed, tau):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(3, (4,), generator=g)
    (found,) = torch.autograd.grad(CompSumLoss(tau, "sum")(logits, targets), logits)
    p = logits.detach().softmax(1)
    own = p.gather(1, targets[:, None])
    torch.testing.assert_close(found, own ** (tau - 1) * (p - F.one_hot(targets, 3)), rtol=1e-6, atol=1e-8)


def test_near_one_no_digit_is_lost():
    logits, targets = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([1])
    nll = F.cross_entropy(logits, targets).item()
    for tau in (1.001, 1 + 1e-6, 0.999):
        expected = math.expm1((1 - tau) * nll) / (1 - tau)
        assert CompSumLoss(tau)(logits, targets).item() == pytest.approx(expected, rel=1e-12)
    assert CompSumLoss(1 + 1e-9)(logits, targets).item() == nll


def test_overflow_is_infinite_and_one_class_is_zero():
    logits = torch.tensor([[0.0, 200.0]])
    assert CompSumLoss(0.0)(logits, torch.tensor([0])) == torch.inf
    assert CompSumLoss(2.0)(logits, torch.tensor([0])) == 1
    one = torch.randn(3, 1, requires_grad=True)
    for tau in (0.0, 1.0, 2.0):
        loss = CompSumLoss(tau)(one, torch.zeros(3, dtype=torch.long))
        assert loss == 0
        assert (torch.autograd.grad(loss, one)[0] == 0).all()


def test_without_a_move_the_adversarial_form_is_the_plain_one():
    logits = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    loss = SmoothAdversarialCompSumLoss(0.5, rho=2.0, nu=3.0)(logits, targets, logits)
    torch.testing.assert_close(loss, CompSumLoss(0.5)(logits / 2, targets))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    far = SmoothAdversarialCompSumLoss(1.0, nu=2.0)(logits, targets, logits + 1)  # all alike: margins stay
    torch.testing.assert_close(far, CompSumLoss()(logits, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1.5, 2.0, 2.5])
def test_bound_inverts_the_transform_and_the_closed_one_is_above(tau):
    beta = np.linspace(0, 1, 21)
    for classes in (2, 5):
        transform = theory.h_consistency_transform(beta, tau, classes)
        assert (np.diff(transform) > 0).all()
        np.testing.assert_allclose(theory.h_consistency_bound(transform, tau, classes), beta, atol=1e-6)
        assert (theory.h_consistency_bound_closed(transform, tau, classes) >= beta - 1e-9).all()
        beyond = theory.h_consistency_bound(float(transform[-1]) * 2, tau, classes)
        assert beyond == 1.0
        assert theory.h_consistency_bound(0.0, tau, classes) == 0.0


def test_transform_is_continuous_in_tau():
    for middle in (1.0, 2.0):
        values = [theory.h_consistency_transform(0.6, middle + step, 3) for step in (-1e-6, 0.0, 1e-6)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
        assert values[2] == pytest.approx(values[1], rel=1e-4)
    assert math.isfinite(theory.h_consistency_transform(1.0, 1.999, 3))
    assert theory.h_consistency_transform(1.0, 1.0, 3) == pytest.approx(math.log(2))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_bayes_risk_is_the_minimum(tau):
    """Direct minimisation over scores."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    scores = torch.zeros(4).double().requires_grad_()
    optimizer = torch.optim.LBFGS([scores], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        each = CompSumLoss(tau, "none")(scores.expand(4, 4), torch.arange(4))
        risk = (p * each)[:3].sum()
        risk.backward()
        return risk

    for _ in range(5):
        optimizer.step(closure)
    assert theory.bayes_conditional_risk(p.numpy(), tau) == pytest.approx(closure().item(), abs=2e-3)
    assert theory.bayes_conditional_risk(p.numpy(), tau) <= closure().item() + 1e-9


def test_kinds_come_back_as_they_came():
    assert isinstance(theory.h_consistency_bound(0.1, 1.0, 3), float)
    assert isinstance(theory.h_consistency_bound(np.array([0.1]), 1.0, 3), np.ndarray)
    found = theory.bayes_conditional_risk(torch.tensor([[0.5, 0.5]]), 1.0)
    torch.testing.assert_close(found, torch.tensor([math.log(2)]).double())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversary_stays_in_its_ball_and_moves_margins(norm):
    torch.manual_seed(0)
    model, x, targets = Net(), torch.rand(20, 4), torch.arange(20) % 3
    model.train()
    model.body[0].eval()
    moved = comp_sum_adversary(model, x, targets, gamma=0.2, norm=norm, generator=torch.Generator().manual_seed(1))
    assert not moved.requires_grad
    change = moved - x
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.2 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert model.training
    assert not model.body[0].training
    assert all(p.grad is None for p in model.parameters())
    again = comp_sum_adversary(model, x, targets, gamma=0.2, norm=norm, generator=torch.Generator().manual_seed(1))
    assert torch.equal(moved, again)
    model.eval()

    def margins(at):
        logits = model(at)
        return logits.gather(1, targets[:, None]) - logits

    with torch.no_grad():
        found = (margins(moved) - margins(x)).norm(dim=1).mean()
        random = x + 0.2 * (2 * torch.rand_like(x) - 1)
        assert found > (margins(random.clamp(0, 1)) - margins(x)).norm(dim=1).mean()


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
    for call, says in [
        (lambda: CompSumLoss(-0.1), "tau: found -0.1"),
        (lambda: CompSumLoss(reduction="max"), "reduction: found 'max'"),
        (lambda: CompSumLoss.from_name("hinge"), "name: found 'hinge'"),
        (lambda: CompSumLoss()(x, y + 1), "targets: found 2"),
        (lambda: CompSumLoss()(x[:0], y[:0]), "logits, targets: found shapes"),
        (lambda: SmoothAdversarialCompSumLoss(rho=0.0), "rho: found 0.0"),
        (lambda: SmoothAdversarialCompSumLoss(nu=-1.0), "nu: found -1.0"),
        (lambda: SmoothAdversarialCompSumLoss()(x, y, x[:2]), "adv_logits: found shape"),
        (lambda: comp_sum_adversary(Net(), x, y, gamma=0.0), "gamma: found 0.0"),
        (lambda: comp_sum_adversary(Net(), x, y, gamma=1.0, norm="l1"), "norm: found 'l1'"),
        (lambda: comp_sum_adversary(Net(), x, y[:2], gamma=1.0), "targets: found shape"),
        (lambda: theory.h_consistency_transform(1.1, 1.0, 2), "beta: found 1.1"),
        (lambda: theory.h_consistency_transform(0.1, 1.0, 1), "num_classes: found 1"),
        (lambda: theory.h_consistency_bound(-0.1, 1.0, 2), "surrogate_excess: found -0.1"),
        (lambda: theory.h_consistency_bound_closed(0.1, -1.0, 2), "tau: found -1.0"),
        (lambda: theory.bayes_conditional_risk([0.5, 0.6], 1.0), "cond_probs: found rows"),
        (lambda: theory.minimizability_gap(0.1, [[0.5, 0.5]], [0.5], 1.0), "weights: found a sum"),
        (lambda: theory.minimizability_gap(0.1, [[0.5, 0.5]], [0.5, 0.5], 1.0), "cond_probs, weights: found shapes"),
        (lambda: theory.minimizability_gap_upper(-1.0, [[0.5, 0.5]], [1.0], 1.0), "sum_exp_best_risk: found -1.0"),
        (lambda: theory.minimizability_gap_upper_deterministic(1.0, -1.0, 2, 1.0), "score_bound: found -1.0"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
