"""Comp-sum losses: the bounds hold, the middle of the family trains best, the smooth adversarial form is robust."""

from statistics import mean

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.attacks import comp_sum_adversary
from proto_core.losses import CompSumLoss, SmoothAdversarialCompSumLoss
from proto_core.theory import bayes_conditional_risk, h_consistency_bound


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    parts = train_test_split(data.data / 16, data.target, test_size=0.5, stratify=data.target, random_state=0)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return x.float(), y, x_test.float(), y_test


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def expected_loss(p: np.ndarray, s: np.ndarray, tau: float) -> np.ndarray:
    each = -np.log(s) if tau == 1 else (s ** (tau - 1) - 1) / (1 - tau)
    return (p * each).sum(-1)


@pytest.mark.claim
def test_bounds_hold(claim_record):
    rng = np.random.default_rng(0)
    worst, tight = -np.inf, 0.0
    for tau in (0.0, 0.3, 1.0, 1.5, 2.0):
        for classes in range(2, 11):
            p = rng.dirichlet(np.ones(classes), 20_000 // 9)
            scores = rng.normal(size=p.shape) * rng.choice([0.3, 1.0, 3.0], (len(p), 1))
            s = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            error = p.max(-1) - p[np.arange(len(p)), s.argmax(-1)]
            excess = np.maximum(expected_loss(p, s, tau) - bayes_conditional_risk(p, tau), 0)
            worst = max(worst, float((error - h_consistency_bound(excess, tau, classes)).max()))
        if tau <= 1:
            for b in np.linspace(0.05, 0.95, 10):
                p, s = np.array([(1 + b) / 2, (1 - b) / 2]), np.array([0.5, 0.5])
                excess = expected_loss(p, s, tau) - bayes_conditional_risk(p, tau)
                tight = max(tight, abs(h_consistency_bound(float(excess), tau, 2) - b))
    holds = worst <= 1e-9 and tight <= 1e-6
    claim_record(
        "comp_sum",
        metric="largest excess error over its bound, 20,000 distributions for each of five tau",
        method=[worst],
        baseline=[0.0],
        margin="at most 1e-9, and met within 1e-6 for tau up to 1",
        holds=holds,
    )
    assert holds, (worst, tight)


@pytest.mark.claim
def test_middle_of_the_family_trains_best(claim_record):
    x, y, x_test, y_test = digits()

    def accuracy(tau: float, seed: int) -> float:
        net, loss = network(seed), CompSumLoss(tau)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for _ in range(20):
            for rows in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                loss(net(x[rows]), y[rows]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                optimizer.step()
        return (net(x_test).argmax(1) == y_test).float().mean().item()

    found = {tau: [accuracy(tau, seed) for seed in range(5)] for tau in (0.0, 1.0, 2.0)}
    verdicts = []
    for tau in (0.0, 2.0):
        verdicts.append(mean(found[1.0]) > mean(found[tau]) + 0.1)
        claim_record(
            "comp_sum",
            metric=f"accuracy on digits, tau = 1 against tau = {tau:g}",
            method=found[1.0],
            baseline=found[tau],
            margin="higher by more than 0.1",
            holds=verdicts[-1],
        )
    assert all(verdicts), found


@pytest.mark.claim
def test_smooth_adversarial_form_is_robust(claim_record):
    x, y, x_test, y_test = digits()

    def attacked(net: nn.Module) -> float:
        """Accuracy under 20 steps of ascent on cross entropy."""
        moved = x_test + 0.1 * (2 * torch.rand_like(x_test) - 1)
        for _ in range(20):
            moved = moved.clamp(0, 1).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(moved), y_test), moved)
            moved = x_test + (moved.detach() + 0.0125 * gradient.sign() - x_test).clamp(-0.1, 0.1)
        return (net(moved.clamp(0, 1)).argmax(1) == y_test).float().mean().item()

    def accuracies(seed: int, nu: float | None) -> tuple[float, float]:
        net = network(seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(20):
            for rows in torch.randperm(len(y)).split(64):
                if nu is None:
                    loss = CompSumLoss()(net(x[rows]), y[rows])
                else:
                    moved = comp_sum_adversary(net, x[rows], y[rows], gamma=0.1, steps=5)
                    clean, adversarial = net(torch.cat([x[rows], moved])).chunk(2)
                    loss = SmoothAdversarialCompSumLoss(nu=nu)(clean, y[rows], adversarial)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return (net(x_test).argmax(1) == y_test).float().mean().item(), attacked(net)

    plain, robust = ([accuracies(seed, nu) for seed in range(2)] for nu in (None, 0.2))
    verdicts = []
    for which, what, margin in [
        (1, "accuracy under attack, nu = 0.2 against plain", "higher by more than 0.2"),
        (0, "accuracy on clean digits, nu = 0.2 against plain", "not lower by 0.03"),
    ]:
        method, baseline = [run[which] for run in robust], [run[which] for run in plain]
        verdicts.append(mean(method) > mean(baseline) + (0.2 if which else -0.03))
        claim_record("comp_sum", metric=what, method=method, baseline=baseline, margin=margin, holds=verdicts[-1])
    assert all(verdicts), (plain, robust)
