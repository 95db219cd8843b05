"""InfoNCE and its relatives: values of the float64 reference, cross entropy as a peer, limits, penalties, spread."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from proto_core.losses import HardContrastiveLoss, InfoNCELoss, SimpleContrastiveLoss
from proto_core.metrics import (
    penalty_distribution,
    penalty_entropy,
    relative_penalty,
    representation,
    tolerance,
    uniformity,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "contrastive_behaviour.npz")


@pytest.mark.parametrize("case", ["nce0", "nce1", "hard0", "hard1", "simple0", "simple1"])
def test_equals_the_reference(golden, case):
    inputs = {
        name: torch.from_numpy(golden[f"{case}_{name}"]).requires_grad_()
        for name in ("a", "p", "n")
        if f"{case}_{name}" in golden
    }
    tau, alpha, weight = (float(golden[f"{case}_{name}"]) for name in ("tau", "alpha", "lam"))
    if case.startswith("nce"):
        loss = InfoNCELoss(tau)
    elif case.startswith("hard"):
        loss = HardContrastiveLoss(tau, alpha)
    else:
        loss = SimpleContrastiveLoss(weight, None if alpha < 0 else alpha)
    found = loss(*inputs.values())
    np.testing.assert_allclose(found.detach(), golden[f"{case}_loss"], **EXACT)
    for name, gradient in zip(inputs, torch.autograd.grad(found, list(inputs.values()))):
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_{name}"], **EXACT, err_msg=name)


def test_penalties_equal_the_reference(golden):
    similarities = torch.from_numpy(golden["pen_S"])
    for tau, shares, entropy in zip(golden["pen_tau"].tolist(), golden["pen_r"], golden["pen_H"]):
        np.testing.assert_allclose(penalty_distribution(similarities, tau), shares, **EXACT)
        np.testing.assert_allclose(penalty_entropy(similarities, tau), entropy, **EXACT)


def test_spread_equals_the_reference(golden):
    x, y = torch.from_numpy(golden["m_x"]), torch.from_numpy(golden["m_y"])
    np.testing.assert_allclose(uniformity(x), golden["m_unif2"], **EXACT)
    np.testing.assert_allclose(uniformity(x, t=0.5), golden["m_unif05"], **EXACT)
    np.testing.assert_allclose(tolerance(x, y), golden["m_tol_pairs"], **EXACT)
    np.testing.assert_allclose(tolerance(x, y, pairs="all"), golden["m_tol_all"], **EXACT)


def pairs(seed, count=8, dim=4):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, dim, generator=g, dtype=torch.float64) for _ in range(2))


def test_info_nce_is_cross_entropy():
    a, p = pairs(0)
    similarity = F.normalize(a) @ F.normalize(p).T
    expected = F.cross_entropy(similarity / 0.1, torch.arange(8))
    torch.testing.assert_close(InfoNCELoss(0.1)(a, p), expected)
    back = F.cross_entropy(similarity.T / 0.1, torch.arange(8))
    torch.testing.assert_close(InfoNCELoss(0.1, symmetric=True)(a, p), (expected + back) / 2)
    each = InfoNCELoss(0.1, reduction="none")(a, p)
    assert each.shape == (8,)
    torch.testing.assert_close(each.mean(), expected)
    raw = F.cross_entropy(a @ p.T / 0.1, torch.arange(8))
    torch.testing.assert_close(InfoNCELoss(0.1, normalize=False)(a, p), raw)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.01, 1.0), bank=st.booleans())
def test_hard_loss_equals_its_definition(seed, alpha, bank):
    a, p = pairs(seed)
    n = torch.randn(11, 4, generator=torch.Generator().manual_seed(seed + 1)).double() if bank else None
    f, g = F.normalize(a), F.normalize(p)
    expected, simple = [], []
    for i in range(8):
        others = F.normalize(n) @ f[i] if bank else torch.cat([g[:i], g[i + 1 :]]) @ f[i]
        m = max(1, math.ceil(alpha * len(others) - 1e-9))
        kept = others[others >= others.sort(descending=True).values[m - 1]]
        own = f[i] @ g[i]
        expected.append(torch.log1p(((kept - own) / 0.3).exp().sum()))
        simple.append(-own + 0.7 * kept.sum())
    torch.testing.assert_close(HardContrastiveLoss(0.3, alpha)(a, p, n), torch.stack(expected).mean())
    torch.testing.assert_close(SimpleContrastiveLoss(0.7, alpha)(a, p, n), torch.stack(simple).mean())


def test_all_negatives_kept_is_info_nce():
    a, p = pairs(1)
    assert torch.equal(HardContrastiveLoss(0.2, 1.0)(a, p), InfoNCELoss(0.2)(a, p))
    torch.testing.assert_close(SimpleContrastiveLoss(0.2, 1.0)(a, p), SimpleContrastiveLoss(0.2)(a, p))


def test_ties_at_the_border_all_stay():
    a = torch.tensor([[1.0, 0.0]])
    negatives = torch.tensor([[0.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    expected = torch.log1p(2 * torch.tensor(-1.0).exp())
    torch.testing.assert_close(HardContrastiveLoss(1.0, 1 / 3)(a, a, negatives), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_negatives_tie_whatever_their_products_round_to(dtype):
    apart = False
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        count, dim = 5 + seed % 13, 7 + 11 * seed
        a, once = (torch.randn(rows, dim, generator=g, dtype=dtype) for rows in (1 + seed % 7, count))
        # where a machine rounds products with equal rows alike, a nudge by one unit of rounding stands in
        negatives = torch.cat([once, once * (1 + torch.finfo(dtype).eps * (seed % 2))])
        for normalize in (True, False):
            similarity = F.normalize(a) @ F.normalize(negatives).T if normalize else a @ negatives.T
            apart |= not torch.equal(similarity[:, :count], similarity[:, count:])
            # asked for three, the second of the second pair comes along, as if four were asked for
            shares = 3 / (2 * count), 4 / (2 * count)
            three, four = (HardContrastiveLoss(0.5, share, normalize)(a, -a, negatives) for share in shares)
            torch.testing.assert_close(three, four)
            three, four = (SimpleContrastiveLoss(1.0, share, normalize)(a, -a, negatives) for share in shares)
            torch.testing.assert_close(three, four)
    assert apart  # or this shows nothing


def test_limits_of_the_temperature():
    a, p = pairs(2)
    s = F.normalize(a) @ F.normalize(p).T
    others = s.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
    cold = ((others.amax(1) - s.diagonal()).relu() / 1e-3).mean()
    torch.testing.assert_close(InfoNCELoss(1e-3)(a, p), cold, rtol=1e-3, atol=1e-6)
    tau = 1e4
    hot = (-s.diagonal() / tau + s.mean(1) / tau + math.log(8)).mean()
    torch.testing.assert_close(InfoNCELoss(tau)(a, p), hot, rtol=1e-7, atol=1e-9)


def test_without_negatives():
    a, p = (rows.requires_grad_() for rows in pairs(3, count=1))
    for loss in (InfoNCELoss(), HardContrastiveLoss()):
        for bank in (None, torch.zeros(0, 4, dtype=torch.float64)):
            found = loss(a, p, bank)
            assert found == 0
            assert all((g == 0).all() for g in torch.autograd.grad(found, (a, p)))
    own = F.normalize(a) @ F.normalize(p).T
    for loss in (SimpleContrastiveLoss(), SimpleContrastiveLoss(alpha=0.5)):
        torch.testing.assert_close(loss(a, p), -own.squeeze())


def test_cold_temperature_and_zero_rows_stay_finite():
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    p = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        found = InfoNCELoss(0.01)(a.to(dtype), p.to(dtype))
        assert found.item() == pytest.approx((200.6931 + 200 + math.log(2 + math.exp(-0.0))) / 3, abs=34)
        assert torch.autograd.grad(found, a)[0].isfinite().all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tau=st.floats(0.02, 1.0), factor=st.floats(1.1, 5.0))
def test_entropy_of_penalties_rises_with_temperature(seed, tau, factor):
    s = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(penalty_distribution(s, tau).sum(1), torch.ones(3).double(), rtol=0, atol=1e-12)
    assert (penalty_entropy(s, tau * factor) >= penalty_entropy(s, tau)).all()
    assert (penalty_entropy(s, 1e6) - math.log(6)).abs().max() < 1e-9


def test_relative_penalty_is_the_ratio_of_gradients():
    s = (torch.rand(5, 5, generator=torch.Generator().manual_seed(4)).double() * 2 - 1).requires_grad_()
    loss = F.cross_entropy(s / 0.2, torch.arange(5), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, s)
    expected = gradient / gradient.diagonal().abs().unsqueeze(1)
    expected.fill_diagonal_(0)
    torch.testing.assert_close(relative_penalty(s.detach(), 0.2), expected)


def test_uniformity_in_blocks(monkeypatch):
    x = torch.randn(23, 4).double()
    expected = uniformity(x)
    monkeypatch.setattr(representation, "BLOCK", 50)
    torch.testing.assert_close(uniformity(x), expected)
    z = F.normalize(x)
    torch.testing.assert_close(expected, F.pdist(z).square().mul(-2).exp().mean().log())
    assert uniformity(torch.ones(3, 2)).abs() < 1e-5


@pytest.mark.bad_input
def test_bad_input_is_named():
    a = torch.randn(4, 3)
    for call, says in [
        (lambda: InfoNCELoss(0.0), "temperature: found 0.0"),
        (lambda: InfoNCELoss(reduction="sum"), "reduction: found 'sum'"),
        (lambda: InfoNCELoss(symmetric=True)(a, a, a), "symmetric: found True"),
        (lambda: HardContrastiveLoss(alpha=0.0), "alpha: found 0.0"),
        (lambda: SimpleContrastiveLoss(alpha=1.5), "alpha: found 1.5"),
        (lambda: InfoNCELoss()(a, a[:3]), "anchors, positives: found shapes"),
        (lambda: InfoNCELoss()(a[:0], a[:0]), "anchors, positives: found shapes"),
        (lambda: InfoNCELoss()(a, a, a[:, :2]), "negatives: found shape"),
        (lambda: InfoNCELoss()(a.long(), a.long()), "anchors: found torch.int64"),
        (lambda: penalty_distribution(a[:, :0], 1.0), "negative_similarities: found shape"),
        (lambda: penalty_entropy(a, 0.0), "temperature: found 0.0"),
        (lambda: relative_penalty(a, 1.0), "similarities: found shape"),
        (lambda: uniformity(a[:1]), "embeddings: found shape"),
        (lambda: tolerance(a, torch.arange(4)), "labels: found no two samples"),
        (lambda: tolerance(a, torch.arange(4), pairs="any"), "pairs: found 'any'"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
