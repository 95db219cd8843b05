"""Figures of single-label classification: against scikit-learn, and the same however a fold is split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from proto_core.metrics import FoldAccuracy, classification_figures


def fold(seed, n=40, classes=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=g).softmax(1), torch.randint(classes - 1, (n,), generator=g)


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_scikit_learn(seed):
    probabilities, targets = fold(seed)
    found = classification_figures(probabilities, targets, list("abcdefg"))
    said, summary = probabilities.argmax(1), found["summary"]
    assert summary["accuracy"] == pytest.approx(sk.accuracy_score(targets, said))
    recall = sk.recall_score(targets, said, labels=range(7), average=None, zero_division=np.nan)
    assert summary["mean_class_accuracy"] == pytest.approx(np.nanmean(recall))
    expected = sk.top_k_accuracy_score(targets, probabilities, k=5, labels=range(7))
    assert summary["top5_accuracy"] == pytest.approx(expected)
    assert summary["nll"] == pytest.approx(sk.log_loss(targets, probabilities.double(), labels=range(7)), rel=1e-5)
    np.testing.assert_allclose([row["accuracy"] for row in found["labels"]], recall)
    precision = sk.precision_score(targets, said, labels=range(7), average=None, zero_division=np.nan)
    np.testing.assert_allclose([row["precision"] for row in found["labels"]], precision)
    assert [row["images"] for row in found["labels"]] == torch.bincount(targets, minlength=7).tolist()


def test_calibration_of_hand_made_probabilities():
    # eight of ten predictions at 0.9 are right: the gap is 0.1
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    targets = torch.tensor([0] * 8 + [1] * 2)
    found = classification_figures(probabilities, targets, ["a", "b"])["summary"]
    assert found["calibration_error"] == pytest.approx(0.1, abs=1e-6)
    assert "top5_accuracy" not in found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 3))
def test_any_split_and_any_repeats_give_the_fold_s_accuracy(sizes, seed):
    n = sum(sizes)
    probabilities, targets = fold(seed, n)
    metric, order = FoldAccuracy(), torch.randperm(n)
    for rows in order.split(sizes):
        metric.update(probabilities[rows], targets[rows], rows)
    metric.update(probabilities[:1], targets[:1], torch.tensor([0]))
    expected = float((probabilities.argmax(1) == targets).float().mean())
    assert float(metric.compute()) == pytest.approx(expected)
    scores, known = metric.gathered()
    assert torch.equal(scores, probabilities)
    assert torch.equal(known, targets)


def test_nothing_collected_is_nan():
    assert FoldAccuracy().compute().isnan()
    with pytest.raises(ValueError, match="FoldAccuracy: found no batch"):
        FoldAccuracy().gathered()


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="needed \\[N, C\\] and \\[N\\]"):
        FoldAccuracy().update(torch.rand(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="N >= 1"):
        classification_figures(torch.rand(0, 2), torch.zeros(0, dtype=torch.long), ["a", "b"])
    with pytest.raises(ValueError, match="1 names for 2 classes"):
        classification_figures(torch.rand(3, 2), torch.zeros(3, dtype=torch.long), ["a"])
    metric = FoldAccuracy()
    metric.update(torch.rand(1, 2), torch.tensor([0]))
    metric.update(torch.rand(1, 2), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="with and without indices"):
        metric.compute()
