"""Multi-Similarity Loss and pair weights: the authors' values, definitions as loops, pytorch-metric-learning, edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as peer

from proto_core.losses import MultiSimilarityLoss, gpw_surrogate, multi_similarity_mining, pair_weights

LOSSES = ["contrastive", "triplet", "lifted_structure", "binomial_deviance", "n_pair", "multi_similarity"]


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "multi_similarity.npz")


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_equals_the_authors_code(golden, case):
    x = torch.from_numpy(golden[f"{case}_x"]).requires_grad_()
    labels = torch.from_numpy(golden[f"{case}_y"])
    alpha, beta, base, margin = golden[f"{case}_hp"].tolist()
    mining = bool(golden[f"{case}_mining"])
    loss = MultiSimilarityLoss(alpha, beta, base, margin, mining)(x, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if x.dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-5}
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_loss"], **tolerance)
    np.testing.assert_allclose(gradient, golden[f"{case}_grad"], **tolerance)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_weights_over_kept_pairs(golden, case):
    """The gradient by the similarities themselves, times N, is the weight of the kept pairs."""
    x = torch.from_numpy(golden[f"{case}_x"])
    labels = torch.from_numpy(golden[f"{case}_y"])
    alpha, beta, base, margin = golden[f"{case}_hp"].tolist()
    unit = x / x.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    same = labels.unsqueeze(1) == labels
    if golden[f"{case}_mining"]:
        positive, negative = multi_similarity_mining(similarity, labels, margin)
    else:
        positive, negative = same & ~torch.eye(len(x), dtype=torch.bool), ~same
    free = similarity.double().requires_grad_()
    loss = free.sum() * 0
    for i in range(len(x)):
        loss = loss + torch.log1p((-alpha * (free[i][positive[i]] - base)).exp().sum()) / alpha
        loss = loss + torch.log1p((beta * (free[i][negative[i]] - base)).exp().sum()) / beta
    (weights,) = torch.autograd.grad(loss, free)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if x.dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-5}
    np.testing.assert_allclose(weights.abs(), golden[f"{case}_w"], **tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_pair_weights_equal_the_golden_ones(golden, loss):
    hyper = {
        name: float(golden[f"pw_{loss}_{name}"]) for name in ("alpha", "beta", "lam") if f"pw_{loss}_{name}" in golden
    }
    similarity, labels = torch.from_numpy(golden["pw_S"]), torch.from_numpy(golden["pw_y"])
    found = pair_weights(similarity, labels, loss, **hyper)
    np.testing.assert_allclose(found, golden[f"pw_{loss}"], rtol=1e-6, atol=1e-8)
    expected = slow(loss, similarity, labels, **hyper)
    np.testing.assert_allclose(expected, golden[f"pw_{loss}_loss"], rtol=1e-6)


def slow(loss, s, y, alpha=2.0, beta=50.0, lam=0.5):
    """Each loss of the frame as its definition, anchor by anchor."""
    total = s.sum() * 0
    for i in range(len(y)):
        p = [j for j in range(len(y)) if j != i and y[j] == y[i]]
        n = [j for j in range(len(y)) if y[j] != y[i]]
        sp, sn = s[i][p], s[i][n]
        if loss == "contrastive":
            total = total - sp.sum() + (sn - lam).relu().sum()
        elif loss == "triplet":
            total = total + (sn.unsqueeze(0) - sp.unsqueeze(1) + lam).relu().sum()
        elif loss == "lifted_structure":
            total = total + ((lam - sp).logsumexp(0) + sn.logsumexp(0)).relu() if p and n else total
        elif loss == "binomial_deviance":
            total = total + (torch.nn.functional.softplus(alpha * (lam - sp)).mean() if p else 0)
            total = total + (torch.nn.functional.softplus(beta * (sn - lam)).mean() if n else 0)
        elif loss == "n_pair":
            total = total + torch.log1p((sn.unsqueeze(0) - sp.unsqueeze(1)).exp().sum(1)).sum()
        else:
            total = total + torch.log1p((-alpha * (sp - lam)).exp().sum()) / alpha
            total = total + torch.log1p((beta * (sn - lam)).exp().sum()) / beta
    return total


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 9))
def test_pair_weights_are_the_loss_gradient(loss, seed, size):
    g = torch.Generator().manual_seed(seed)
    similarity = torch.rand(size, size, generator=g, dtype=torch.float64) * 2 - 1
    labels = torch.randint(3, (size,), generator=g)
    hyper = {"lam": 0.3} if loss != "n_pair" else {}
    hyper |= {"alpha": 1.5, "beta": 20.0} if loss in ("binomial_deviance", "multi_similarity") else {}
    weights = pair_weights(similarity, labels, loss, **hyper)
    free = similarity.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(slow(loss, free, labels, **hyper), free)
    torch.testing.assert_close(weights, gradient.abs(), rtol=1e-9, atol=1e-12)
    (again,) = torch.autograd.grad(gpw_surrogate(free, labels, weights), free)
    torch.testing.assert_close(again, gradient, rtol=1e-9, atol=1e-12)
    assert not weights.requires_grad


def loop(x, labels, alpha, beta, base, margin, mining, duplicate_eps):
    """The loss as its definition, anchor by anchor."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = x @ x.T
    total = 0.0
    for i in range(len(x)):
        p = [j for j in range(len(x)) if j != i and labels[j] == labels[i]]
        p = [j for j in p if duplicate_eps is None or s[i, j] < 1 - duplicate_eps]
        n = [j for j in range(len(x)) if labels[j] != labels[i]]
        if mining:
            if not p or not n:
                continue
            low, high = min(s[i, p]), max(s[i, n])
            p, n = [j for j in p if s[i, j] - margin < high], [j for j in n if s[i, j] + margin > low]
            if not p or not n:
                continue
        total += np.log1p(sum(np.exp(-alpha * (s[i, j] - base)) for j in p)) / alpha
        total += np.log1p(sum(np.exp(beta * (s[i, j] - base)) for j in n)) / beta
    return total / len(x)


@pytest.mark.parametrize("mining", [True, False])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 12))
def test_equals_the_definition(mining, seed, size):
    g = np.random.default_rng(seed)
    x, labels = g.normal(size=(size, 4)), g.integers(0, 3, size)
    x[size // 2] = x[0] * 2  # a duplicate
    arguments = (2.0, 30.0, 0.4, 0.2, mining)
    found = MultiSimilarityLoss(*arguments)(torch.from_numpy(x), torch.from_numpy(labels))
    np.testing.assert_allclose(float(found), loop(x, labels, *arguments, 1e-5), rtol=1e-10, atol=1e-12)


def test_agrees_with_pytorch_metric_learning_without_mining():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(20, 8, generator=g), torch.arange(20) % 4
    expected = peer.MultiSimilarityLoss(alpha=2, beta=50, base=1.0)(x, labels)
    found = MultiSimilarityLoss(beta=50, base=1.0, mining=False, duplicate_eps=None)(x, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_active_is_zero_with_a_graph():
    x = torch.eye(3).repeat(2, 1).requires_grad_()
    for batch, labels in [(x, torch.arange(6) % 3), (x[:1], torch.zeros(1, dtype=torch.long))]:
        loss = MultiSimilarityLoss()(batch, labels)
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient == 0).all()


def test_one_class_has_positives_only_without_mining():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.zeros(2, dtype=torch.long)
    assert MultiSimilarityLoss()(x, labels) == 0
    expected = torch.log1p(torch.tensor(2 * 0.5).exp()) / 2
    torch.testing.assert_close(MultiSimilarityLoss(mining=False)(x, labels), expected)


def test_duplicates_are_no_positives_unless_kept():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    without = MultiSimilarityLoss(mining=False)(x, labels)
    kept = MultiSimilarityLoss(mining=False, duplicate_eps=None)(x, labels)
    torch.testing.assert_close(kept - without, 2 * torch.log1p(torch.tensor(-1.0).exp()) / 2 / 3)


def test_zero_row_and_large_numbers_stay_finite():
    x = torch.tensor([[0.0, 0.0], [1e20, 0.0], [1.0, 0.01], [-1.0, 0.0]], requires_grad=True)
    loss = MultiSimilarityLoss(beta=1000.0)(x, torch.tensor([0, 0, 1, 1]))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_surrogate_trains_like_the_loss():
    """Only the kept pairs' weights differ from the unmined ones."""
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.arange(8) % 2
    unit = torch.nn.functional.normalize(x)
    similarity = unit @ unit.T
    (one,) = torch.autograd.grad(
        gpw_surrogate(similarity, labels, pair_weights(similarity, labels, "multi_similarity")), x, retain_graph=True
    )
    loss = MultiSimilarityLoss(mining=False, duplicate_eps=None)(x, labels)
    torch.testing.assert_close(one / 8, torch.autograd.grad(loss, x)[0])


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)
    for settings_, name in [({"alpha": 0}, "alpha"), ({"beta": -1}, "beta"), ({"margin": -0.1}, "margin")]:
        with pytest.raises(ValueError, match=f"{name}: found"):
            MultiSimilarityLoss(**settings_)
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2,\)"):
        MultiSimilarityLoss()(x, labels[:2])
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        MultiSimilarityLoss()(x[:0], labels[:0])
    with pytest.raises(ValueError, match=r"loss: found 'ranked_list'"):
        pair_weights(torch.ones(3, 3), labels, "ranked_list")
    with pytest.raises(ValueError, match="margin: found for 'triplet'"):
        pair_weights(torch.ones(3, 3), labels, "triplet", margin=0.1)
    with pytest.raises(ValueError, match="alpha: found 0"):
        pair_weights(torch.ones(3, 3), labels, "multi_similarity", alpha=0)
    for call in (pair_weights, gpw_surrogate):
        with pytest.raises(ValueError, match=r"similarity: found shape \(3, 2\)"):
            call(x, labels, "triplet" if call is pair_weights else x)
    with pytest.raises(ValueError, match=r"weights: found shape \(2, 2\)"):
        gpw_surrogate(torch.ones(3, 3), labels, torch.ones(2, 2))
    with pytest.raises(ValueError, match="margin: found -1"):
        multi_similarity_mining(torch.ones(3, 3), labels, -1)
