"""Gradient-norm regularisation and offline optimisation (IGNITE): the authors' run, known values, errors."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from proto_core.offline_optimization import (
    GaussianSurrogate,
    OfflineTask,
    SurrogateModule,
    gradient_ascent_search,
    percentile_scores,
    top_k_designs,
)
from proto_core.optim import GradientNormRegularizer

NAMES = [f"linear{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "ignite.npz")


def near(found, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


def surrogate_of(golden, prefix=""):
    model = GaussianSurrogate(3, 5).double()
    start = {name: torch.from_numpy(golden[prefix + name]) for name in NAMES}
    for name in ("max_logstd", "min_logstd"):
        start[name] = torch.from_numpy(golden[f"{prefix}{name}" if prefix else f"{name}0"])
    model.load_state_dict(start)
    return model


def test_training_equals_the_authors_run(golden):
    model = surrogate_of(golden)
    near(model.max_logstd, golden["max_logstd0"])
    options = {name: float(golden[name]) for name in ("rho", "r", "eta", "epsilon")}
    regularizer = GradientNormRegularizer(model, lam=float(golden["lam0"]), clamp_lambda=False, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(golden["lr"]))
    for step, (x, y) in enumerate(zip(torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"]))):
        near(model(x)[0].flatten(), golden["means"][step])
        optimizer.zero_grad()
        loss = model.nll(x, y)
        near(loss, golden["nll"][step])
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        found = regularizer.apply(lambda x=x: model(x)[0].mean())
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before)), "weights come back bit by bit"
        near(found["grad_norm"], golden["grad_norms"][step])
        near(found["lam"], golden["lams"][step])
        if step == 0:
            for name, p in model.named_parameters():
                if f"grad_step0/{name}" in golden:
                    near(p.grad, golden[f"grad_step0/{name}"])
        optimizer.step()
    for name, p in model.named_parameters():
        near(p, golden[f"final/{name}"])


def test_search_equals_the_authors_code(golden):
    model = surrogate_of(golden, "final/")
    x0, lr = torch.from_numpy(golden["search/x0"]), float(golden["search/lr"])
    options = {"steps": 5, "lr": lr, "return_trajectory": True}
    found = gradient_ascent_search(lambda x: model(x)[0], x0, **options)
    plain = gradient_ascent_search(lambda x: model(x)[0], x0, scale_by_dim=False, **options)
    near(found, golden["search/trajectory"])
    assert not torch.allclose(plain, found)
    near(gradient_ascent_search(lambda x: model(x)[0], x0, steps=5, lr=lr), golden["search/trajectory"][-1])


def test_scores_equal_numpy(golden):
    found = percentile_scores(golden["score/raw"], float(golden["score/y_min"]), float(golden["score/y_max"]))
    near(found, golden["score/percentiles"], rtol=1e-9)


class Quadratic(nn.Module):
    """G = |w|^2 / 2: gradient w, Hessian the identity."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self):
        return self.w.square().sum() / 2


def test_known_gradient_and_multiplier():
    model = Quadratic([3.0, 4.0])
    regularizer = GradientNormRegularizer(model, rho=0.1, r=0.05, lam=0.5, eta=0.2, epsilon=0.1)
    found = regularizer.apply(model)
    near(found["grad_norm"], 5.0)
    near(model.w.grad, 0.5 * 0.1 * np.array([0.6, 0.8]))  # lam rho w / |w|, on top of no gradient
    near(regularizer.lam, 0.5 + 0.2 * (0.1 * 5 - 0.1))
    fixed = GradientNormRegularizer(model, lam=0.5, constrained=False)
    near(fixed.apply(model)["lam"], 0.5)


def test_multiplier_stays_above_zero_unless_told_otherwise():
    model = Quadratic([0.1, 0.0])
    options = {"lam": 0.01, "eta": 1.0, "epsilon": 1.0}
    assert GradientNormRegularizer(model, **options).apply(model)["lam"] == 0
    near(GradientNormRegularizer(model, clamp_lambda=False, **options).apply(model)["lam"], 0.01 + 0.05 * 0.1 - 1)


def test_no_gradient_adds_nothing_and_still_moves_the_multiplier():
    model = Quadratic([0.0, 0.0])
    model.w.grad = torch.ones(2, dtype=torch.float64)
    regularizer = GradientNormRegularizer(model, lam=0.5, eta=1.0, epsilon=0.1)
    assert regularizer.apply(model)["grad_norm"] == 0
    assert model.w.grad.tolist() == [1, 1]
    near(regularizer.lam, 0.4)


def test_dropout_and_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.BatchNorm1d(50), nn.Dropout(0.5), nn.Linear(50, 1)).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    model(x).mean().backward()
    running = model[1].running_mean.clone()
    state = torch.get_rng_state()
    before = [p.grad.clone() for p in model.parameters()]
    GradientNormRegularizer(model, lam=1.0, r=1e-6, rho=1e-6).apply(lambda: model(x).mean())
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(torch.get_rng_state(), state)
    moved = torch.cat([(p.grad - old).flatten() for p, old in zip(model.parameters(), before)])
    assert moved.abs().max() < 1e-3, "another mask in the second pass would be a large difference"


def test_state_is_kept():
    model = Quadratic([3.0, 4.0])
    regularizer = GradientNormRegularizer(model, lam=0.5)
    regularizer.apply(model)
    other = GradientNormRegularizer(model, lam=0.1)
    other.load_state_dict(regularizer.state_dict())
    assert float(other.lam) == float(regularizer.lam) != 0.5
    assert "rho=0.05" in repr(other)


def test_likelihood_is_that_of_torch_and_weights_count():
    torch.manual_seed(0)
    model, x, y = GaussianSurrogate(3, 8).double(), torch.randn(6, 3).double(), torch.randn(6, 1).double()
    mean, log_std = model(x)
    terms = -torch.distributions.Normal(mean, log_std.exp()).log_prob(y)
    near(model.nll(x, y), terms.mean().item())
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    near(model.nll(x, y, weights), ((terms[1] + 2 * terms[2]) / 3).item())
    assert model.nll(x, y, torch.zeros(6)) == 0
    raw = model.linear2(F.leaky_relu(model.linear1(F.leaky_relu(model.linear0(x), 0.3)), 0.3))[:, 1:]
    capped = np.log(0.2) - np.log1p(np.exp(np.log(0.2) - raw.detach().numpy()))
    near(log_std, np.log(0.1) + np.log1p(np.exp(capped - np.log(0.1))))


def test_module_trains_resumes_and_keeps_its_multiplier(tmp_path):
    task = OfflineTask("ackley", dim=4, seed=1)
    torch.manual_seed(0)
    y = (task.y - task.y.mean()) / task.y.std()
    loader = DataLoader(TensorDataset(task.x, y), batch_size=250)

    def module(lam=1e-3):
        surrogate = GaussianSurrogate(4, hidden=16)
        return SurrogateModule(surrogate, GradientNormRegularizer(surrogate, lam=lam, eta=0.1), model_noise_std=0.01)

    def trainer(epochs):
        return L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
        )

    first, run = module(), trainer(2)
    start = first.surrogate.nll(task.x, y).item()
    run.fit(first, loader, loader)
    assert first.surrogate.nll(task.x, y).item() < start
    assert run.callback_metrics["val/nll"].isfinite()
    run.save_checkpoint(tmp_path / "last.ckpt")
    second = module(lam=7.0)
    trainer(2).fit(second, loader, ckpt_path=tmp_path / "last.ckpt")
    assert float(second.regularizer.lam) == float(first.regularizer.lam)
    assert torch.equal(second(task.x), first(task.x))


def test_tasks_have_their_maxima_where_they_are_known():
    assert OfflineTask("ackley", 3).score(torch.zeros(1, 3)).abs().item() < 1e-5
    assert OfflineTask("rosenbrock", 3).score(torch.full((1, 3), 0.5)).item() == 0
    peak = torch.full((1, 3), -2.903534 / 5)
    near(OfflineTask("styblinski_tang", 3).score(peak), [3 * 39.16617], rtol=1e-5)
    task = OfflineTask("ackley", 3, seed=4)
    assert torch.equal(task.score(task.x), task.y.flatten())
    assert task.y.max() < task.y_max
    assert torch.equal(task.score(torch.full((1, 3), 9.0)), task.score(torch.ones(1, 3)))
    assert torch.equal(OfflineTask("ackley", 3, seed=4).x, task.x)
    assert torch.equal(top_k_designs(task.x, task.y, 5), task.x[task.y.flatten().argsort(descending=True)[:5]])


MODEL = Quadratic([1.0, 2.0])
TASK = OfflineTask("ackley", 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradientNormRegularizer(MODEL, rho=0.0), "rho: found 0.0"),
        (lambda: GradientNormRegularizer(MODEL, r=-1.0), "r: found -1.0"),
        (lambda: GradientNormRegularizer(MODEL, lam=-1.0), "lam: found -1.0"),
        (lambda: GradientNormRegularizer(MODEL, eta=-1.0), "eta: found -1.0"),
        (lambda: GradientNormRegularizer(MODEL, epsilon=-1.0), "epsilon: found -1.0"),
        (lambda: GradientNormRegularizer(MODEL).apply(lambda: MODEL.w), "mean_fn: found a result of shape"),
        (lambda: GradientNormRegularizer(MODEL).apply(lambda: torch.ones(())), "without a gradient"),
        (lambda: GaussianSurrogate(2, 4).nll(torch.ones(0, 2), torch.ones(0, 1)), "x, y: found shapes"),
        (lambda: GaussianSurrogate(2, 4).nll(torch.full((1, 2), torch.nan), torch.ones(1, 1)), "x: found 2 NaN"),
        (lambda: GaussianSurrogate(2, 4).nll(torch.ones(1, 2), torch.full((1, 1), torch.nan)), "y: found 1 NaN"),
        (lambda: GaussianSurrogate(2, max_std=0.1, min_std=0.2), "min_std: found 0.2"),
        (lambda: top_k_designs(TASK.x, TASK.y, 1001), "k: found 1001, needed 1 to 1000"),
        (lambda: top_k_designs(TASK.x, TASK.y[1:]), "x, y: found shapes"),
        (lambda: percentile_scores([1.0], 2.0, 2.0), "needed y_min < y_max"),
        (lambda: percentile_scores([], 0.0, 1.0), "needed one score"),
        (lambda: gradient_ascent_search(lambda x: x, torch.ones(3)), "x0: found shape"),
        (lambda: gradient_ascent_search(lambda x: x, torch.full((1, 1), torch.nan)), "x0: found 1 NaN"),
        (lambda: OfflineTask("sphere"), "name: found 'sphere'"),
        (lambda: OfflineTask("rosenbrock", 1), "dim: found 1"),
        (lambda: TASK.score(torch.ones(2, 3)), "x: found shape"),
        (
            lambda: SurrogateModule(GaussianSurrogate(2, 4), GradientNormRegularizer(GaussianSurrogate(2, 4))),
            "regularizer: found one of another model",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
