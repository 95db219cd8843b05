"""The phenotype analysis: golden arrays, statsmodels, scipy and scikit-learn as references, and properties."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import mannwhitneyu, norm
from sklearn.linear_model import LogisticRegression
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

STATISTICS = ("beta", "se", "z", "p_value", "odds_ratio", "ci_low", "ci_high", "auc", "n_cases", "n_controls")
CORRECTIONS = ("bonferroni", "fdr_bh")
METRICS = ("cosine", "euclidean")
TEST = ("statistic", "p_value", "mean_mixed", "mean_uniform", "counts")
OUTPUTS = (
    *STATISTICS,
    *(f"{part}_{name}" for name in CORRECTIONS for part in ("p_adjusted", "significant", "adjust")),
    *(f"class_{reduce}" for reduce in ("max", "mean")),
    *(f"distance_{metric}" for metric in METRICS),
    "mixed",
    *(f"test_{part}" for part in TEST),
)


class Reads(dict):
    """Golden arrays that note which of them were looked up."""

    def __init__(self, *values):
        super().__init__(*values)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "ecg_phenotypes.npz") as stored:
        return Reads(stored)


@pytest.fixture(scope="module")
def found(golden):
    """Ours for every golden output, and in ``read`` the golden arrays it was made from."""
    golden.names.clear()
    result, identity = {}, golden["prototype_class"]
    for correction in CORRECTIONS:
        table = PrototypePhenotyper(correction, min_cases=int(golden["min_cases"])).fit(
            golden["activations"], golden["phecodes"], golden["covariates"]
        )
        result |= {name: getattr(table, name) for name in STATISTICS}
        result[f"p_adjusted_{correction}"] = table.p_adjusted
        result[f"significant_{correction}"] = table.significant
        result[f"adjust_{correction}"] = adjust_p_values(golden["adjust_p"], correction)
    for reduce in ("max", "mean"):
        result[f"class_{reduce}"] = class_activation(golden["activations"], identity, reduce)
    for metric in METRICS:
        result[f"distance_{metric}"] = intra_class_distance(golden["prototypes"], identity, metric)
    result["mixed"] = mixed_significance(golden["significant_fdr_bh"] != 0, identity)
    test = intra_class_distance_test(golden["distance_cosine"], golden["mixed"])
    result |= {f"test_{name}": getattr(test, name) for name in TEST[:-1]}
    result["test_counts"] = [test.n_mixed, test.n_uniform]
    return result | {"read": set(golden.names)}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_is_the_golden_array(golden, found, name):
    expected = golden[name]
    if expected.dtype.kind == "i":
        np.testing.assert_array_equal(np.asarray(found[name]), expected)
        return
    tolerance = {"rtol": 1e-5, "atol": 0} if "p_" in name else {"rtol": 1e-6, "atol": 1e-9}
    np.testing.assert_allclose(found[name], expected, **tolerance)


def test_no_golden_array_is_left_out(golden, found):
    assert set(golden) == found["read"] | set(OUTPUTS)


def test_golden_cells_hold_both_answers(golden):
    """The arrays can tell: some cells are significant and some not, some not fitted, some classes mixed."""
    for name in CORRECTIONS:
        assert 0 < golden[f"significant_{name}"].sum() < golden["beta"].size
    assert np.isnan(golden["phecodes"]).any()
    assert np.isnan(golden["adjust_p"]).any()
    assert {0, 1} <= set(golden["mixed"].ravel().tolist())


def test_types_are_those_promised(found):
    for name, value in found.items():
        wanted = {"n_cases": np.int64, "n_controls": np.int64, "mixed": np.int64}.get(name, np.float64)
        if isinstance(value, np.ndarray):
            assert value.dtype == (bool if name.startswith("significant") else wanted), name


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
        np.testing.assert_allclose(
            adjusted[finite], multipletests(p[finite], method=method)[1], rtol=1e-12, atol=1e-300
        )
        assert (adjusted[finite] >= p[finite]).all()
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


seeds = st.integers(0, 10_000)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([1e-3, 0.5, 40.0]), st.sampled_from([-1e4, 0.0, 7.0]))
def test_one_association_under_change_of_unit_and_side(seed, scale, shift):
    scores, extra, sick = population(seed, prototypes=2)
    x, y = scores[:, 1], sick[:, 0]
    plain = logistic_association(x, y, extra)
    moved = logistic_association(scale * x + shift, y, extra)
    assert (moved.beta * scale, moved.se * scale, moved.z) == pytest.approx((plain.beta, plain.se, plain.z), rel=1e-6)
    for flipped in (logistic_association(-x, y, extra), logistic_association(x, 1 - y, extra)):
        assert (flipped.beta, flipped.se, flipped.p_value) == pytest.approx((-plain.beta, plain.se, plain.p_value))
        assert flipped.odds_ratio == pytest.approx(1 / plain.odds_ratio)
    twice = logistic_association(np.tile(x, 2), np.tile(y, 2), np.tile(extra, (2, 1)))
    assert (twice.beta, twice.se) == pytest.approx((plain.beta, plain.se / 2**0.5))


def test_odds_ratio_and_error_of_a_fourfold_table():
    """Counts 30, 10, 20, 40: the odds ratio is the cross product, the error the root of the summed reciprocals."""
    x, y = np.repeat([0, 0, 1, 1], [30, 10, 20, 40]), np.repeat([0, 1, 0, 1], [30, 10, 20, 40])
    result = logistic_association(x, y)
    assert result.odds_ratio == pytest.approx(30 * 40 / (10 * 20))
    assert result.se == pytest.approx((1 / 30 + 1 / 10 + 1 / 20 + 1 / 40) ** 0.5)
    assert result.z == pytest.approx(np.log(6) / result.se)
    assert result.p_value == pytest.approx(2 * norm.sf(result.z))
    low, high = (np.exp(result.beta + sign * 1.959963984540054 * result.se) for sign in (-1, 1))
    assert (result.ci_low, result.ci_high) == pytest.approx((low, high))


@settings(deadline=None, max_examples=40)
@given(P_VALUES)
def test_corrections_bound_each_other_and_keep_the_order(p):
    bonferroni, stepped = adjust_p_values(p, "bonferroni"), adjust_p_values(p, "fdr_bh")
    finite = np.isfinite(p)
    assert (stepped[finite] <= bonferroni[finite]).all()
    assert (stepped[finite] >= p[finite]).all()
    order = np.argsort(p[finite], kind="stable")
    for adjusted in (bonferroni, stepped):
        assert (np.diff(adjusted[finite][order]) >= 0).all()
    padded = np.concatenate([p, [np.nan] * 3])
    np.testing.assert_array_equal(adjust_p_values(padded, "fdr_bh")[: len(p)], stepped)
    np.testing.assert_array_equal(adjust_p_values(p.reshape(1, -1), "fdr_bh")[0], stepped)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 8))
def test_distances_are_loops_over_pairs_and_cosine_ignores_length(seed, prototypes):
    rng = np.random.default_rng(seed)
    points, identity = rng.normal(size=(prototypes, 5)), rng.integers(0, 2, (prototypes, 3))
    cosine, euclidean = intra_class_distance(points, identity), intra_class_distance(points, identity, "euclidean")
    for c in range(3):
        pairs = list(combinations(points[identity[:, c] == 1], 2))
        if not pairs:
            assert np.isnan([cosine[c], euclidean[c]]).all()
            continue
        each = [1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]
        assert cosine[c] == pytest.approx(np.mean(each))
        assert euclidean[c] == pytest.approx(np.mean([np.linalg.norm(a - b) for a, b in pairs]))
    scaled = points * rng.uniform(0.01, 100, (prototypes, 1))
    np.testing.assert_allclose(intra_class_distance(scaled, identity), cosine, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(intra_class_distance(3 * points, identity, "euclidean"), 3 * euclidean)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_statuses_and_class_activations_are_loops(seed, prototypes, classes):
    rng = np.random.default_rng(seed)
    significant, identity = rng.integers(0, 2, (prototypes, 3)), rng.integers(0, 2, (prototypes, classes))
    scores = rng.normal(size=(4, prototypes))
    status = mixed_significance(significant, identity)
    largest, mean = class_activation(scores, identity), class_activation(scores, identity, "mean")
    for c in range(classes):
        own = identity[:, c] == 1
        for k in range(3):
            flags = significant[own, k]
            expected = -1 if len(flags) < 2 else 2 if flags.all() else int(flags.any())
            assert status[c, k] == expected
        if own.any():
            np.testing.assert_array_equal(largest[:, c], scores[:, own].max(axis=1))
            np.testing.assert_allclose(mean[:, c], scores[:, own].mean(axis=1))
        else:
            assert np.isnan(largest[:, c]).all()
            assert np.isnan(mean[:, c]).all()


def test_auc_is_the_mann_whitney_statistic():
    scores, _, sick = population(7)
    scores = np.round(scores, 1)
    found, one = phecode_auc(scores, sick), sick[:, 0] == 1
    for p in range(3):
        statistic = mannwhitneyu(scores[one, p], scores[~one, p]).statistic
        assert found[p, 0] == pytest.approx(statistic / (one.sum() * (~one).sum()))


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


def test_predictor_is_scikit_learn_on_patients_kept_apart():
    """Powers of 3 as activation: the training mean, written in base 3, tells how often each patient was trained on."""
    rng = np.random.default_rng(0)
    patients = rng.permutation(np.repeat(np.arange(30), 2))
    scores = np.column_stack([3.0**patients, rng.normal(size=(60, 3))])
    labels = (scores[:, 1] + 0.8 * rng.normal(size=60) > 0).astype(int)
    splits = set()
    for seed in range(5):
        area, model = fit_phecode_predictor(scores, labels, [f"p{i}" for i in patients], seed=seed)
        scaler, regression = (step for _, step in model.steps)
        total = round(scaler.mean_[0] * scaler.n_samples_seen_)
        times = [total // 3**patient % 3 for patient in range(30)]
        assert sorted(times) == [0] * 6 + [2] * 24
        train = np.array(times)[patients] == 2
        z = (scores - scores[train].mean(axis=0)) / scores[train].std(axis=0)
        reference = LogisticRegression(C=1.0, max_iter=1000).fit(z[train], labels[train])
        np.testing.assert_allclose(regression.coef_, reference.coef_, rtol=1e-6)
        assert area == pytest.approx(roc_auc_score(labels[~train], reference.predict_proba(z[~train])[:, 1]))
        assert fit_phecode_predictor(scores, labels, [f"p{i}" for i in patients], seed=seed)[0] == area
        splits.add(tuple(times))
    assert len(splits) > 1


def test_frame_is_long_and_complete():
    scores, _, sick = population(4)
    table = PrototypePhenotyper().fit(scores, sick)
    frame = table.to_frame(["a", "b", "c"], ["I48"])
    assert frame["prototype"].tolist() == ["a", "b", "c"]
    assert frame["beta"].tolist() == table.beta[:, 0].tolist()
    assert frame["n_cases"].tolist() == [int(sick.sum())] * 3
    with pytest.raises(ValueError, match="prototype_names: found 2 names, needed 3"):
        table.to_frame(["a", "b"], ["I48"])
