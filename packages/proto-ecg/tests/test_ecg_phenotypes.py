"""The phenotype analysis: golden arrays, statsmodels, scipy and scikit-learn as references, and properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score
from statsmodels.api import Logit, add_constant
from statsmodels.stats.multitest import multipletests

from proto_ecg.phenotypes import (
    PrototypePhenotyper,
    adjust_p_values,
    class_activation,
    fit_phecode_predictor,
    intra_class_distance,
    intra_class_distance_test,
    logistic_association,
    mixed_significance,
    phecode_auc,
)

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
STATISTICS = ("beta", "se", "z", "odds_ratio", "ci_low", "ci_high", "auc")


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "ecg_phenotypes.npz") as arrays_:
        return dict(arrays_)


@pytest.mark.parametrize("correction", ["bonferroni", "fdr_bh"])
def test_association_table_is_the_reference(golden, correction):
    table = PrototypePhenotyper(correction, min_cases=int(golden["min_cases"])).fit(
        golden["activations"], golden["phecodes"], golden.get("covariates")
    )
    for name in STATISTICS:
        np.testing.assert_allclose(getattr(table, name), golden[name], **CLOSE, err_msg=name)
    np.testing.assert_allclose(table.p_value, golden["p_value"], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(table.p_adjusted, golden[f"p_adjusted_{correction}"], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(table.significant, golden[f"significant_{correction}"] != 0)
    np.testing.assert_array_equal(table.n_cases, golden["n_cases"])
    np.testing.assert_array_equal(table.n_controls, golden["n_controls"])
    assert table.significant.dtype == bool
    assert table.n_cases.dtype == np.int64


def test_classes_distances_and_their_test_are_the_reference(golden):
    identity = golden["prototype_class"]
    np.testing.assert_allclose(class_activation(golden["activations"], identity), golden["class_max"], **CLOSE)
    np.testing.assert_allclose(class_activation(golden["activations"], identity, "mean"), golden["class_mean"], **CLOSE)
    cosine = intra_class_distance(golden["prototypes"], identity)
    np.testing.assert_allclose(cosine, golden["distance_cosine"], **CLOSE)
    euclidean = intra_class_distance(golden["prototypes"], identity, "euclidean")
    np.testing.assert_allclose(euclidean, golden["distance_euclidean"], **CLOSE)
    mixed = mixed_significance(golden["significant_fdr_bh"] != 0, identity)
    np.testing.assert_array_equal(mixed, golden["mixed"])
    test = intra_class_distance_test(cosine, mixed)
    np.testing.assert_allclose(test.statistic, golden["test_statistic"], **CLOSE)
    np.testing.assert_allclose(test.p_value, golden["test_p_value"], rtol=1e-5)
    np.testing.assert_allclose(test.mean_mixed, golden["test_mean_mixed"], **CLOSE)
    np.testing.assert_allclose(test.mean_uniform, golden["test_mean_uniform"], **CLOSE)
    assert [test.n_mixed, test.n_uniform] == golden["test_counts"].tolist()


def test_corrections_are_the_reference(golden):
    np.testing.assert_allclose(adjust_p_values(golden["adjust_p"]), golden["adjust_bonferroni"], **CLOSE)
    np.testing.assert_allclose(adjust_p_values(golden["adjust_p"], "fdr_bh"), golden["adjust_fdr_bh"], **CLOSE)


def test_every_golden_array_is_looked_at(golden):
    """The names in this file; an array that is added to the golden file and not tested shows up here."""
    used = {"activations", "phecodes", "covariates", "prototype_class", "min_cases", "prototypes", "p_value", "mixed"}
    used |= {*STATISTICS, "n_cases", "n_controls", "class_max", "class_mean", "distance_cosine", "distance_euclidean"}
    used |= {f"{part}_{method}" for part in ("p_adjusted", "significant") for method in ("bonferroni", "fdr_bh")}
    used |= {f"test_{part}" for part in ("statistic", "p_value", "mean_mixed", "mean_uniform", "counts")}
    used |= {"adjust_p", "adjust_bonferroni", "adjust_fdr_bh"}
    assert set(golden) <= used


def population(seed, rows=300, prototypes=3, covariates=2):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, prototypes)) * [0.01, 1, 13][:prototypes]
    extra = np.column_stack([rng.normal(60, 10, rows), rng.integers(0, 2, rows)])[:, :covariates]
    sick = (scores[:, :1] / 0.01 + rng.normal(size=(rows, 1)) > 0.5).astype(float)
    return scores, extra, sick


@pytest.mark.parametrize("covariates", [0, 2])
@pytest.mark.parametrize("standardize", [True, False])
def test_coefficients_are_statsmodels(covariates, standardize):
    scores, extra, sick = population(1, covariates=covariates)
    sick[:40] = np.nan
    table = PrototypePhenotyper(standardize=standardize).fit(scores, sick, extra if covariates else None)
    kept = ~np.isnan(sick[:, 0])
    for p in range(scores.shape[1]):
        x = (scores[:, p] - scores[:, p].mean()) / scores[:, p].std() if standardize else scores[:, p]
        design = add_constant(np.column_stack([x, extra]))[kept]
        reference = Logit(sick[kept, 0], design).fit(disp=0, tol=1e-12, maxiter=100)
        assert table.beta[p, 0] == pytest.approx(reference.params[1], rel=1e-6)
        assert table.se[p, 0] == pytest.approx(reference.bse[1], rel=1e-6)
        assert table.p_value[p, 0] == pytest.approx(reference.pvalues[1], rel=1e-5, abs=1e-12)
        low, high = np.exp(reference.conf_int()[1])
        assert (table.ci_low[p, 0], table.ci_high[p, 0]) == pytest.approx((low, high), rel=1e-6)


def test_one_association_is_a_cell_of_the_table():
    scores, extra, sick = population(2)
    z = (scores[:, 0] - scores[:, 0].mean()) / scores[:, 0].std()
    one = logistic_association(z, sick[:, 0], extra)
    table = PrototypePhenotyper().fit(scores, sick, extra)
    assert one.converged
    for name in ("beta", "se", "z", "p_value", "odds_ratio", "ci_low", "ci_high"):
        assert getattr(one, name) == pytest.approx(getattr(table, name)[0, 0], rel=1e-9)


P_VALUES = arrays(
    np.float64, st.integers(1, 20), elements=st.one_of(st.floats(0, 1), st.just(np.nan), st.sampled_from([0.0, 0.01]))
)


@settings(deadline=None, max_examples=60)
@given(P_VALUES, st.sampled_from(["bonferroni", "fdr_bh"]))
def test_corrections_are_statsmodels_over_the_finite_values(p, method):
    adjusted = adjust_p_values(p, method)
    finite = np.isfinite(p)
    np.testing.assert_array_equal(np.isnan(adjusted), ~finite)
    if finite.any():
        np.testing.assert_allclose(adjusted[finite], multipletests(p[finite], method=method)[1], rtol=1e-12)
        assert (adjusted[finite] >= p[finite] * (1 - 1e-12)).all()
        assert (adjusted[finite] <= 1).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 30))
def test_auc_is_scikit_learn_with_ties_and_missing_labels(seed, rows):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (rows, 2)).astype(float)
    labels = rng.integers(0, 2, (rows, 3)).astype(float)
    labels[rng.random((rows, 3)) < 0.2] = np.nan
    found = phecode_auc(scores, labels)
    for p in range(2):
        for k in range(3):
            kept = ~np.isnan(labels[:, k])
            if len(np.unique(labels[kept, k])) < 2:
                assert np.isnan(found[p, k])
            else:
                assert found[p, k] == pytest.approx(roc_auc_score(labels[kept, k], scores[kept, p]))
    np.testing.assert_allclose(phecode_auc(np.exp(scores), labels), found)
    order = rng.permutation(rows)
    np.testing.assert_allclose(phecode_auc(scores[order], labels[order]), found)
    np.testing.assert_allclose(phecode_auc(-scores, labels), 1 - found)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_distance_test_is_scipys_mann_whitney(seed, classes, phecodes):
    rng = np.random.default_rng(seed)
    distances = np.round(rng.random(classes), 1)
    mixed = rng.integers(-1, 3, (classes, phecodes))
    cells = np.broadcast_to(distances[:, None], mixed.shape)
    one, rest = cells[mixed == 1], cells[(mixed == 0) | (mixed == 2)]
    found = intra_class_distance_test(distances, mixed)
    assert (found.n_mixed, found.n_uniform) == (len(one), len(rest))
    if not len(one) or not len(rest):
        assert np.isnan(found.p_value)
        return
    reference = mannwhitneyu(one, rest, alternative="greater", method="asymptotic", use_continuity=True)
    assert found.statistic == pytest.approx(reference.statistic)
    if len(np.unique(np.concatenate([one, rest]))) > 1:
        assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.mean_mixed == pytest.approx(one.mean())


def test_distances_by_hand():
    points = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [5.0, 5.0]])
    identity = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])
    cosine = intra_class_distance(points, identity)
    assert cosine[0] == pytest.approx((1 + 2 + 1) / 3)
    assert np.isnan(cosine[1])
    euclidean = intra_class_distance(points, identity, "euclidean")
    assert euclidean[0] == pytest.approx((5**0.5 + 4 + 13**0.5) / 3)
    np.testing.assert_allclose(intra_class_distance(points * [[2], [3], [4], [5]], identity), cosine)
    np.testing.assert_allclose(intra_class_distance(points.reshape(4, 1, 2), identity), cosine)


def test_mixed_significance_by_hand():
    identity = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    significant = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0]]).astype(bool)
    expected = [[2, 0, 1], [0, 1, 2], [-1, -1, -1]]
    found = mixed_significance(significant, identity)
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_rows_may_come_in_any_order_and_type():
    scores, extra, sick = population(3)
    table = PrototypePhenotyper().fit(scores, sick, extra)
    order = np.random.default_rng(0).permutation(len(scores))
    again = PrototypePhenotyper().fit(scores[order], sick[order].astype(np.int8), extra[order])
    np.testing.assert_allclose(again.beta, table.beta, rtol=1e-8)
    half = torch.from_numpy(scores).bfloat16().requires_grad_()
    rounded = PrototypePhenotyper().fit(half.detach().double().numpy(), sick, extra)
    np.testing.assert_array_equal(PrototypePhenotyper().fit(half, torch.from_numpy(sick), extra).beta, rounded.beta)


def test_many_prototypes_in_blocks_are_the_same_as_one_by_one():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(120, 700))
    sick = (rng.random((120, 2)) < 0.4).astype(float)
    together = PrototypePhenotyper(min_cases=5).fit(scores, sick)
    for p in (0, 350, 699):
        alone = PrototypePhenotyper(min_cases=5).fit(scores[:, [p]], sick)
        np.testing.assert_allclose(alone.beta[0], together.beta[p], rtol=1e-9)


def test_predictor_keeps_patients_apart_and_finds_the_signal():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(150), 2)
    scores = rng.normal(size=(300, 4))
    labels = (scores[:, 0] + 0.3 * rng.normal(size=300) > 0).astype(int)
    area, model = fit_phecode_predictor(scores, labels, patients.tolist(), seed=1)
    assert area > 0.9
    scaler = model.steps[0][1]
    assert scaler.n_samples_seen_ == 240  # 120 patients of two recordings
    again, _ = fit_phecode_predictor(scores, labels, patients.tolist(), seed=1)
    assert again == area


def test_frame_is_long_and_complete():
    scores, _, sick = population(4)
    table = PrototypePhenotyper().fit(scores, sick)
    frame = table.to_frame(["a", "b", "c"], ["I48"])
    assert frame["prototype"].tolist() == ["a", "b", "c"]
    assert frame["beta"].tolist() == table.beta[:, 0].tolist()
    assert frame["n_cases"].tolist() == [int(sick.sum())] * 3
    with pytest.raises(ValueError, match="prototype_names: found 2 names, needed 3"):
        table.to_frame(["a", "b"], ["I48"])
