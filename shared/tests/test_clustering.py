"""Accuracy of clusters: ProtoGCD's values, all assignments tried, leftovers, splits, what it refuses."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.metrics import ClusterAccuracy, cluster_accuracy


@pytest.mark.parametrize("case", ["acc_a", "acc_b", "acc_c"])
def test_equals_the_authors_code(golden_dir, case):
    golden = np.load(golden_dir / "protogcd.npz")
    true, pred, old = (golden[f"{case}/{name}"] for name in ("y_true", "y_pred", "old"))
    np.testing.assert_allclose(cluster_accuracy(true, pred, old), golden[f"{case}/acc"])
    np.testing.assert_allclose(cluster_accuracy(true, pred, old, balanced=True), golden[f"{case}/acc_balanced"])
    np.testing.assert_allclose(cluster_accuracy(true, pred), golden[f"{case}/acc_plain"])
    if f"{case}/acc_plain_balanced" in golden:
        np.testing.assert_allclose(cluster_accuracy(true, pred, balanced=True), golden[f"{case}/acc_plain_balanced"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_no_assignment_is_better(pairs):
    true, pred = (np.array(labels) for labels in zip(*pairs))
    best = max((np.array(names)[pred] == true).mean() for names in itertools.permutations(range(4)))
    assert cluster_accuracy(true, pred) == pytest.approx(best)
    renamed = np.array([2, 0, 3, 1])[pred]
    assert cluster_accuracy(true, renamed) == pytest.approx(best)


def test_leftovers_count_as_wrong_and_empty_sets_are_nan():
    assert cluster_accuracy([0, 0, 0, 0], [0, 1, 2, 3]) == 0.25
    assert cluster_accuracy([0, 1, 2, 3], [0, 0, 0, 0]) == 0.25
    assert cluster_accuracy([0, 0, 0, 1], [0, 0, 0, 0], balanced=True) == 0.5
    every, old, new = cluster_accuracy([0, 1], [1, 0], [True, True])
    assert (every, old) == (1, 1)
    assert math.isnan(new)


def test_any_split_gives_the_same():
    g = torch.Generator().manual_seed(0)
    true, pred = torch.randint(0, 5, (2, 40), generator=g)
    old = true < 2
    for balanced in (False, True):
        metric = ClusterAccuracy(balanced)
        for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
            metric.update(true[part], pred[part], old[part])
        expected = cluster_accuracy(true, pred, old, balanced=balanced)
        assert tuple(metric.compute().values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster_accuracy([0, 1], [0]), "y_true, y_pred: found 2 and 1"),
        (lambda: cluster_accuracy([], []), "y_true: found shape"),
        (lambda: cluster_accuracy([0.5], [0]), "y_true: found float64"),
        (lambda: cluster_accuracy([0], [-1]), "y_pred: found -1"),
        (lambda: cluster_accuracy([0], [0], [True, False]), "old_mask: found shape"),
        (lambda: ClusterAccuracy().update(torch.zeros(2).long(), torch.zeros(3).long()), "found shapes"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
