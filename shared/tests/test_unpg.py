"""UNPG: the authors' values, loops over rows and pairs, pytorch-metric-learning's margin heads, verification."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as peer
from torch.nn import functional as F

from proto_core.losses import UNPGLoss, box_whisker_filter, margin
from proto_core.metrics import (
    VerificationMetrics,
    best_threshold_accuracy,
    equal_error_rate,
    rank1_accuracy,
    tar_at_far,
    template_features,
)

KINDS = ("arcface", "cosface", "magface")


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "unpg.npz")


def from_golden(golden, case):
    x, y, weight = (torch.from_numpy(golden[f"{case}_{name}"]) for name in ("x", "y", "W"))
    hyper = {name.split("_h_")[1]: float(golden[name]) for name in golden.files if name.startswith(f"{case}_h_")}
    whisker = float(golden[f"{case}_wisk"])
    loss = UNPGLoss(
        x.shape[1],
        len(weight),
        KINDS[int(golden[f"{case}_kind"])],
        whisker=None if whisker < 0 else whisker,
        negatives="unified" if golden[f"{case}_aux"] else "class",
        **hyper,
    ).to(x.dtype)
    loss.weight.data.copy_(weight)
    return loss, x, y


@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3", "c4"])
def test_equals_the_authors_code(golden, case, blocks):
    loss, x, y = from_golden(golden, case)
    loss.chunk_size = blocks
    x.requires_grad_()
    found = loss(x, y)
    gradients = torch.autograd.grad(found, (x, loss.weight))
    for value, name in [(found, "loss"), (loss.cosine(x, y), "cos"), *zip(gradients, ("grad_x", "grad_W"))]:
        expected = golden[f"{case}_{name}"]
        size = max(1.0, float(np.abs(expected).max()))
        wide = x.dtype == torch.float64
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if wide else {"rtol": 2e-4, "atol": 2e-4 * size}
        np.testing.assert_allclose(value.detach(), expected, **tolerance, err_msg=name)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3", "c4"])
def test_filter_equals_the_authors_code(golden, case):
    loss, x, y = from_golden(golden, case)
    unit = F.normalize(x)
    one, two = torch.triu_indices(len(x), len(x), 1)
    differ = y[one] != y[two]
    kept = box_whisker_filter((unit @ unit.T)[one, two][differ], loss.whisker)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if x.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    np.testing.assert_allclose(kept, golden[f"{case}_sn_kept"], **tolerance)


def loop(loss, x, y):
    """The unified loss row by row with all kept pairs as logits of their own."""
    x, weight = x.double(), loss.weight.detach().double()
    unit, w = F.normalize(x), F.normalize(weight)
    pairs = [unit[i] @ unit[j] for i in range(len(x)) for j in range(i + 1, len(x)) if y[i] != y[j]]
    pairs = torch.stack(sorted(pairs, key=float)) if pairs else x.new_zeros(0)
    if loss.whisker is not None and len(pairs):
        q1, q3 = pairs[int(0.25 * len(pairs))], pairs[int(0.75 * len(pairs))]
        iqr = q3 - q1
        pairs = pairs[(pairs >= q1 - loss.whisker * iqr) & (pairs <= q3 + loss.whisker * iqr)]
    rows = []
    for i in range(len(x)):
        c = w @ unit[i]
        own = float(c[y[i]])
        if loss.margin == "cosface":
            new = own - loss.m
        elif loss.margin == "arcface":
            new = math.cos(math.acos(own) + loss.m)
        else:
            a = float(x[i].norm().clamp(loss.l_a, loss.u_a))
            m = (loss.u_margin - loss.l_margin) / (loss.u_a - loss.l_a) * (a - loss.l_a) + loss.l_margin
            new = math.cos(math.acos(own) + m) if own > 0 else own
        c = c.clone()
        c[y[i]] = new
        z = loss.s * torch.cat([c, pairs])
        row = z.logsumexp(0) - z[y[i]]
        if loss.margin == "magface":
            row = row + loss.lambda_g * (a / loss.u_a**2 + 1 / a)
        rows.append(row)
    return torch.stack(rows).mean()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 9), whisker=st.sampled_from([None, 0.0, 0.4, 1.5]))
def test_equals_the_definition(kind, seed, count, whisker):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g, dtype=torch.float64) * 20
    y = torch.randint(3, (count,), generator=g)
    torch.manual_seed(seed)
    loss = UNPGLoss(4, 3, kind, s=20.0, whisker=whisker).double()
    expected = loop(loss, x, y)
    torch.testing.assert_close(loss(x, y).detach(), expected, rtol=1e-9, atol=1e-9)
    loss.chunk_size = 2
    torch.testing.assert_close(loss(x, y).detach(), expected, rtol=1e-9, atol=1e-9)


def test_quartiles_of_many_pairs_in_blocks():
    """Bins of the histogram that hold many and few values; equal similarities."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=g, dtype=torch.float64)
    x[:100] = x[0]
    y = torch.arange(300) % 7
    whole = UNPGLoss(3, 7, whisker=0.3).double()
    blocks = UNPGLoss(3, 7, whisker=0.3, chunk_size=64).double()
    blocks.load_state_dict(whole.state_dict())
    torch.testing.assert_close(blocks(x, y), whole(x, y), rtol=1e-12, atol=1e-12)


def test_in_blocks_gradients_are_finite_where_all_pairs_are_opposite():
    g = torch.Generator().manual_seed(0)
    side = torch.tensor([1.0, -1.0]).repeat(4)
    x = (torch.tensor([[1.0, 0.0, 0.0]]) + 0.01 * torch.randn(8, 3, generator=g)) * side[:, None]
    y = (side < 0).long()
    gradients = []
    for blocks in (None, 3):
        loss = UNPGLoss(3, 2, chunk_size=blocks)
        loss.weight.data.copy_(torch.eye(3)[:2])
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf, y), leaf)[0])
    assert gradients[1].isfinite().all()
    torch.testing.assert_close(*gradients)


def test_large_batches_go_in_blocks_by_themselves(monkeypatch):
    monkeypatch.setattr(margin, "AT_ONCE", 4)
    seen = []
    monkeypatch.setattr(
        margin, "_streamed_fences", lambda *a: seen.append(1) or (torch.tensor(-1.0), torch.tensor(1.0))
    )
    UNPGLoss(3, 2)(torch.randn(6, 3), torch.arange(6) % 2)
    assert seen


@pytest.mark.parametrize("kind, head", [("arcface", peer.ArcFaceLoss), ("cosface", peer.CosFaceLoss)])
def test_class_negatives_agree_with_pytorch_metric_learning(kind, head):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=g), torch.arange(16) % 4
    other = head(4, 6, margin=math.degrees(0.3) if kind == "arcface" else 0.3, scale=16)
    loss = UNPGLoss(6, 4, kind, s=16.0, m=0.3, negatives="class")
    loss.weight.data.copy_(other.W.data.T)
    torch.testing.assert_close(loss(x, y), other(x, y), rtol=1e-4, atol=1e-4)


def test_without_pairs_it_is_the_plain_head():
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    for blocks in (None, 2):
        unified, plain = UNPGLoss(3, 2, chunk_size=blocks), UNPGLoss(3, 2, negatives="class")
        plain.load_state_dict(unified.state_dict())
        for rows in (slice(0, 5), slice(0, 1)):
            torch.testing.assert_close(unified(x[rows], y[rows]), plain(x[rows], y[rows]))


def test_on_and_opposite_the_class_weight_gradients_are_finite():
    for kind in KINDS:
        loss = UNPGLoss(2, 2, kind)
        loss.weight.data.copy_(torch.eye(2))
        x = torch.tensor([[20.0, 0.0], [-20.0, 0.0], [0.0, 0.0]], requires_grad=True)
        found = loss(x, torch.tensor([0, 0, 1]))
        assert found.isfinite()
        for gradient in torch.autograd.grad(found, (x, loss.weight)):
            assert gradient.isfinite().all()


def test_no_correction_beyond_pi():
    loss = UNPGLoss(2, 2, "arcface", m=0.5).double()
    loss.weight.data.copy_(torch.eye(2))
    theta = math.pi - 0.2
    x = torch.tensor([[math.cos(theta), math.sin(theta)]]).double()
    assert loss.cosine(x, torch.tensor([0]))[0, 0].item() == pytest.approx(math.cos(theta + 0.5))


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_short_integers_are_labels_too(kind):
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    loss = UNPGLoss(3, 4)
    torch.testing.assert_close(loss(x, y.to(kind)), loss(x, y))
    torch.testing.assert_close(loss.cosine(x, y.to(kind)), loss.cosine(x, y))


def test_magface_weights_start_on_the_sphere():
    torch.testing.assert_close(UNPGLoss(8, 5, "magface").weight.norm(dim=1), torch.ones(5))


def test_filter_by_hand():
    values = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert box_whisker_filter(values, 1.5).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert box_whisker_filter(values, 0.0).tolist() == [2.0, 3.0, 4.0, 5.0]
    assert box_whisker_filter(values, None).tolist() == values.tolist()
    assert box_whisker_filter(values[:1], 1.5).tolist() == [5.0]
    assert box_whisker_filter(values[:0], 1.5).tolist() == []
    equal = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])
    assert box_whisker_filter(equal, 3.0).tolist() == [1.0] * 4


def test_verification_equals_the_authors_code(golden):
    scores, labels, fars = golden["v_scores"], golden["v_labels"], golden["v_fars"]
    np.testing.assert_allclose(tar_at_far(scores, labels, fars), golden["v_tar_nearest"], atol=1e-6)
    np.testing.assert_allclose(tar_at_far(scores, labels, fars, mode="upper"), golden["v_tar_upper"], atol=1e-6)
    assert equal_error_rate(scores, labels) == pytest.approx(float(golden["v_eer"]), abs=1e-6)
    accuracy, threshold = best_threshold_accuracy(scores, labels)
    assert accuracy == pytest.approx(float(golden["v_best_acc"]), abs=1e-6)
    assert threshold == pytest.approx(float(golden["v_best_th"]), abs=1e-6)


def test_rank1_and_templates_equal_the_reference(golden):
    parts = [torch.from_numpy(golden[f"r1_{name}"]) for name in ("q", "yq", "g", "yg")]
    assert rank1_accuracy(*parts) == pytest.approx(float(golden["r1"]))
    found, ids = template_features(*(torch.from_numpy(golden[f"t_{name}"]) for name in ("f", "t", "m")))
    np.testing.assert_allclose(found, golden["t_out"], atol=1e-6)
    np.testing.assert_array_equal(ids, golden["t_ids"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 12))
def test_rates_equal_their_definitions_with_ties(seed, count):
    g = np.random.default_rng(seed)
    scores, labels = g.integers(0, 5, count) / 4, np.r_[0, 1, g.integers(0, 2, count - 2)]
    alike, other = scores[labels == 1], scores[labels == 0]
    thresholds = [np.inf, *sorted(set(scores), reverse=True)]
    points = [((other >= t).mean(), (alike >= t).mean()) for t in thresholds]
    for far in (0.0, 0.3, 0.5, 1.0):
        expected = max(true for false, true in points if false <= far)
        assert tar_at_far(scores, labels, [far], mode="upper").item() == pytest.approx(expected)
    gaps = [false - (1 - true) for false, true in points]
    k = next(i for i, gap in enumerate(gaps) if gap >= 0)
    share = 0 if gaps[k] == 0 else gaps[k] / (gaps[k] - gaps[k - 1])
    expected = points[k][0] if gaps[k] == 0 else points[k][0] - share * (points[k][0] - points[k - 1][0])
    assert equal_error_rate(scores, labels) == pytest.approx(expected)
    accuracies = [((scores >= t) == labels).mean() for t in scores]
    assert best_threshold_accuracy(scores, labels) == pytest.approx((max(accuracies), scores[np.argmax(accuracies)]))


def test_plain_numbers_keep_their_precision():
    assert best_threshold_accuracy([0.9, 0.3, 0.7], [1, 0, 0]) == (1.0, 0.9)
    assert best_threshold_accuracy([0.3, 0.9, 0.7], [1, 1, 0]) == (2 / 3, 0.3)
    assert equal_error_rate([0.9, 0.9 - 1e-12], [1, 0]) == 0.0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 40))
def test_metric_does_not_depend_on_the_split(seed, cut):
    g = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(40, generator=g), torch.arange(40) % 2
    metric = VerificationMetrics(fars=(0.1,))
    for rows in (slice(0, cut), slice(cut, 40)):
        metric.update(scores[rows], labels[rows])
    found = metric.compute()
    assert found["eer"] == equal_error_rate(scores, labels)
    assert found["tar@0.1"] == tar_at_far(scores, labels, [0.1], mode="upper").item()
    assert (found["accuracy"], found["threshold"]) == best_threshold_accuracy(scores, labels)


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, y = torch.randn(4, 3), torch.arange(4) % 2
    s, one = [0.1, 0.9], [1, 0]
    for call, says in [
        (lambda: UNPGLoss(3, 2, s=0.0), "s: found 0.0"),
        (lambda: UNPGLoss(3, 2, whisker=-1.0), "whisker: found -1.0"),
        (lambda: UNPGLoss(3, 2, margin="sphereface"), "margin: found 'sphereface'"),
        (lambda: UNPGLoss(3, 2, negatives="pairs"), "negatives: found 'pairs'"),
        (lambda: UNPGLoss(3, 2, l_a=10.0, u_a=10.0), "u_a: found 10.0"),
        (lambda: UNPGLoss(3, 2)(x, y + 1), "targets: found 2, needed classes 0 to 1"),
        (lambda: UNPGLoss(3, 2)(x, y - 1), "targets: found -1"),
        (lambda: UNPGLoss(4, 2)(x, y), "embeddings: found 3 features, needed 4"),
        (lambda: UNPGLoss(3, 2)(x[:0], y[:0]), "embeddings, targets: found shapes"),
        (lambda: box_whisker_filter(x, 1.0), "similarities: found shape"),
        (lambda: box_whisker_filter(x[0] * torch.nan, 1.0), "similarities: found NaN"),
        (lambda: tar_at_far(s, [1, 1], [0.1]), "labels: found 2 of 2 pairs alike"),
        (lambda: tar_at_far([0.1, math.nan], one, [0.1]), "scores: found 1 NaN"),
        (lambda: tar_at_far(s, one, [1.5]), "fars: found"),
        (lambda: tar_at_far(s, one, [0.5], mode="lower"), "mode: found 'lower'"),
        (lambda: equal_error_rate(s, [1]), "scores, labels: found shapes"),
        (lambda: best_threshold_accuracy(s, [2, 0]), "labels: found values other than 0 and 1"),
        (lambda: rank1_accuracy(x, y[:2], x, y), "query_ids: found shape"),
        (lambda: template_features(x, y[:2], y), "features, templates, medias: found shapes"),
        (lambda: VerificationMetrics(fars=(2.0,)), "fars: found"),
        (lambda: VerificationMetrics(mode="any"), "mode: found 'any'"),
        (lambda: VerificationMetrics().compute(), "no batch"),
        (lambda: VerificationMetrics().update(x, y), "scores, labels: found shapes"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
