"""Orthogonal Projection Loss: the authors' values, a loop over ordered pairs, and what its card says of edge cases."""

import numpy as np
import pytest
import torch

from proto_core.losses import OPLDistillationLoss, OrthogonalProjectionLoss, PerpetualOrthogonalProjectionLoss


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "opl.npz")


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3", "c4", "c5"])
def test_equals_the_authors_code(golden, case):
    def value(name: str) -> np.ndarray:
        return golden[f"{case}_{name}"]

    settings = {
        "gamma": float(value("gamma")),
        "normalize": bool(value("normalize")),
        "attention": bool(value("attention")),
    }
    x = torch.from_numpy(value("features")).requires_grad_()
    labels = torch.from_numpy(value("labels"))
    loss = OrthogonalProjectionLoss(**settings)
    found = loss(x, labels)
    (gradient,) = torch.autograd.grad(found, x)
    for one, name in [
        (found, "loss"),
        (gradient, "grad"),
        (loss.components(x, labels)[0], "s"),
        (loss.components(x, labels)[1], "d"),
        (OrthogonalProjectionLoss(negative="abs_mean", **settings)(x, labels), "loss_abs_of_mean"),
    ]:
        np.testing.assert_allclose(one.detach().numpy(), value(name), rtol=1e-5, atol=1e-6, err_msg=name)


def loop(x, labels, gamma, negative):
    """The definition, pair by pair."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    same, other = [], []
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j:
                (same if labels[i] == labels[j] else other).append(x[i] @ x[j])
    mean = np.abs(other).sum() if negative == "mean_abs" else abs(np.sum(other))
    return 1 - np.sum(same) / (len(same) + 1e-6) + gamma * mean / (len(other) + 1e-6)


@pytest.mark.parametrize("negative", ["mean_abs", "abs_mean"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_equals_the_definition(negative, gamma):
    g = np.random.default_rng(3)
    x, labels = g.normal(size=(17, 5)), g.integers(-2, 4, size=17)
    found = OrthogonalProjectionLoss(gamma, negative=negative)(torch.from_numpy(x), torch.from_numpy(labels))
    np.testing.assert_allclose(float(found), loop(x, labels, gamma, negative), rtol=1e-12)


def test_without_pairs():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    loss = OrthogonalProjectionLoss()
    within, between = loss.components(x, torch.arange(4))
    assert within == 0
    torch.testing.assert_close(loss(x, torch.arange(4)), 1 + 0.5 * between)
    one_class = torch.zeros(4, dtype=torch.long)
    assert loss.components(x, one_class)[1] == 0
    torch.testing.assert_close(loss(x, one_class), 1 - loss.components(x, one_class)[0])
    single = loss(x[:1], torch.zeros(1, dtype=torch.long))
    assert single == 1
    assert (torch.autograd.grad(single, x)[0] == 0).all()


def test_zero_row_is_no_direction():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = OrthogonalProjectionLoss()(x, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(loss, torch.tensor(1 + 0.5 * 2 / 4))
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()


def test_best_and_worst():
    axes = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    assert OrthogonalProjectionLoss()(axes, torch.arange(6) % 3).item() == pytest.approx(0, abs=1e-5)
    ones = torch.ones(4, 3, dtype=torch.float64) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    assert OrthogonalProjectionLoss(2.0)(ones, torch.tensor([0, 1, 0, 1])).item() == pytest.approx(2 + 2.0, abs=1e-5)


def test_centres_by_hand():
    loss = PerpetualOrthogonalProjectionLoss(2, 2).double()
    loss.centers.data.copy_(torch.tensor([[2.0, 0.0], [3.0, 3.0]]))
    x = torch.tensor([[5.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    half = 0.5**0.5
    expected = 0.5 * (1 - (1 + half) / 2) + (half + 0) / 2
    assert loss(x, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-5)


def test_distillation_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = OPLDistillationLoss()(student, teacher)
    assert loss.item() == pytest.approx(2 * np.e / 4)
    loss.backward()
    assert teacher.grad is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "x, labels, says",
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.long), r"\(3,\) and \(3,\)"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.long), r"\(3, 2\) and \(2,\)"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.long), r"\(0, 2\)"),
        (torch.ones(3, 2), torch.zeros(3), "float32"),
        (torch.ones(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), "int64"),
    ],
)
def test_bad_input_is_named(x, labels, says):
    with pytest.raises(ValueError, match=says):
        OrthogonalProjectionLoss()(x, labels)


@pytest.mark.bad_input
@pytest.mark.parametrize("settings", [{"gamma": -0.1}, {"negative": "abs"}, {"eps": 0.0}, {"chunk_size": 0}])
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: found"):
        OrthogonalProjectionLoss(**settings)


@pytest.mark.bad_input
def test_bad_classes_are_named():
    loss = PerpetualOrthogonalProjectionLoss(3, 2)
    with pytest.raises(ValueError, match="found 3, needed classes 0 to 2"):
        loss(torch.ones(1, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="found 4 features, needed 2"):
        loss(torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="student, teacher"):
        OPLDistillationLoss()(torch.ones(2, 2), torch.ones(3, 2))
