"""The phenotype analysis where data is poor or wrong: unfitted cells, bad input, and a whole study."""

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.api import Logit, add_constant

from proto_ecg.phenotypes import (
    PrototypePhenotyper,
    PrototypeSet,
    adjust_p_values,
    class_activation,
    fit_phecode_predictor,
    intra_class_distance,
    intra_class_distance_test,
    logistic_association,
    mixed_significance,
    phecode_auc,
    phenotype_study,
)

STATISTICS = ("beta", "se", "z", "p_value", "odds_ratio", "ci_low", "ci_high", "p_adjusted")


def made(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, 2))
    return scores, (scores[:, :1] + rng.normal(size=(rows, 1)) > 0).astype(float)


def assert_not_fitted(table, p, k):
    for name in STATISTICS:
        assert np.isnan(getattr(table, name)[p, k]), name
    assert not table.significant[p, k]


def test_too_few_cases_or_controls_are_not_fitted_but_ranked():
    scores, sick = made()
    few = np.zeros_like(sick)
    few[:19] = 1
    many = 1 - few
    table = PrototypePhenotyper().fit(scores, np.hstack([sick, few, many]))
    for k in (1, 2):
        for p in (0, 1):
            assert_not_fitted(table, p, k)
            assert np.isfinite(table.auc[p, k])
    assert table.n_cases.tolist()[1:] == [19, 181]
    assert np.isfinite(table.beta[:, 0]).all()
    enough = few.copy()
    enough[19] = 1
    assert np.isfinite(PrototypePhenotyper().fit(scores, enough).beta).all()


def test_unfitted_cells_do_not_count_in_the_correction():
    scores, sick = made()
    few = np.zeros_like(sick)
    few[0] = 1
    alone = PrototypePhenotyper().fit(scores, sick)
    both = PrototypePhenotyper().fit(scores, np.hstack([sick, few]))
    np.testing.assert_array_equal(both.p_adjusted[:, 0], alone.p_adjusted[:, 0])


def test_constant_activation_is_not_fitted():
    scores, sick = made()
    scores[:, 1] = 0.7
    table = PrototypePhenotyper().fit(scores, sick)
    assert_not_fitted(table, 1, 0)
    assert table.auc[1, 0] == 0.5
    assert np.isfinite(table.beta[0, 0])


def test_perfect_separation_is_not_fitted_but_ranked():
    scores, _ = made()
    sick = (scores[:, :1] > 0).astype(float)
    table = PrototypePhenotyper().fit(scores, sick)
    assert_not_fitted(table, 0, 0)
    assert table.auc[0, 0] == 1.0
    assert np.isfinite(table.beta[1, 0])


def without_maximum():
    """Score, outcome and covariates of which no likelihood has a single finite maximum, by cause."""
    scores, sick = made()
    x, extra = scores[:, :1], scores[:, 1:]
    half = np.arange(200)[:, None] < 100
    known = np.where(half, sick, np.nan)
    return {
        "two groups that touch": (np.round(x), np.where(np.round(x) == 0, half, x > 0), None),
        "one value without cases": (1.0 - half, sick * half, None),
        "separated by a covariate": (x, extra > 0, extra),
        "collinear covariates": (x, sick, np.hstack([extra, 3 - 2 * extra])),
        "constant covariate": (x, sick, np.full((200, 1), 70.0)),
        "covariate constant where outcomes are": (x, known, half),
        "activation constant where outcomes are": (np.where(half, 0.3, x), known, None),
        "activation is a covariate in other units": (x, sick, 37 * x - 1e3),
        "activation is a covariate but for rounding": (x, sick, x.astype(np.float32)),
    }


@pytest.mark.parametrize("cause", list(without_maximum()))
@pytest.mark.parametrize("standardize", [True, False])
def test_cells_without_a_maximum_are_not_fitted_but_ranked(cause, standardize):
    x, y, extra = (part if part is None else part.astype(float) for part in without_maximum()[cause])
    table = PrototypePhenotyper(standardize=standardize).fit(x, y, extra)
    assert_not_fitted(table, 0, 0)
    assert np.isfinite(table.auc[0, 0])
    one = logistic_association(x[:, 0], y[:, 0], extra)
    assert not one.converged
    assert np.isnan([one.beta, one.se, one.z, one.p_value, one.odds_ratio, one.ci_low, one.ci_high]).all()


def test_a_fit_with_steep_but_finite_maximum_is_kept():
    """Linear predictors of more than 20, less than 30: odds of 1 to 1e9, and the likelihood still has a maximum."""
    x = np.concatenate([np.linspace(-1, 1, 400), [-0.2, 0.2]])
    y = np.concatenate([np.linspace(-1, 1, 400) > 0, [1, 0]]).astype(float)
    scaled = logistic_association(x, y)
    reference = Logit(y, add_constant(x)).fit(disp=0, maxiter=200, tol=1e-12)
    assert 20 < np.abs(reference.fittedvalues).max() < 30
    assert (scaled.beta, scaled.se) == pytest.approx((reference.params[1], reference.bse[1]), rel=1e-6)
    x[:2] *= 3
    assert not logistic_association(x, y).converged


def test_single_fits_say_whether_they_converged():
    scores, sick = made()
    x, y = scores[:, 0], sick[:, 0]
    assert logistic_association(x, y).converged
    assert not logistic_association(x, y, max_iter=2).converged
    assert logistic_association(x, y, tol=1e-2, max_iter=5).converged
    for nothing in (np.zeros(200), np.ones(200), np.full(200, np.nan)):
        assert not logistic_association(x, nothing).converged


def test_significant_is_strictly_below_alpha():
    scores, sick = made()
    p = PrototypePhenotyper().fit(scores, sick).p_adjusted[0, 0]
    assert not PrototypePhenotyper(alpha=p).fit(scores, sick).significant[0, 0]
    assert PrototypePhenotyper(alpha=np.nextafter(p, 1)).fit(scores, sick).significant[0, 0]


def test_no_least_number_of_cases_still_needs_both_kinds():
    scores, sick = made()
    one = np.zeros_like(sick)
    one[np.argsort(scores[:, 0])[100]] = 1
    table = PrototypePhenotyper(min_cases=0).fit(scores, np.hstack([sick * 0, one]))
    assert_not_fitted(table, 0, 0)
    assert np.isnan(table.auc[:, 0]).all()
    assert np.isfinite(table.beta[0, 1])


def test_bf16_tensors_are_float64_of_the_same_numbers():
    rng = np.random.default_rng(0)
    half = torch.from_numpy(rng.normal(size=(6, 4))).bfloat16().requires_grad_()
    exact = half.detach().double().numpy()
    identity, sick = np.array([[1, 0], [1, 0], [0, 1], [0, 1]]), np.array([[0], [1], [0], [1], [1], [0]])
    classes, few = torch.from_numpy(identity), torch.from_numpy(np.arange(4)[:, None] < 2)
    p = half[0].abs() / 4
    single = logistic_association(half[:, 0], torch.from_numpy(sick[:, 0])).beta
    assert np.isfinite(single)
    for ours, expected in [
        (phecode_auc(half, torch.from_numpy(sick)), phecode_auc(exact, sick)),
        (class_activation(half, classes), class_activation(exact, identity)),
        (intra_class_distance(half[:4], classes), intra_class_distance(exact[:4], identity)),
        (adjust_p_values(p, "fdr_bh"), adjust_p_values(p.detach().double().numpy(), "fdr_bh")),
        (mixed_significance(few, classes), [[2], [0]]),
        (single, logistic_association(exact[:, 0], sick[:, 0]).beta),
    ]:
        np.testing.assert_array_equal(ours, expected)


def test_distance_test_without_a_group_or_without_a_difference():
    alone = intra_class_distance_test(np.array([0.1, 0.3]), np.array([[1, -1], [1, 1]]))
    assert np.isnan([alone.statistic, alone.p_value, alone.mean_uniform]).all()
    assert (alone.n_mixed, alone.n_uniform) == (3, 0)
    assert alone.mean_mixed == pytest.approx(0.7 / 3)
    tied = intra_class_distance_test(np.full(3, 0.2), np.array([[1], [0], [2]]))
    assert (tied.statistic, tied.p_value) == (1.0, 1.0)
    unknown = intra_class_distance_test(np.array([0.9, np.nan, 0.1]), np.array([[1], [1], [0]]))
    assert (unknown.n_mixed, unknown.n_uniform, unknown.statistic) == (1, 1, 1.0)


def test_held_out_patients_of_one_kind_have_no_auc():
    scores, _ = made(20)
    sick, patients = np.array([0, 1] * 5 + [0] * 10), [1] * 10 + [2] * 5 + [3] * 5
    areas = {}
    for seed in range(8):  # a third of the patients, one of three, is held out; without patient 1 nobody is sick
        held = 1 + int(np.random.default_rng(seed).permutation(3)[0])
        if held != 1:
            areas[held] = fit_phecode_predictor(scores, sick, patients, test_size=1 / 3, seed=seed)[0]
    assert np.isnan(areas[2])
    assert np.isnan(areas[3])


def test_missing_outcomes_are_dropped_per_phecode():
    scores, sick = made()
    sick[:60] = np.nan
    table = PrototypePhenotyper(standardize=False).fit(scores, sick)
    kept = PrototypePhenotyper(standardize=False).fit(scores[60:], sick[60:])
    np.testing.assert_allclose(table.beta, kept.beta, rtol=1e-8)
    assert table.n_cases[0] + table.n_controls[0] == 140
    # standardised: mean and deviation are those of all rows, also of those without outcome
    whole = PrototypePhenotyper().fit(scores, sick)
    np.testing.assert_allclose(whole.beta[:, 0], table.beta[:, 0] * scores.std(axis=0), rtol=1e-8)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, y: PrototypePhenotyper("holm"), "correction: found 'holm', needed one of"),
        (lambda s, y: PrototypePhenotyper(alpha=1.5), "alpha: found 1.5"),
        (lambda s, y: PrototypePhenotyper(min_cases=-1), "min_cases: found -1, needed 0 or more"),
        (lambda s, y: PrototypePhenotyper().fit(s, y[:-1]), "phecodes: found 199 rows, needed 200"),
        (lambda s, y: PrototypePhenotyper().fit(s, y + 1), "phecodes, column 0: found 2.0, needed 0, 1 or NaN"),
        (lambda s, y: PrototypePhenotyper().fit(s, y, np.full((200, 1), np.nan)), "covariates: found nan"),
        (lambda s, y: PrototypePhenotyper().fit(s, y, s[:-1]), "covariates: found 199 rows, needed 200"),
        (lambda s, y: PrototypePhenotyper().fit(s[:, :0], y), r"activations: found shape \[200, 0\]"),
        (lambda s, y: PrototypePhenotyper().fit(s, y[:, :0]), r"phecodes: found shape \[200, 0\]"),
        (lambda s, y: PrototypePhenotyper().fit(np.where(s > 1, np.inf, s), y), "activations: found inf"),
        (lambda s, y: logistic_association(s[:, 0], y[:-1, 0]), r"y: found shape \[199\], needed \[200\]"),
        (lambda s, y: adjust_p_values(np.array([0.5]), "holm"), "found 'holm', needed one of"),
        (lambda s, y: adjust_p_values(np.array([1.5])), "p: found values from 1.5 to 1.5"),
        (lambda s, y: class_activation(s, np.eye(2), "sum"), "reduce: found 'sum', needed 'max' or 'mean'"),
        (lambda s, y: class_activation(s, np.eye(3)), "prototype_class: found 3 rows, needed 2"),
        (lambda s, y: intra_class_distance(s[:2], np.eye(2), "manhattan"), "metric: found 'manhattan'"),
        (lambda s, y: PrototypePhenotyper(alpha=0), "alpha: found 0, needed a number between 0 and 1"),
        (lambda s, y: PrototypePhenotyper(min_cases=np.nan), "min_cases: found nan, needed 0 or more"),
        (lambda s, y: PrototypePhenotyper().fit(s[0], y), r"activations: found shape \[2\], needed \[N P\]"),
        (lambda s, y: PrototypePhenotyper().fit(s, y, y[:, 0]), r"covariates: found shape \[200\], needed \[N Q\]"),
        (lambda s, y: phecode_auc(s, y[:-1]), "phecodes: found 199 rows, needed 200"),
        (lambda s, y: phecode_auc(s, np.full((200, 1), "a")), "phecodes: found ndarray that is not numeric"),
        (lambda s, y: logistic_association(s[:, 0] * np.nan, y[:, 0]), "x: found nan at row 0, column 0"),
        (lambda s, y: logistic_association(s[:, 0], y[:, 0], s[:9]), "covariates: found 9 rows, needed 200"),
        (lambda s, y: logistic_association(s[:, 0], 2 * y[:, 0]), "y: found 2.0, needed 0, 1 or NaN"),
        (lambda s, y: adjust_p_values(np.array([np.nan, np.inf])), "p: found values from inf to inf, needed 0 to 1"),
        (lambda s, y: class_activation(s, 2 * np.eye(2)), "prototype_class: found 2.0, needed 0, 1"),
        (lambda s, y: intra_class_distance(s[:2] * [[1], [0]], np.eye(2)), "prototypes: found length 0 at row 1"),
        (lambda s, y: intra_class_distance(s[0], np.eye(2)), r"prototypes: found shape \[2\], needed \[P D\]"),
        (lambda s, y: mixed_significance(np.eye(2) * 3, np.eye(2)), "significant: found 3, needed booleans"),
        (lambda s, y: mixed_significance(np.eye(2), np.eye(3)), "prototype_class: found 3 rows, needed 2"),
        (lambda s, y: intra_class_distance_test(s[:2, 0], np.full((2, 1), 3)), "mixed: found the status 3, needed -1"),
        (lambda s, y: intra_class_distance_test(s[:2, 0], np.eye(3)), r"mixed: found shape \[3, 3\] beside"),
        (lambda s, y: fit_phecode_predictor(s, y[:, 0] * np.nan, range(200)), "labels: found NaN, needed 0 or 1"),
        (lambda s, y: fit_phecode_predictor(s, y[:9, 0], range(200)), r"found \[9\] and 200, needed 200 of each"),
        (lambda s, y: fit_phecode_predictor(s, y[:, 0], range(200), 1.0), "test_size: found 1.0, needed a number"),
        (lambda s, y: fit_phecode_predictor(s, y[:, 0], ["one"] * 200), "patient_ids: found 1 patient"),
        (lambda s, y: fit_phecode_predictor(s, y[:, 0] * 0, range(200)), "one class only"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*made())


def study(tmp_path, **changes):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(240, 5))
    outcomes = (scores[:, [0, 3]] + 0.7 * rng.normal(size=(240, 2)) > 0.5).astype(float)
    branches = {
        "rhythm": PrototypeSet(rng.normal(size=(2, 3)), np.array([[1], [1]]), ["AFIB"]),
        "morphology": PrototypeSet(rng.normal(size=(3, 2, 1, 3)), np.array([[1, 0], [1, 0], [0, 1]]), ["MI", "LBBB"]),
    }
    names = ["rhythm/AFIB/0", "rhythm/AFIB/1", "morphology/MI/0", "morphology/MI/1", "morphology/LBBB/2"]
    arguments = {"outcomes": outcomes, "outcome_names": ["I48", "I21"]} | changes
    return scores, outcomes, phenotype_study(scores, names, branches, out=tmp_path / "out", **arguments)


def test_study_writes_what_it_finds(tmp_path):
    rng = np.random.default_rng(1)
    scores, outcomes, found = study(tmp_path, rivals={"class probability": rng.random((240, 3))}, predicted=1)
    folder = tmp_path / "out"
    written = {path.name for path in folder.iterdir()}
    assert written == {
        "associations.csv", "comparison.csv", "intra_class_distance.csv", "mixed_significance.csv", "prediction.csv",
        "summary.json", "figure.svg", "figure.png",
    }  # fmt: skip
    assert set(found.table.head(2)["prototype"]) == {"rhythm/AFIB/0", "morphology/MI/1"}
    assert (np.diff(found.table["p_value"]) >= 0).all()
    mixed = found.mixed.set_index("class")
    assert mixed.loc["AFIB"].tolist()[1:] == [1, 0]
    assert mixed.loc["MI"].tolist()[1:] == [0, 1]
    assert mixed.loc["LBBB"].tolist()[1:] == [-1, -1]
    compared = found.comparison.set_index(["score", "phecode"])
    assert compared.loc[("prototype", "I48"), "best_auc"] == pytest.approx(found.associations.auc[:, 0].max())
    strongest = np.maximum(scores[:, 0], scores[:, 1])[:, None]
    assert compared.loc[("class activation", "I48"), "best_auc"] >= phecode_auc(strongest, outcomes[:, :1])[0, 0]
    assert found.prediction["auc_held_out"].iloc[0] > 0.8
    assert list(pd.read_csv(folder / "associations.csv").columns) == list(found.table.columns)
    assert (folder / "figure.svg").read_text().startswith("<?xml")


def test_predictor_of_cases_in_one_patient_is_nan_and_the_study_goes_on(tmp_path):
    _, outcomes, _ = study(tmp_path)
    patients = np.where(outcomes[:, 0] == 1, "one", np.arange(240).astype(str))
    with pytest.warns(UserWarning, match="I48: its predictor cannot be tested"):
        *_, found = study(tmp_path, patient_ids=patients.tolist(), predicted=2)
    area = found.prediction.set_index("phecode")["auc_held_out"]
    assert np.isnan(area["I48"])
    assert area["I21"] > 0.6
    assert (tmp_path / "out/prediction.csv").is_file()


def test_phecodes_that_were_not_fitted_are_neither_mixed_nor_uniform(tmp_path):
    _, outcomes, _ = study(tmp_path)
    outcomes = np.column_stack([outcomes[:, 0], np.arange(240) < 7])
    *_, found = study(tmp_path, outcomes=outcomes)
    assert (found.mixed["I21"] == -1).all()
    assert (found.mixed["I48"] >= 0).any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patient_ids": ["a"] * 3}, "patient_ids: found 3, needed 240"),
        ({"rivals": {"concept": np.zeros((3, 1))}}, r"rivals\['concept'\]: found 3 rows, needed 240"),
        ({"rivals": {"prototype": np.zeros((240, 1))}}, "rivals: the name 'prototype' is taken"),
    ],
)
def test_bad_arguments_of_a_study_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **change)


def test_study_without_enough_cases_says_how_many_there_are(tmp_path):
    outcomes = np.zeros((240, 2))
    outcomes[:7] = 1
    with pytest.raises(ValueError, match="needed 20 cases and as many controls, found at most 7 among 240 rows"):
        study(tmp_path, outcomes=outcomes)


def test_study_finds_an_unwritable_folder_before_it_works(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="out"):
        study(tmp_path)
