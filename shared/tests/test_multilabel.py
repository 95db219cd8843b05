"""Label statistics and thresholds: golden arrays, brute force, and degenerate labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from proto_core.data import choose_thresholds, class_pos_weight, label_cooccurrence


@pytest.mark.parametrize("case", ["a_", "b_", "c_"])
def test_statistics_are_the_authors(golden_dir: Path, case: str) -> None:
    with np.load(golden_dir / "protoecgnet.npz") as arrays:
        targets, cooccurrence, weight = (
            torch.from_numpy(arrays[case + name]) for name in ("all_targets", "cooccurrence", "pos_weight")
        )
    torch.testing.assert_close(label_cooccurrence(targets), cooccurrence, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(class_pos_weight(targets), weight, rtol=1e-5, atol=1e-8)
    for other in (targets.bool(), targets.long(), targets.float()):
        assert label_cooccurrence(other).dtype == torch.float32
        torch.testing.assert_close(label_cooccurrence(other).double(), cooccurrence, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(class_pos_weight(other).double(), weight, rtol=1e-5, atol=1e-8)


def test_labels_without_positives_or_without_company() -> None:
    targets = torch.tensor([[1, 0], [1, 0], [0, 0]])
    assert label_cooccurrence(targets).tolist() == [[1, 0], [0, 0]]
    assert class_pos_weight(targets).tolist() == [0, 1]
    assert class_pos_weight(torch.zeros(0, 3)).tolist() == [1, 1, 1]


def best_f1(scores: np.ndarray, targets: np.ndarray) -> float:
    cuts = [0.0, *np.unique(scores), 1.1]
    return max(f1_score(targets, scores >= cut, zero_division=0) for cut in cuts)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_thresholds_reach_the_best_f1(data: st.DataObject) -> None:
    samples, labels = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    generator = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    levels = data.draw(st.sampled_from([2, 5, 1000]))
    scores = torch.from_numpy(generator.integers(0, levels + 1, (samples, labels)) / levels).float()
    targets = torch.from_numpy(generator.integers(0, 2, (samples, labels)))
    thresholds = choose_thresholds(scores, targets)
    assert thresholds.dtype == torch.float32
    assert ((thresholds >= 0) & (thresholds <= 1)).all()
    for c in range(labels):
        column, truth = scores[:, c].numpy(), targets[:, c].numpy()
        if 0 < truth.sum() < samples:
            reached = f1_score(truth, column >= thresholds[c].item(), zero_division=0)
            assert reached == pytest.approx(best_f1(column, truth))
        else:
            assert thresholds[c] == 0.5


def test_threshold_lies_between_the_neighbours() -> None:
    scores = torch.tensor([[0.9, 0.9], [0.7, 0.2], [0.3, 0.4]], dtype=torch.float64)
    targets = torch.tensor([[1, 1], [1, 1], [0, 0]])
    # second label: taking all three gives F1 4/5, taking one gives 2/3; half-way from 0.2 to 0
    torch.testing.assert_close(choose_thresholds(scores, targets), torch.tensor([0.5, 0.1], dtype=torch.float64))


def test_threshold_between_neighbouring_numbers_separates_them() -> None:
    lower = torch.tensor(0.3)
    upper = torch.nextafter(lower, torch.tensor(1.0))
    for low, high in ((lower, upper), (upper, torch.nextafter(upper, torch.tensor(1.0)))):
        threshold = choose_thresholds(torch.stack([low, high])[:, None], torch.tensor([[0], [1]]))
        assert (low < threshold).all()
        assert (high >= threshold).all()


def test_thresholds_of_an_empty_fold() -> None:
    assert choose_thresholds(torch.zeros(0, 2), torch.zeros(0, 2)).tolist() == [0.5, 0.5]


@pytest.mark.bad_input
def test_input_that_does_not_fit() -> None:
    good = torch.tensor([[0.0, 1.0]])
    for function in (label_cooccurrence, class_pos_weight):
        with pytest.raises(ValueError, match="targets: found shape"):
            function(good[0])
        with pytest.raises(ValueError, match="targets: found values other than 0 and 1"):
            function(good * 2)
    with pytest.raises(ValueError, match="scores, targets: found shapes"):
        choose_thresholds(good, good[:, :1])
    with pytest.raises(ValueError, match="found values outside"):
        choose_thresholds(good * 3, good)
    with pytest.raises(ValueError, match="found values outside"):
        choose_thresholds(good * torch.nan, good)
