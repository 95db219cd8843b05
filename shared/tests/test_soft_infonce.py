"""Soft-InfoNCE: the authors' values for every variant, loops, limits. Arrays bm_, mrr_ and pool_ wait for proto-llm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from proto_core.losses import SoftInfoNCELoss, soft_infonce_weights
from proto_core.metrics import mean_reciprocal_rank, reciprocal_ranks

NAMES = {
    "soft": "softinfonce",
    "weighted": "weightedinfonce",
    "bce": "bce",
    "kl": "klregularization",
    "infonce": "infonce",
}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "soft_infonce.npz")


def parts(golden, case):
    q, c = (torch.from_numpy(golden[f"{case}_{name}"]).requires_grad_() for name in ("q", "c"))
    return q, c, torch.from_numpy(golden[f"{case}_sim"]), golden[f"{case}_hp"].tolist()


def tolerance(q, variant):
    if q.dtype == torch.float64:
        return {"rtol": 1e-6, "atol": 1e-8}
    return {"rtol": 1e-3, "atol": 1e-3} if variant == "bce" else {"rtol": 2e-4, "atol": 2e-5}


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("case", ["c0", "c1"])
def test_variants_equal_the_authors_code(golden, case, variant):
    q, c, similarity, (alpha, beta, temperature) = parts(golden, case)
    loss = SoftInfoNCELoss(alpha, beta, temperature, variant=variant)(q, c, similarity)
    name = f"{case}_{NAMES[variant]}"
    np.testing.assert_allclose(loss.detach(), golden[name], **tolerance(q, variant))
    for end, gradient in zip(("gq", "gc"), torch.autograd.grad(loss, (q, c))):
        np.testing.assert_allclose(gradient, golden[f"{name}_{end}"], **tolerance(q, variant))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("case", ["c0", "c1"])
def test_cancellation_and_weights_equal_the_reference(golden, case, top_k):
    q, c, similarity, hyper = parts(golden, case)
    loss = SoftInfoNCELoss(variant="cancel", top_k=top_k)(q, c, similarity)
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_cancel{top_k}"], **tolerance(q, ""))
    gradient = torch.autograd.grad(loss, q)[0]
    np.testing.assert_allclose(gradient, golden[f"{case}_cancel{top_k}_gq"], **tolerance(q, ""))
    np.testing.assert_allclose(soft_infonce_weights(similarity, *hyper), golden[f"{case}_w"], **tolerance(q, ""))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 3), temperature=st.floats(0.05, 2))
def test_soft_form_equals_its_definition(seed, alpha, temperature):
    g = torch.Generator().manual_seed(seed)
    q, c = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    similarity = torch.randn(5, 5, generator=g, dtype=torch.float64)
    expected = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        p = (similarity[i][others] / temperature).softmax(0)
        w = ((1.2 - alpha * p) / (1.2 - alpha / 4)).clamp_min(0.1)
        s = 2.0 * c @ q[i]
        expected.append(-(s[i].exp() / (s[i].exp() + (w * s[others].exp()).sum())).log())
        unclipped = soft_infonce_weights(similarity, alpha, 1.2, temperature, 0.0)
        if (1.2 - alpha * p).min() > 0:
            assert unclipped[i][others].mean().item() == pytest.approx(1.0)
    found = SoftInfoNCELoss(alpha, 1.2, temperature, score_scale=2.0)(q, c, similarity)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    order = torch.randperm(5, generator=g)
    moved = SoftInfoNCELoss(alpha, 1.2, temperature, score_scale=2.0)(q[order], c[order], similarity[order][:, order])
    torch.testing.assert_close(moved, found)


def test_without_similarity_counting_it_is_info_nce():
    q, c, similarity = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 6)
    expected = F.cross_entropy(q @ c.T, torch.arange(6))
    for loss in (
        SoftInfoNCELoss(alpha=0.0)(q, c, similarity),
        SoftInfoNCELoss(beta=3.0)(q, c, torch.ones(6, 6)),
        SoftInfoNCELoss(variant="infonce")(q, c),
        SoftInfoNCELoss(variant="kl", alpha=0.0)(q, c, similarity),
    ):
        torch.testing.assert_close(loss, expected)


def test_one_pair_has_nothing_to_tell():
    q, c, similarity = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4), torch.ones(1, 1)
    for variant in ("soft", "infonce", "cancel", "kl", "weighted", "bce"):
        loss = SoftInfoNCELoss(variant=variant)(q, c, similarity)
        assert abs(loss.item()) < 1e-6, variant
        assert torch.autograd.grad(loss, q, allow_unused=True)[0].abs().max() < 1e-6


def test_weight_zero_drops_a_negative():
    q, c = torch.eye(3), torch.eye(3)
    similarity = torch.zeros(3, 3)
    similarity[:, 1] = 40.0
    loss = SoftInfoNCELoss(alpha=1.0, beta=1.0, min_weight=0.0)(q, c, similarity)
    assert loss.isfinite()
    weights = soft_infonce_weights(similarity, 1.0, 1.0, 1.0, 0.0)
    assert weights[0, 1] == 0
    assert weights[0, 2] == 2


def test_ties_are_cancelled_lowest_index_first():
    q, c = torch.zeros(3, 2), torch.eye(3)[:, :2]
    scores = SoftInfoNCELoss(variant="cancel", top_k=1)
    assert scores._kept(torch.zeros(3, 3)).tolist() == [[True, False, True], [False, True, True], [False, True, True]]
    assert scores(q, c, torch.zeros(3, 3)).item() == pytest.approx(np.log(2))


def test_similarity_gets_no_gradient_and_large_ones_stay_finite():
    similarity = (torch.randn(4, 4) * 1e4).requires_grad_()
    q = torch.randn(4, 3, requires_grad=True)
    for variant in ("soft", "weighted", "bce", "kl", "cancel"):
        loss = SoftInfoNCELoss(beta=2.0, variant=variant)(q, q.detach(), similarity)
        gradients = torch.autograd.grad(loss, (q, similarity), allow_unused=True)
        assert gradients[0].isfinite().all()
        assert gradients[1] is None


@pytest.mark.bad_input
def test_bad_input_is_named():
    q, s = torch.randn(3, 2), torch.zeros(3, 3)
    for call, says in [
        (lambda: SoftInfoNCELoss(temperature=0.0), "temperature: found 0.0"),
        (lambda: SoftInfoNCELoss(score_scale=0.0), "score_scale: found 0.0"),
        (lambda: SoftInfoNCELoss(min_weight=-0.1), "min_weight: found -0.1"),
        (lambda: SoftInfoNCELoss(variant="hard"), "variant: found 'hard'"),
        (lambda: SoftInfoNCELoss(top_k=0), "top_k: found 0"),
        (lambda: SoftInfoNCELoss()(q, q[:2], s), "queries, codes: found shapes"),
        (lambda: SoftInfoNCELoss()(q, q), "similarity: found None"),
        (lambda: SoftInfoNCELoss()(q, q, s[:2]), "similarity: found shape"),
        (lambda: SoftInfoNCELoss()(q, q, s * torch.nan), "similarity: found NaN"),
        (lambda: SoftInfoNCELoss()(q, q, s + torch.inf), "similarity: found NaN or infinite"),
        (lambda: SoftInfoNCELoss(alpha=2.0)(q, q, s), "beta: found 1.0 with alpha 2.0"),
        (lambda: SoftInfoNCELoss()(q[:2], q[:2], s[:2, :2]), "beta: found 1.0 with alpha 1.0 and 1 negatives"),
        (lambda: SoftInfoNCELoss(variant="cancel", top_k=2)(q, q, s), "top_k: found 2 of 2"),
        (lambda: soft_infonce_weights(s, 1.0, 1.0, 0.0), "temperature: found 0.0"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_reciprocal_ranks_equal_the_authors_code(golden_dir):
    golden = np.load(golden_dir / "soft_infonce.npz")
    query, gallery, names, codes = (torch.from_numpy(golden[f"mrr_{name}"]) for name in ("q", "c", "qu", "cu"))
    cutoff = int(golden["mrr_cut"])
    found = reciprocal_ranks(query, gallery, names, codes, cutoff)
    np.testing.assert_allclose(found.numpy(), golden["mrr_rr"], rtol=1e-9)
    assert mean_reciprocal_rank(query, gallery, names, codes, cutoff) == pytest.approx(float(golden["mrr"]))
    within = reciprocal_ranks(query, gallery, names, codes, cutoff=3)
    assert torch.equal(within, torch.where(found >= 1 / 3 - 1e-12, found, 0.0))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), cutoff=st.integers(1, 12))
def test_reciprocal_ranks_are_places_in_a_stable_sort(seed, cutoff):
    """Small integers make many ties."""
    g = np.random.default_rng(seed)
    query, gallery = g.integers(-1, 2, (7, 2)).astype(float), g.integers(-1, 2, (9, 2)).astype(float)
    names, codes = g.integers(0, 5, 7), g.integers(0, 4, 9)  # some have no code at all
    order = np.argsort(-query @ gallery.T, axis=1, kind="stable")
    expected = []
    for row, name in zip(order, names):
        places = [place for place, column in enumerate(row, 1) if codes[column] == name]
        expected.append(1 / places[0] if places and places[0] <= cutoff else 0.0)
    found = reciprocal_ranks(*map(torch.from_numpy, (query, gallery, names, codes)), cutoff)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_reciprocal_ranks_refuse():
    x, y = torch.eye(2), torch.arange(2)
    with pytest.raises(ValueError, match="cutoff: found 0"):
        reciprocal_ranks(x, x, y, y, cutoff=0)
    with pytest.raises(ValueError, match="query: found no row"):
        mean_reciprocal_rank(x[:0], x, y[:0], y)
