"""Weights by rarity (DatasetEquity): the authors' weights and losses, limits, other base losses, what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from proto_core.losses import GeneralizedFocalLoss, dequity_weight


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "dataset_equity.npz")


def near(found, expected):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_weights_equal_the_authors_function(golden):
    p = torch.from_numpy(golden["weight/p"])
    for (eta, gamma), expected in zip(golden["weight/eta_gamma"], golden["weight/values"]):
        near(dequity_weight(p, eta, gamma), expected)
        near([dequity_weight(float(one), eta, gamma) for one in p], expected)


@pytest.mark.parametrize("case", ["loss0", "loss1", "loss2"])
@pytest.mark.filterwarnings("ignore:eta = 0")
def test_loss_equals_the_reference(golden, case):
    logits = torch.from_numpy(golden["loss/logits"]).requires_grad_()
    targets, likelihood = (torch.from_numpy(golden[f"loss/{name}"]) for name in ("targets", "likelihood"))
    settings = [float(golden[f"{case}/{name}"]) for name in ("eta", "gamma")]
    found = GeneralizedFocalLoss(*settings)(logits, targets, likelihood)
    near(found, golden[f"{case}/loss"])
    near(torch.autograd.grad(found, logits)[0], golden[f"{case}/grad"])
    near(GeneralizedFocalLoss(*settings, reduction="none")(logits, targets, likelihood), golden[f"{case}/per_sample"])
    near(
        GeneralizedFocalLoss(*settings, reduction="sum")(logits, targets, likelihood),
        golden[f"{case}/per_sample"].sum(),
    )


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 4), st.floats(0, 8))
def test_weights_fall_with_likelihood(p, q, eta, gamma):
    low, high = dequity_weight(max(p, q), eta, gamma), dequity_weight(min(p, q), eta, gamma)
    assert eta / (eta + 1) - 1e-12 <= low <= high + 1e-12 <= 1 + 2e-12


def test_gamma_zero_is_no_weight_and_rounding_above_one_is_no_nan():
    assert dequity_weight(torch.tensor([0.0, 0.3, 1.0]), 0.5, 0.0).tolist() == [1, 1, 1]
    assert dequity_weight(1.0, 0.5, 0.0) == 1
    assert dequity_weight(torch.ones(3, dtype=torch.bfloat16), 0.5, 0.5).dtype == torch.float32
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    plain = GeneralizedFocalLoss(gamma=0.0)(logits, targets, torch.rand(5))
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets))


def test_normalised_mean_and_any_base_loss():
    losses, p = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.5, 1.0])
    w = dequity_weight(p, 0.3, 2.0)
    loss = GeneralizedFocalLoss(0.3, 2.0, normalize=True)
    torch.testing.assert_close(loss.weight(losses, p), (w * losses).sum() / w.sum())
    squares = GeneralizedFocalLoss(0.3, 2.0, base_loss=lambda out, y: (out[:, 0] - y).square())
    out = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    found = squares(out, torch.zeros(3), p)
    torch.testing.assert_close(found, (w * torch.tensor([1.0, 4.0, 16.0])).mean())
    p.requires_grad_()
    assert torch.autograd.grad(squares(out, torch.zeros(3), p), p, allow_unused=True) == (None,)


def test_eta_zero_forgets_the_likeliest_and_says_so():
    with pytest.warns(UserWarning, match="never learnt"):
        loss = GeneralizedFocalLoss(eta=0.0, normalize=True)
    assert loss.weight(torch.tensor([3.0]), torch.tensor([1.0])) == 0


X, Y, P = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([0.1, 0.2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dequity_weight(1.1), "likelihood: found 1.1"),
        (lambda: dequity_weight(float("nan")), "likelihood: found nan"),
        (lambda: dequity_weight(torch.tensor([0.5, -0.5])), "likelihood: found -0.5"),
        (lambda: dequity_weight(torch.tensor([torch.nan])), "likelihood: found nan"),
        (lambda: dequity_weight(0.5, eta=-1.0), "eta: found -1.0"),
        (lambda: GeneralizedFocalLoss(gamma=-1.0), "gamma: found -1.0"),
        (lambda: GeneralizedFocalLoss(reduction="max"), "reduction: found 'max'"),
        (lambda: GeneralizedFocalLoss()(X, Y, P[:1]), "losses, likelihood: found shapes"),
        (lambda: GeneralizedFocalLoss()(X[:0], Y[:0], P[:0]), "found shapes"),
        (lambda: GeneralizedFocalLoss(base_loss=F.cross_entropy)(X, Y, P), "base_loss: found a scalar"),
        (lambda: GeneralizedFocalLoss()(X, Y + 2, P), "targets: found 3"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
