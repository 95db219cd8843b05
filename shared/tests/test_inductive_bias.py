"""Required inductive bias: the authors' values, closed forms (exponential, chi-squared), and degenerate input."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from proto_core.theory import inductive_bias as ib


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "inductive_bias.npz")


def kernel_arguments(golden):
    return [torch.from_numpy(golden[f"kernel/{name}"]) for name in ("x_train", "y_train", "x_test", "y_test")]


def test_kernel_losses_equal_the_authors_sampler(golden):
    losses, mean, covariance = ib.sample_kernel_losses(
        *kernel_arguments(golden),
        sigma=float(golden["kernel/sigma"]),
        jitter=0.0,
        noise=torch.from_numpy(golden["kernel/noise"]),
        return_moments=True,
    )
    for found, name in [(losses, "losses"), (mean, "mean"), (covariance, "cov")]:
        np.testing.assert_allclose(found, golden[f"kernel/{name}"], rtol=1e-6, atol=1e-9, err_msg=name)


def test_bias_of_parameters_equals_the_authors_code(golden):
    for values, targets, biases, tails, fallback in zip(
        *(golden[f"params/{name}"] for name in ("values", "targets", "bias", "sankaran", "used_fallback"))
    ):
        for target, bias, tail, used in zip(targets, biases, tails, fallback):
            found = ib.sankaran_inductive_bias(target, *values)
            np.testing.assert_allclose(found, tail, rtol=1e-9, atol=1e-12)
            if used:
                with pytest.warns(UserWarning, match="Sankaran"):
                    np.testing.assert_allclose(ib.inductive_bias_from_params(target, *values), bias, rtol=1e-6)
            else:
                np.testing.assert_allclose(ib.inductive_bias_from_params(target, *values), bias, rtol=1e-6)


@pytest.mark.parametrize("name, losses", [("fit", "kernel/losses"), ("fit2", "fit2/losses")])
def test_fitted_biases_equal_the_authors_code(golden, name, losses):
    found = ib.fit_loss_distribution(golden[losses])
    for target, bias in zip(golden[f"{name}/targets"], golden[f"{name}/bias"]):
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if bias < 5 else {"rtol": 0.15}
        np.testing.assert_allclose(found.inductive_bias(target), bias, **tolerance)
        np.testing.assert_allclose(ib.required_inductive_bias(golden[losses], target), bias, **tolerance)
    if name == "fit":
        np.testing.assert_allclose(found.df, golden["fit/params"][0], rtol=0.05)
        np.testing.assert_allclose(found.scale, golden["fit/params"][3], rtol=0.05)


def test_closed_forms():
    for x in (1e-3, 0.5, 3.0):  # two degrees of freedom: an exponential of mean 2
        expected = -math.log(-math.expm1(-x / 2 / 1.7))
        assert ib.inductive_bias_from_params(x, 2.0, 0.0, 0.0, 1.7) == pytest.approx(expected, rel=1e-9)
    shifted = ib.inductive_bias_from_params(1.5, 3.0, 2.0, 1.0, 0.5)
    assert shifted == pytest.approx(-math.log(stats.ncx2.cdf(1.0, 3.0, 2.0)), rel=1e-9)
    assert ib.inductive_bias_from_params(1e9, 3.0, 0.0, 0.0, 1.0) == 0.0


def test_fallback_is_near_the_exact_tail():
    """Some per cent below, far under the mean: the log term of the tail is left out."""
    exact = -stats.chi2.logcdf(500.0, 1000.0)
    found = ib.sankaran_inductive_bias(500.0, 1000.0, 0.0, 0.0, 1.0)
    assert 0.95 * exact < found < exact


def test_bias_falls_with_the_target():
    losses = ib.ScaledNCX2(4.0, 3.0, 0.0, 0.2).rvs(500, seed=1)
    found = [ib.required_inductive_bias(losses, target) for target in np.quantile(losses, [0.001, 0.05, 0.3, 0.9])]
    assert all(a > b >= 0 for a, b in pairwise(found))
    assert found[1] == pytest.approx(-math.log(0.05), abs=0.4)
    assert ib.required_inductive_bias(losses, found[0], base=2) * math.log(2) == pytest.approx(
        ib.required_inductive_bias(losses, found[0])
    )


def test_empirical():
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert ib.required_inductive_bias(losses, 0.25, method="empirical") == pytest.approx(math.log(2))
    assert ib.required_inductive_bias(losses, 0.05, method="empirical") == math.inf
    assert ib.required_inductive_bias(losses, 1.0, method="empirical") == 0.0


def test_unreachable_and_degenerate():
    losses = np.linspace(1, 2, 20)
    assert ib.required_inductive_bias(losses, 0.0) == math.inf
    assert ib.required_inductive_bias(losses, -1.0) == math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 <= ib.required_inductive_bias(losses, 50.0) < 1e-3
    equal = np.full(10, 0.5)
    assert ib.required_inductive_bias(equal, 0.5) == 0.0
    assert ib.required_inductive_bias(equal, 0.49) == math.inf


def test_moments_where_the_fit_fails(monkeypatch):
    monkeypatch.setattr(stats.ncx2, "fit", lambda *a, **k: (np.nan, 0.0, 0.0, 1.0))
    losses = np.random.default_rng(0).gamma(3.0, 2.0, 4000)
    with pytest.warns(UserWarning, match="moments are matched"):
        found = ib.fit_loss_distribution(losses)
    assert found.nc == 0
    assert found.df * found.scale == pytest.approx(losses.mean())
    assert 2 * found.df * found.scale**2 == pytest.approx(losses.var())


def test_draws_pass_through_the_training_points():
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x[:, :1].sin()
    assert ib.sample_kernel_losses(x, y, x, y, num_samples=50, jitter=1e-10).max() < 1e-7
    far = ib.sample_kernel_losses(x, y, x + 100, y * 0, num_samples=40_000, generator=torch.Generator().manual_seed(1))
    assert far.mean().item() == pytest.approx(1.0, abs=0.03)  # the prior: variance 1, all points as one


def test_kernel_by_hand():
    found = ib.rbf_kernel(torch.zeros(1, 1), torch.tensor([[2.0]]), sigma=2.0)
    assert found.item() == pytest.approx(math.exp(-0.5))


def test_network_losses_are_true_means():
    """An untouched constant network: its loss does not depend on the batch size."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.ones(len(x), 2) + 0 * self.idle

    data = torch.utils.data.TensorDataset(torch.zeros(7, 3), torch.zeros(7, 2))
    for size in (1, 3, 7):
        found = ib.sample_network_losses(One, data, data, num_trials=2, epochs=1, batch_size=size)
        torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64))


def test_network_trials_differ_repeat_and_leave_the_random_state():
    data = torch.utils.data.TensorDataset(torch.randn(16, 3), torch.randn(16, 2))
    before = torch.random.get_rng_state()
    make = lambda: torch.nn.Linear(3, 2)  # noqa: E731
    one, two = (
        ib.sample_network_losses(make, data, data, num_trials=3, epochs=2, batch_size=4, seed=5) for _ in range(2)
    )
    assert torch.equal(one, two)
    assert len(one.unique()) == 3
    assert torch.equal(torch.random.get_rng_state(), before)
    longer = ib.sample_network_losses(make, data, data, num_trials=1, epochs=80, batch_size=4, seed=5, lr=0.05)
    assert longer[0] < one[0]


@pytest.mark.bad_input
def test_bad_input_is_named():
    good = np.linspace(1, 2, 20)
    x, y = torch.ones(3, 2), torch.ones(3, 1)
    data = torch.utils.data.TensorDataset(x, y)
    empty = torch.utils.data.TensorDataset(x[:0], y[:0])
    make = lambda: torch.nn.Linear(2, 1)  # noqa: E731
    numbers = {"num_trials": 1, "epochs": 1, "batch_size": 1}
    for call, says in [
        (lambda: ib.required_inductive_bias(good[:9], 1.0), "losses: found 9, needed at least 10"),
        (lambda: ib.required_inductive_bias(-good, 1.0), "losses: found -1.0"),
        (lambda: ib.required_inductive_bias([1.0, math.nan], 1.0, method="empirical"), "losses: found nan"),
        (lambda: ib.required_inductive_bias(good, math.nan), "target: found nan"),
        (lambda: ib.required_inductive_bias(good, 1.0, method="gauss"), "method: found 'gauss'"),
        (lambda: ib.required_inductive_bias(good, 1.0, base=1.0), "base: found 1.0"),
        (lambda: ib.fit_loss_distribution(np.ones(10)), "needed losses that differ"),
        (lambda: ib.fit_loss_distribution(np.ones((10, 2))), "losses: found shape"),
        (lambda: ib.inductive_bias_from_params(1.0, 0.0, 1.0, 0.0, 1.0), "df: found 0.0"),
        (lambda: ib.inductive_bias_from_params(1.0, 1.0, 1.0, 0.0, 0.0), "scale: found 0.0"),
        (lambda: ib.sankaran_inductive_bias(1.0, 1.0, -1.0, 0.0, 1.0), "nc: found -1.0"),
        (lambda: ib.rbf_kernel(x, x, 0.0), "sigma: found 0.0"),
        (lambda: ib.sample_kernel_losses(x, y[:, 0], x, y), "x_train, y_train"),
        (lambda: ib.sample_kernel_losses(x, y, x[:, :1], y), "x_test, y_test"),
        (lambda: ib.sample_kernel_losses(x, y, x, y, noise=torch.ones(2, 1, 5)), "noise: found shape"),
        (lambda: ib.sample_kernel_losses(x, y, x, y, jitter=-1.0), "jitter: found -1.0"),
        (lambda: ib.sample_network_losses(make, data, data, **numbers | {"epochs": 0}), "epochs: found 0"),
        (lambda: ib.sample_network_losses(make, data, empty, **numbers), "test_set: found no sample"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
