"""Naive Bayes and logistic regression: the authors' values, scikit-learn, streams in any order, degenerate input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB

from proto_core.classifiers import (
    GaussianNaiveBayes,
    LogisticRegressionHead,
    make_gaussian_mixture,
    sample_complexity_curve,
    samples_to_reach,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "disc_vs_gen.npz")


def batches(golden):
    return [
        tuple(torch.from_numpy(golden[f"batch{i}/{name}"]) for name in ("x", "y"))
        for i in range(int(golden["num_batches"]))
    ]


def everything(golden):
    return tuple(torch.cat(part) for part in zip(*batches(golden)))


def test_stream_equals_the_authors_code(golden):
    eps = float(golden["eps"])
    model = GaussianNaiveBayes(4, 3, eps=eps)
    for i, (x, y) in enumerate(batches(golden)):
        assert model.partial_fit(x, y) is model
        np.testing.assert_allclose(model.means, golden[f"batch{i}/means"], **EXACT)
        np.testing.assert_allclose(model.variances + eps, golden[f"batch{i}/vars_by_class"], **EXACT)
        np.testing.assert_array_equal(model.counts, golden[f"batch{i}/counts"])
        np.testing.assert_allclose(model.class_prior, golden[f"batch{i}/prior"], **EXACT)
    np.testing.assert_allclose(model.pooled_variance, golden["pooled_var"], **EXACT)
    x = torch.from_numpy(golden["test/x"])
    np.testing.assert_allclose(model.log_likelihood(x), golden["test/log_likelihood"], **EXACT)
    np.testing.assert_allclose(model(x), golden["test/logits"], **EXACT)
    np.testing.assert_array_equal(model.predict(x), golden["test/pred"])


def test_per_class_equals_scikit_learn(golden):
    keep = golden["sklearn/keep"]
    x, y = everything(golden)
    model = GaussianNaiveBayes(len(keep), 3, variance="per_class", eps=0.0).fit(x[:, keep], y)
    np.testing.assert_allclose(model.means, golden["sklearn/theta"], **EXACT)
    np.testing.assert_allclose(model.variances, golden["sklearn/var"], **EXACT)
    test = golden["test/x"][:, keep]
    np.testing.assert_allclose(model(torch.from_numpy(test)), golden["sklearn/joint_log_likelihood"], **EXACT)
    peer = GaussianNB(var_smoothing=0).fit(x[:, keep], y)
    found = model.predict_log_proba(torch.from_numpy(test))
    np.testing.assert_allclose(found, peer.predict_log_proba(test), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("strength", [1, 10])
def test_logistic_regression_equals_scikit_learn(golden, strength):
    keep = golden["sklearn/keep"]
    x, y = everything(golden)
    x = x[:, keep]
    head = LogisticRegressionHead(len(keep), 3, C=float(strength)).double().fit(x, y)
    prefix = f"logreg/C{strength}"
    np.testing.assert_allclose(head.linear.weight.detach(), golden[f"{prefix}/coef"], atol=1e-3)
    np.testing.assert_allclose(head.linear.bias.detach(), golden[f"{prefix}/intercept"], atol=1e-3)
    np.testing.assert_allclose(head.objective(x, y).detach(), golden[f"{prefix}/objective"], rtol=1e-6)
    probabilities = head(torch.from_numpy(golden["test/x"][:, keep])).softmax(1).detach()
    np.testing.assert_allclose(probabilities, golden[f"{prefix}/proba"], atol=1e-4)


def test_logistic_regression_without_intercept_and_large_offset():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(80, 5)) + 3, g.integers(0, 4, 80)
    peer = LogisticRegression(C=0.3, fit_intercept=False, tol=1e-9, max_iter=5000).fit(x, y)
    head = LogisticRegressionHead(5, 4, C=0.3, fit_intercept=False).double()
    head.fit(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(head.linear.weight.detach(), peer.coef_, atol=1e-4)
    assert head.linear.bias is None
    single = LogisticRegressionHead(5, 4).fit(torch.from_numpy(x).float(), torch.from_numpy(y))
    assert single.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_logistic_regression_answers_features_of_any_precision(kind):
    x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).to(kind), torch.arange(30) % 3
    head = LogisticRegressionHead(4, 3).fit(x, y)
    torch.testing.assert_close(head(x), head.linear(x.float()))
    errors = sample_complexity_curve(lambda: LogisticRegressionHead(4, 3), x, y, x, y, [30], repeats=1)
    assert errors.item() == pytest.approx((head.predict(x) != y).double().mean().item())


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_short_integers_are_classes_too(kind):
    x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    for make in (lambda: GaussianNaiveBayes(4, 3), lambda: LogisticRegressionHead(4, 3)):
        assert torch.equal(make().fit(x, y.to(kind)).predict(x), make().fit(x, y).predict(x))
    head = LogisticRegressionHead(4, 3)
    torch.testing.assert_close(head.objective(x, y.to(kind)), head.objective(x, y))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 40), max_size=5), offset=st.sampled_from([0.0, 1e6]))
def test_statistics_do_not_depend_on_split_or_order(seed, cuts, offset):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 3, generator=g, dtype=torch.float64) + offset, torch.randint(5, (40,), generator=g)
    whole = GaussianNaiveBayes(3, 5).fit(x, y)
    order = torch.randperm(40, generator=g)
    stream, ranks = GaussianNaiveBayes(3, 5), GaussianNaiveBayes(3, 5)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 40]):
        rows = order[start:stop]
        stream.partial_fit(x[rows], y[rows])
        ranks.merge(GaussianNaiveBayes(3, 5).fit(x[rows], y[rows]))
    for model in (stream, ranks):
        assert torch.equal(model.counts, whole.counts)
        torch.testing.assert_close(model.means, whole.means, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.variances, whole.variances, rtol=1e-7, atol=1e-9)


def test_unseen_class_is_never_predicted():
    x, y = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([0, 0, 2, 2])
    for options in ({}, {"variance": "per_class"}, {"prior": "uniform"}):
        model = GaussianNaiveBayes(1, 3, **options).fit(x, y)
        logits = model(torch.linspace(-10, 10, 9).unsqueeze(1))
        assert (logits[:, 1] == -torch.inf).all()
        assert not logits[:, [0, 2]].isnan().any()
        assert (model.predict(x) == y).all()


def test_known_by_hand():
    x, y = torch.tensor([[0.0], [2.0], [10.0]]), torch.tensor([0, 0, 1])
    model = GaussianNaiveBayes(1, 2, eps=0.0).fit(x, y)
    assert model.pooled_variance.item() == pytest.approx(2 / 3)
    expected = -0.5 * (9 / (2 / 3) + math.log(2 * math.pi * 2 / 3)) + math.log(2 / 3)
    assert model(torch.tensor([[4.0]]))[0, 0].item() == pytest.approx(expected)
    assert GaussianNaiveBayes(1, 2, prior="uniform").fit(x, y).class_prior.tolist() == [0.5, 0.5]
    narrow = GaussianNaiveBayes(1, 2, variance="per_class", eps=0.01).fit(x, y)
    expected = -0.5 * math.log(2 * math.pi * 0.01)
    assert narrow.log_likelihood(torch.tensor([[10.0]]))[0, 1].item() == pytest.approx(expected)


def test_constant_feature_and_half_precision_stay_finite():
    x, y = torch.ones(6, 2, dtype=torch.bfloat16), torch.arange(6) % 2
    model = GaussianNaiveBayes(2, 2).fit(x, y)
    assert model.means.dtype == torch.float64
    assert model(x + 1).isfinite().all()
    assert model.to(torch.float16).means.dtype == torch.float64
    assert model.state_dict()["means"].dtype == torch.float64


def test_many_samples_go_in_blocks(monkeypatch):
    x, y = torch.randn(50, 3), torch.arange(50) % 4
    model = GaussianNaiveBayes(3, 4).fit(x, y)
    expected = model(x)
    monkeypatch.setattr("proto_core.classifiers.heads.BLOCK", 30)
    assert torch.equal(model(x), expected)
    assert model(x[:0]).shape == (0, 4)


def test_subsets_hold_every_class_and_repeat():
    x, y = make_gaussian_mixture(5, 3, 30)
    seen = []

    class Head:
        def fit(self, x, y):
            seen.append(y)

        def predict(self, x):
            return torch.zeros(len(x), dtype=torch.long)

    errors = sample_complexity_curve(Head, x, y, x, y, [3, 10], repeats=4)
    assert [len(part) for part in seen] == [3, 10] * 4
    assert all(len(part.unique()) == 3 for part in seen)
    torch.testing.assert_close(errors, torch.full((4, 2), 2 / 3, dtype=torch.float64))
    first = list(seen)
    sample_complexity_curve(Head, x, y, x, y, [3, 10], repeats=4)
    assert all(torch.equal(a, b) for a, b in zip(first, seen[8:]))


def test_first_size_below_the_threshold():
    errors = torch.tensor([[0.4, 0.2, 0.1], [0.4, 0.1, 0.1]])
    assert samples_to_reach(errors, [2, 4, 8], 0.16) == 4
    assert samples_to_reach(errors, [2, 4, 8], 0.15) == 8
    assert samples_to_reach(errors, [2, 4, 8], 0.1) is None


@pytest.mark.parametrize("mode", ["easy", "hard"])
def test_simulation_has_the_moments_asked_for(mode):
    x, y = make_gaussian_mixture(6, 4, 20_000, mode=mode)
    assert x.shape == (80_000, 6)
    for k, centre in enumerate([-1, 1, 2, 4]):
        assert (x[y == k].mean(0) - centre).abs().max() < 0.1
    covariance = torch.cov((x[y == 1]).T)
    diagonal = torch.tensor([6.0, 6, 6, 1, 1, 1])
    if mode == "easy":
        torch.testing.assert_close(covariance, torch.diag(diagonal), rtol=0.05, atol=0.1)
    else:
        assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 0.2
        assert torch.equal(x, make_gaussian_mixture(6, 4, 20_000, mode=mode)[0])


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    model = GaussianNaiveBayes(2, 3)
    curve = [x, y, x, y]
    for call, says in [
        (lambda: model.predict(x), "found no sample"),
        (lambda: model.fit(x, y + 1), "targets: found 3, needed classes 0 to 2"),
        (lambda: model.fit(x * torch.nan, y), "x: found NaN"),
        (lambda: GaussianNaiveBayes(2, 3).fit(x, y).predict(x * torch.nan), "x: found NaN"),
        (lambda: model.fit(x[:, :1], y), r"x: found shape \(6, 1\)"),
        (lambda: model.fit(x, y.float()), "targets: found torch.float32"),
        (lambda: model.merge(GaussianNaiveBayes(3, 3)), "other: found sizes"),
        (lambda: GaussianNaiveBayes(2, 3, eps=-1.0), "eps: found -1.0"),
        (lambda: GaussianNaiveBayes(2, 3, variance="tied"), "variance: found 'tied'"),
        (lambda: GaussianNaiveBayes(2, 3, prior="none"), "prior: found 'none'"),
        (lambda: GaussianNaiveBayes(1, 2, eps=0.0).fit(torch.ones(2, 1), y[:2])(x[:, :1]), "variance: found 0"),
        (lambda: LogisticRegressionHead(2, 3, C=0.0), "C: found 0.0"),
        (lambda: LogisticRegressionHead(2, 1), "num_classes: found 1"),
        (lambda: LogisticRegressionHead(2, 2).fit(x, y), "targets: found 2"),
        (lambda: LogisticRegressionHead(3, 3).fit(x, y), "x: found shape"),
        (lambda: LogisticRegressionHead(2, 3).fit(x * torch.nan, y), "x: found NaN"),
        (lambda: sample_complexity_curve(lambda: model, *curve, [2]), r"sizes: found \[2\]"),
        (lambda: sample_complexity_curve(lambda: model, *curve, [7]), r"sizes: found \[7\]"),
        (lambda: sample_complexity_curve(lambda: model, *curve, [3], repeats=0), "repeats: found 0"),
        (lambda: samples_to_reach(torch.ones(2, 3), [1], 0.1), "errors: found shape"),
        (lambda: make_gaussian_mixture(2, 2, 2, mode="odd"), "mode: found 'odd'"),
        (lambda: make_gaussian_mixture(0, 2, 2), "n: found 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
