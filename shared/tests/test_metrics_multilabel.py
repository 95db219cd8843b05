"""Multi-label metrics against scikit-learn and torchmetrics, and any split of a fold against the whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from proto_core.metrics import (
    MacroAUROC,
    auroc_matrix,
    auroc_per_label,
    calibration_error,
    f1_micro,
    f1_per_label,
    fmax,
    macro_auroc,
)

folds = st.builds(
    lambda seed, samples, labels, levels: made_fold(seed, samples, labels, levels),
    st.integers(0, 10_000),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from([1, 4, 1000]),
)


def made_fold(seed: int, samples: int, labels: int, levels: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    scores = torch.from_numpy(generator.integers(0, levels + 1, (samples, labels)) / levels)
    return scores, torch.from_numpy(generator.integers(0, 2, (samples, labels)))


def test_macro_auroc_is_the_authors(golden_dir: Path) -> None:
    with np.load(golden_dir / "protoecgnet.npz") as arrays:
        scores, targets, expected = arrays["auc_scores"], arrays["auc_targets"], float(arrays["auc_macro"])
    assert macro_auroc(scores, targets) == pytest.approx(expected, rel=1e-6)
    assert macro_auroc(torch.from_numpy(scores), torch.from_numpy(targets)) == pytest.approx(expected, rel=1e-6)
    assert auroc_per_label(scores, targets)[-1].isnan()


@settings(max_examples=50, deadline=None)
@given(fold=folds)
def test_auroc_is_scikit_learns(fold: tuple[Tensor, Tensor]) -> None:
    scores, targets = fold
    values = auroc_per_label(scores, targets)
    for c in range(scores.shape[1]):
        if 0 < targets[:, c].sum() < len(targets):
            assert values[c].item() == pytest.approx(roc_auc_score(targets[:, c], scores[:, c]))
        else:
            assert values[c].isnan()
    matrix = auroc_matrix(scores, targets)
    torch.testing.assert_close(matrix.diagonal(), values, equal_nan=True)
    torch.testing.assert_close(auroc_matrix(scores[:, :1], targets), matrix[:1], equal_nan=True)
    finite = values[~values.isnan()]
    expected = finite.mean().item() if len(finite) else float("nan")
    assert macro_auroc(scores, targets) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(fold=folds, threshold=st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_f1_is_scikit_learns(fold: tuple[Tensor, Tensor], threshold: float) -> None:
    scores, targets = fold
    predicted = scores >= threshold
    thresholds = torch.linspace(0.1, 0.9, scores.shape[1], dtype=torch.float64)
    values = f1_per_label(scores, targets, thresholds)
    for c in range(scores.shape[1]):
        own = scores[:, c] >= thresholds[c]
        expected = f1_score(targets[:, c], own, zero_division=np.nan)
        assert values[c].item() == pytest.approx(expected, nan_ok=True)
    expected = f1_score(targets.flatten(), predicted.flatten(), zero_division=np.nan)
    assert f1_micro(scores, targets, threshold) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(fold=folds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_fmax_is_the_best_of_101_thresholds(fold: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    scores, targets = fold
    # levels of 0.01 and 0.25 lie on the grid, where the side of the comparison matters
    scores = ((scores * 100).round() / 100).to(dtype)
    if targets.sum() == 0:
        assert np.isnan(fmax(scores, targets))
        return
    tried = [f1_micro(scores, targets, step / 100) for step in range(101)]
    assert fmax(scores, targets) == pytest.approx(np.nanmax(tried))


@settings(max_examples=30, deadline=None)
@given(fold=folds, bins=st.sampled_from([1, 7, 15]))
def test_calibration_error_is_that_of_torchmetrics(fold: tuple[Tensor, Tensor], bins: int) -> None:
    scores, targets = fold
    scores = 0.001 + 0.998 * scores  # off the edges of the bins, where rounding decides
    expected = binary_calibration_error(scores.flatten(), targets.flatten(), n_bins=bins).item()
    assert calibration_error(scores, targets, bins) == pytest.approx(expected, abs=1e-6)
    per_label = calibration_error(scores, targets, bins, per_label=True)
    for c in range(scores.shape[1]):
        expected = binary_calibration_error(scores[:, c].contiguous(), targets[:, c], n_bins=bins).item()
        assert per_label[c].item() == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_certainty() -> None:
    scores = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    assert calibration_error(scores, torch.tensor([[0], [1], [1], [1]])) == 0
    assert calibration_error(scores, torch.tensor([[0], [1], [1], [0]])) == 0.25


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 39), max_size=5, unique=True), padded=st.booleans())
def test_any_split_of_a_fold_gives_the_folds_value(seed: int, cuts: list[int], padded: bool) -> None:
    scores, targets = made_fold(seed, 40, 3, 10)
    scores = scores.float()
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(40, generator=generator)
    if padded:
        index = torch.cat([index, index[:7]])
    metric = MacroAUROC()
    for part in index.tensor_split(sorted(cuts)):
        metric.update(scores[part], targets[part].float(), 100 + part)
    assert metric.compute() == torch.tensor(macro_auroc(scores, targets))
    gathered_scores, gathered_targets = metric.gathered()
    assert torch.equal(gathered_scores, scores)
    assert torch.equal(gathered_targets.long(), targets)


def test_fold_without_indices_keeps_every_sample() -> None:
    scores, targets = made_fold(1, 20, 3, 10)
    metric = MacroAUROC()
    for part in torch.arange(20).split(6):
        metric.update(scores[part], targets[part])
    assert metric.compute().item() == pytest.approx(macro_auroc(scores.float(), targets))
    assert torch.equal(metric.gathered()[1].long(), targets)
    metric.reset()
    metric.update(scores[:2], torch.zeros(2, 3))
    assert metric.compute().isnan()


@pytest.mark.bad_input
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_input_that_does_not_fit() -> None:
    scores, targets = made_fold(1, 4, 3, 10)
    metric = MacroAUROC()
    assert metric.compute().isnan()
    with pytest.raises(ValueError, match="found no batch"):
        metric.gathered()
    with pytest.raises(ValueError, match="scores, targets: found shapes"):
        metric.update(scores, targets[:, :2])
    with pytest.raises(ValueError, match="index: found shape"):
        metric.update(scores, targets, torch.arange(3))
    metric.update(scores, targets)
    metric.update(scores, targets, torch.arange(4))
    with pytest.raises(ValueError, match="with and without indices"):
        metric.compute()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "metric", [macro_auroc, auroc_matrix, f1_micro, fmax, calibration_error], ids=lambda function: function.__name__
)
def test_folds_that_do_not_fit(metric) -> None:
    scores, targets = made_fold(1, 4, 3, 10)
    for wrong in ((scores[0], targets), (scores, targets[:-1]), (targets, targets)):
        with pytest.raises(ValueError, match="scores, targets: found shapes"):
            metric(*wrong)
    if metric is not auroc_matrix:
        with pytest.raises(ValueError, match="scores, targets: found shapes"):
            metric(scores, targets[:, :-1])
    with pytest.raises(ValueError, match="targets: found values"):
        metric(scores, targets * 2)
    with pytest.raises(ValueError, match="scores: found 12 NaN"):
        metric(scores * torch.nan, targets)
    if metric in (fmax, calibration_error):
        with pytest.raises(ValueError, match="outside"):
            metric(scores + 1, targets)


@pytest.mark.bad_input
def test_settings_that_do_not_fit() -> None:
    scores, targets = made_fold(1, 4, 3, 10)
    with pytest.raises(ValueError, match=r"thresholds: found shape \(2,\), needed \(3,\)"):
        f1_per_label(scores, targets, torch.ones(2))
    with pytest.raises(ValueError, match="found 0 bins"):
        calibration_error(scores, targets, 0)
    with pytest.raises(ValueError, match="and 0 scores"):
        calibration_error(scores[:0], targets[:0])
