"""Ranking: recall as the authors of Multi-Similarity count it, and the search under every retrieval metric."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.data import rotated_classes
from proto_core.metrics import RecallAtK, best_positive_rank, nearest, ranking, recall_at_k


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "multi_similarity.npz")


def test_recall_equals_the_authors_code(golden):
    x, y, k = (torch.from_numpy(golden[name]) for name in ("rec_x", "rec_y", "rec_k"))
    found = recall_at_k(x, y, k=k.tolist())
    assert list(found) == k.tolist()
    np.testing.assert_allclose(list(found.values()), golden["rec"], atol=1e-12)
    q, yq, g, yg = (torch.from_numpy(golden[f"rec2_{name}"]) for name in ("q", "yq", "g", "yg"))
    np.testing.assert_allclose(list(recall_at_k(q, yq, g, yg).values()), golden["rec2"], atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_nearest_is_a_stable_sort_in_blocks(seed, k):
    """Small integers make many ties."""
    g = np.random.default_rng(seed)
    query, gallery = g.integers(-1, 2, (7, 2)).astype(float), g.integers(-1, 2, (9, 2)).astype(float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", 20)
        values, index = nearest(torch.from_numpy(query), torch.from_numpy(gallery), k)
    similarity = query @ gallery.T
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(similarity, expected, axis=1))


def test_ties_favour_the_query():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert best_positive_rank(x, torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]
    gallery, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0])
    assert best_positive_rank(x[:1], torch.tensor([0]), gallery, labels).tolist() == [0]
    ahead = torch.tensor([[1.1, 0.0], [1.0, 0.0]])
    assert recall_at_k(x[:1], torch.tensor([0]), ahead, labels, k=(1, 2)) == {1: 0.0, 2: 1.0}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 30), max_size=4))
def test_metric_does_not_depend_on_the_split(seed, cuts):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(30, 4, generator=g), torch.arange(30) % 5
    metric = RecallAtK(k=(1, 5), normalize=False)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 30]):
        metric.update(x[start:stop], y[start:stop])
    assert metric.compute() == recall_at_k(x, y, k=(1, 5))


def test_metric_normalises_unless_told():
    x, y = torch.tensor([[1.0, 0.0], [9.0, 9.0], [1.0, 0.1], [1.0, 1.0]]), torch.tensor([0, 1, 0, 1])
    for normalize, expected in [(True, 1.0), (False, 0.5)]:
        metric = RecallAtK(k=(1,), normalize=normalize)
        metric.update(x, y)
        assert metric.compute() == {1: expected}


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, y = torch.eye(3), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="label 1 \\(query 2\\)"):
        recall_at_k(x, y)
    with pytest.raises(ValueError, match="k: found"):
        recall_at_k(x, y, k=(0,))
    with pytest.raises(ValueError, match="found one of them"):
        recall_at_k(x, y, x)
    with pytest.raises(ValueError, match="NaN"):
        nearest(x, x * torch.nan)
    with pytest.raises(ValueError, match="k: found 0"):
        nearest(x, x, 0)
    with pytest.raises(ValueError, match="query, gallery"):
        nearest(x, x[:0])
    with pytest.raises(ValueError, match="gallery_labels"):
        recall_at_k(x, y, x, y[:2])
    with pytest.raises(ValueError, match="no batch"):
        RecallAtK().compute()
    with pytest.raises(ValueError, match="embeddings, labels"):
        RecallAtK().update(x, y[:1])


def test_rotated_classes_differ_in_few_directions_of_a_rotated_space():
    x, y = rotated_classes(0, classes=50, per_class=40, informative=3, nuisance=5, noise=0.1, nuisance_scale=2.0)
    assert x.dtype == np.float32
    assert y.tolist() == np.repeat(np.arange(50), 40).tolist()
    means = np.stack([x[y == c].mean(0) for c in range(50)])
    spread = np.linalg.svd(means - means.mean(0), compute_uv=False)
    assert spread[2] > 2 * spread[3]
    within = np.linalg.svd((x - means[y]), compute_uv=False) / len(x) ** 0.5
    np.testing.assert_allclose(within, [2, 2, 2, 2, 2, 0.1, 0.1, 0.1], rtol=0.1)
    np.testing.assert_array_equal(x, rotated_classes(0, 50, 40, 3, 5, 0.1, 2.0)[0])
    with pytest.raises(ValueError, match="classes: found 0"):
        rotated_classes(0, 0, 1)
    with pytest.raises(ValueError, match="noise: found -1"):
        rotated_classes(0, 1, 1, noise=-1)
