"""Prototype layers and projection: golden values of ProtoECGNet, edge cases, invariances."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.prototypes import (
    PointPrototypes,
    WindowPrototypes,
    global_cosine_similarity,
    init_classifier_weight,
    log_similarity,
    mean_window_similarity,
    pool_windows,
    project_layer,
    prototype_class_matrix,
    window_l2_distance,
    window_similarity,
)

RTOL, ATOL = 1e-6, 1e-8


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {key: torch.as_tensor(value) for key, value in np.load(golden_dir / "protoecgnet.npz").items()}


def close(a, b, rtol=RTOL, atol=ATOL):
    torch.testing.assert_close(a.detach(), b, rtol=rtol, atol=atol)


def test_point_similarity_equals_authors(golden):
    features = golden["g1_features"].clone().requires_grad_()
    prototypes = golden["g1_prototypes"].clone().requires_grad_()
    similarity = global_cosine_similarity(features, prototypes)
    close(similarity, golden["g1_similarity"])
    (similarity * golden["g1_upstream"]).sum().backward()
    close(features.grad, golden["g1_grad_features"])
    close(prototypes.grad, golden["g1_grad_prototypes"])


def test_point_l2_is_a_window_of_one_step(golden):
    features, prototypes = golden["g1_features"], golden["g1_prototypes"]
    distance = window_l2_distance(features[:, :, None, None], prototypes[:, :, None, None])[..., 0]
    close(distance, golden["g1_l2_distance"])
    close(log_similarity(distance), golden["g1_l2_log_similarity"])


@pytest.mark.parametrize("case", ["g2", "g3"])
def test_window_similarity_equals_authors(golden, case):
    features = golden[f"{case}_features"].clone().requires_grad_()
    prototypes = golden[f"{case}_prototypes"].clone().requires_grad_()
    scores = window_similarity(features, prototypes)
    close(scores, golden[f"{case}_window_similarity"])
    close(pool_windows(scores, "mean"), golden[f"{case}_similarity"])
    close(pool_windows(scores, "max"), golden[f"{case}_similarity_max"])
    if case == "g2":
        close(pool_windows(scores, "topk", 5), golden["g2_similarity_top5"])
    pooled = mean_window_similarity(features, prototypes)
    close(pooled, golden[f"{case}_similarity"])
    (pooled * golden[f"{case}_upstream"]).sum().backward()
    close(features.grad, golden[f"{case}_grad_features"])
    close(prototypes.grad, golden[f"{case}_grad_prototypes"])
    distance = window_l2_distance(features, prototypes)
    close(distance, golden[f"{case}_l2_window_distance"])
    if case == "g2":
        close(pool_windows(log_similarity(distance), "topk", 5), golden["g2_l2_log_similarity_top5"])


def test_gradients_through_all_windows_equal_those_of_the_mean(golden):
    features = golden["g2_features"].clone().requires_grad_()
    prototypes = golden["g2_prototypes"].clone().requires_grad_()
    (pool_windows(window_similarity(features, prototypes)) * golden["g2_upstream"]).sum().backward()
    close(features.grad, golden["g2_grad_features"])
    close(prototypes.grad, golden["g2_grad_prototypes"])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_classifier_start_equals_authors(golden, case):
    weight = init_classifier_weight(golden[f"{case}_prototype_class"])
    close(weight, golden[f"{case}_classifier_weight"])


@pytest.mark.parametrize("split", [9, 4, 1])
def test_projection_of_points_equals_authors(golden, split):
    layer = PointPrototypes(5, golden["proj1d_prototype_class"])
    with torch.no_grad():
        layer.prototypes.copy_(golden["proj1d_prototypes"])
    batches = zip(golden["proj1d_features"].split(split), golden["proj1d_targets"].split(split))
    found = project_layer(layer, batches)
    assert found.sample_index.tolist() == golden["proj1d_sample_index"].tolist()
    close(layer.prototypes, golden["proj1d_projected"])


@pytest.mark.parametrize("split", [9, 4, 1])
def test_projection_of_windows_equals_authors(golden, split):
    layer = WindowPrototypes(5, 3, golden["proj2d_prototype_class"])
    with torch.no_grad():
        layer.prototypes.copy_(golden["proj2d_prototypes"])
    batches = zip(golden["proj2d_features"].split(split), golden["proj2d_targets"].split(split))
    found = project_layer(layer, batches)
    assert found.sample_index.tolist() == golden["proj2d_sample_index"].tolist()
    assert found.position.tolist() == golden["proj2d_window_index"].tolist()
    close(layer.prototypes, golden["proj2d_projected"])


def test_class_that_never_occurs_keeps_its_prototype():
    layer = PointPrototypes(4, prototype_class_matrix(2, 1))
    before = layer.prototypes.detach().clone()
    found = project_layer(layer, [(torch.randn(3, 4), torch.tensor([[1.0, 0.0]] * 3))])
    assert found.sample_index[1] == -1
    assert found.sample_index[0] >= 0
    torch.testing.assert_close(layer.prototypes[1].detach(), before[1])


def test_first_sample_wins_a_tie_whatever_the_batches():
    features = torch.ones(6, 3)
    for split in (1, 2, 6):
        layer = PointPrototypes(3, prototype_class_matrix(1, 2))
        found = project_layer(layer, zip(features.split(split), torch.ones(6, 1).split(split)))
        assert found.sample_index.tolist() == [0, 0]


def test_pair_prototype_accepts_either_class():
    layer = PointPrototypes(2, prototype_class_matrix(2, 0, per_pair=1))
    with torch.no_grad():
        layer.prototypes.copy_(torch.tensor([[1.0, 0.0]]))
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1]])
    found = project_layer(layer, [(features, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))])
    assert found.sample_index.tolist() == [2]


def test_zero_vectors_have_similarity_zero_and_finite_gradients():
    features = torch.zeros(2, 4, requires_grad=True)
    prototypes = torch.randn(3, 4, requires_grad=True)
    similarity = global_cosine_similarity(features, prototypes)
    assert similarity.abs().max() == 0
    similarity.sum().backward()
    assert features.grad.isfinite().all()
    assert prototypes.grad.isfinite().all()
    sequence = torch.zeros(2, 4, 1, 6, requires_grad=True)
    scores = mean_window_similarity(sequence, torch.randn(3, 4, 1, 2))
    scores.sum().backward()
    assert scores.abs().max() == 0
    assert sequence.grad.isfinite().all()
    same = torch.randn(1, 4, 1, 2, requires_grad=True)
    window_l2_distance(same, same.detach().clone()).sum().backward()
    assert same.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 6), st.integers(1, 9), st.data())
def test_mean_before_product_equals_mean_after(n, p, f, t, data):
    w = data.draw(st.integers(1, t))
    generator = torch.Generator().manual_seed(n * 1000 + p * 100 + f * 10 + t)
    features = torch.randn(n, f, 1, t, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(p, f, 1, w, generator=generator, dtype=torch.float64)
    expected = window_similarity(features, prototypes).mean(-1)
    torch.testing.assert_close(mean_window_similarity(features, prototypes), expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))
def test_class_identity_counts(classes, per_class, per_pair):
    expected = per_class * classes + per_pair * classes * (classes - 1) // 2
    if expected == 0:
        with pytest.raises(ValueError, match="no prototype"):
            prototype_class_matrix(classes, per_class, per_pair)
        return
    identity = prototype_class_matrix(classes, per_class, per_pair)
    assert identity.shape == (expected, classes)
    assert identity.sum(1).tolist() == [1.0] * (per_class * classes) + [2.0] * (expected - per_class * classes)


def test_cases_survive_state_dict_and_deepcopy():
    layer = PointPrototypes(3, prototype_class_matrix(2, 1))
    layer.assign_cases(torch.eye(2, 3), torch.tensor([4, -1]), torch.tensor([0, -1]), lambda i: (f"r{i}", ["NORM"]))
    other = PointPrototypes(3, prototype_class_matrix(2, 1))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        assert twin.case_ids == ["r4", ""]
        assert twin.case_labels == [["NORM"], []]
        assert twin.case_index.tolist() == [4, -1]
        assert "cases=1" in repr(twin)
    layer.reset_parameters()
    assert not layer.projected


def test_bfloat16_is_computed_in_float32():
    features, prototypes = torch.randn(4, 6, 1, 9), torch.randn(5, 6, 1, 3)
    low = mean_window_similarity(features.bfloat16(), prototypes.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, mean_window_similarity(features, prototypes), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = mean_window_similarity(features, prototypes)
        assert global_cosine_similarity(features[:, :, 0, 0], prototypes[:, :, 0, 0]).dtype == torch.float32
    torch.testing.assert_close(exact, mean_window_similarity(features, prototypes))


@pytest.mark.bad_input
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="longer than the feature map"):
        window_similarity(torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 4))
    with pytest.raises(ValueError, match="needed features"):
        window_similarity(torch.randn(1, 3, 1, 3), torch.randn(1, 2, 1, 2))
    with pytest.raises(ValueError, match="needed features"):
        global_cosine_similarity(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="number of windows"):
        pool_windows(torch.randn(1, 1, 3), "topk", 5)
    with pytest.raises(ValueError, match="pooling"):
        pool_windows(torch.randn(1, 1, 3), "median")
    with pytest.raises(ValueError, match="stands for no class"):
        PointPrototypes(3, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="targets"):
        project_layer(PointPrototypes(3, torch.eye(2)), [(torch.randn(2, 3), torch.ones(2, 3))])
