"""The distance to the k-th nearest known feature, against a loop over pairs and values known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.ood import NearestNeighbourOOD


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_score_is_minus_the_kth_smallest_distance(count, k, dim, seed):
    g = torch.Generator().manual_seed(seed)
    known, asked = torch.randn(count, dim, generator=g), 5 * torch.randn(7, dim, generator=g)
    found = NearestNeighbourOOD(k).fit(known).score(asked)
    unit = [rows.double() / (rows.double().norm(dim=1, keepdim=True) + 1e-10) for rows in (known, asked)]
    expected = torch.cdist(unit[1], unit[0]).sort(dim=1).values[:, min(k, count) - 1]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, -expected, rtol=1e-6, atol=1e-6)


def test_values_by_hand():
    detector = NearestNeighbourOOD(1).fit(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    found = detector.score(torch.tensor([[7.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    corner = math.sqrt(2 - math.sqrt(2))
    torch.testing.assert_close(found, torch.tensor([0.0, -math.sqrt(2), -corner, -1.0]).double(), atol=1e-7, rtol=1e-6)
    assert detector.score(torch.zeros(0, 2)).shape == (0,)
    half = NearestNeighbourOOD(1).fit(torch.eye(2).bfloat16()).score(torch.tensor([[1.0, 0.0]]).bfloat16())
    assert (half.dtype, abs(float(half))) == (torch.float64, pytest.approx(0, abs=1e-9))
    assert repr(NearestNeighbourOOD(3)) == "NearestNeighbourOOD(k=3)"


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="k: found 0"):
        NearestNeighbourOOD(0)
    with pytest.raises(RuntimeError, match="fit comes before score"):
        NearestNeighbourOOD().score(torch.eye(2))
    for rows in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"train_features: found shape .*needed \[N, F\]"):
            NearestNeighbourOOD().fit(rows)
    with pytest.raises(ValueError, match="train_features: found 1 rows with NaN"):
        NearestNeighbourOOD().fit(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match=r"features: found shape \(1, 3\), needed \[M, 2\]"):
        NearestNeighbourOOD().fit(torch.eye(2)).score(torch.zeros(1, 3))
