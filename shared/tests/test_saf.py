"""SAF, MESA, SAM: the authors' runs step by step, pytorch_optimizer, closed forms, stale rows, state."""

import copy

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.nn import functional as F

from proto_core.optim import (
    MESA,
    SAM,
    IndexedDataset,
    TrajectoryLoss,
    hessian_top_eigenvalue,
    hessian_trace,
    sharpness,
    trajectory_kl,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "saf.npz")


def model(golden):
    net = nn.Linear(3, 4, bias=False).double()
    net.weight.data.copy_(torch.from_numpy(golden["W0"]))
    return net


def data(golden):
    return torch.from_numpy(golden["X"]), torch.from_numpy(golden["y"])


def test_kl_equals_the_authors_expression(golden):
    logits = torch.from_numpy(golden["kl/logits"]).requires_grad_()
    loss = trajectory_kl(logits, torch.from_numpy(golden["kl/past_logits"]), float(golden["kl/temperature"]))
    np.testing.assert_allclose(loss.detach(), golden["kl/loss"], **EXACT)
    np.testing.assert_allclose(torch.autograd.grad(loss, logits)[0], golden["kl/grad"], **EXACT)


@pytest.mark.parametrize("kind", ["saf", "mesa"])
def test_run_equals_the_authors_loop(golden, kind):
    net, (x, y) = model(golden), data(golden)
    shared = {
        "lam": float(golden["lam"]),
        "temperature": float(golden["temperature"]),
        "start_epoch": int(golden["start_epoch"]),
        "end_epoch": int(golden["end_epoch"]),
    }
    if kind == "saf":
        term = TrajectoryLoss(len(x), 4, lag=int(golden["lag"]), storage_dtype=torch.float64, **shared)
    else:
        term = MESA(net, decay=float(golden["decay"]), **shared)
    optimizer = torch.optim.SGD(net.parameters(), lr=float(golden["lr"]))
    terms, losses = [], []
    for epoch, order in enumerate(golden["order"]):
        for rows in torch.from_numpy(order).split(int(golden["batch_size"])):
            logits = net(x[rows])
            added = term(logits, rows, epoch) if kind == "saf" else term(x[rows], logits, epoch)
            loss = F.cross_entropy(logits, y[rows]) + added
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if kind == "mesa":
                term.update(net)
            terms.append(added.item())
            losses.append(loss.item())
    np.testing.assert_allclose(terms, golden[f"{kind}/terms"], **EXACT)
    np.testing.assert_allclose(losses, golden[f"{kind}/losses"], **EXACT)
    np.testing.assert_allclose(net.weight.detach(), golden[f"{kind}/W_final"], **EXACT)
    if kind == "mesa":
        np.testing.assert_allclose(term.teacher.weight, golden["mesa/W_ema"], **EXACT)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_step_equals_the_reference(golden, adaptive):
    net, (x, y) = model(golden), data(golden)
    rho = float(golden["sam/rho"])
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=float(golden["lr"]))

    def closure():
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    np.testing.assert_allclose(optimizer.step(closure).item(), golden["sam/loss"], **EXACT)
    name = "sam/W_after_adaptive_step" if adaptive else "sam/W_after_step"
    np.testing.assert_allclose(net.weight.detach(), golden[name], **EXACT)


def test_measures_equal_the_dense_hessian(golden):
    net, (x, y) = model(golden), data(golden)
    found = sharpness(net, F.cross_entropy, (x, y), rho=float(golden["sam/rho"]))
    np.testing.assert_allclose(found, golden["sam/sharpness"], **EXACT)
    np.testing.assert_array_equal(net.weight.detach(), golden["W0"])
    g = torch.Generator().manual_seed(0)
    top = hessian_top_eigenvalue(lambda: F.cross_entropy(net(x), y), [net.weight], iters=1000, generator=g)
    np.testing.assert_allclose(top, golden["sharp/top_eigenvalue"], rtol=1e-3)
    trace = hessian_trace(lambda: F.cross_entropy(net(x), y), [net.weight], samples=500, generator=g)
    np.testing.assert_allclose(trace, golden["sharp/trace"], rtol=0.3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_agrees_with_pytorch_optimizer(adaptive):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    two = copy.deepcopy(one)
    x, y = torch.randn(10, 4).double(), torch.arange(10) % 3
    settings = {"rho": 0.1, "adaptive": adaptive, "lr": 0.1, "momentum": 0.9}
    ours = SAM(one.parameters(), torch.optim.SGD, **settings)
    peer = pytorch_optimizer.SAM(two.parameters(), torch.optim.SGD, use_gc=False, perturb_eps=1e-12, **settings)
    for _ in range(3):
        for net, optimizer in ((one, ours), (two, peer)):
            F.cross_entropy(net(x), y).backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(net(x), y).backward()
            optimizer.second_step(zero_grad=True)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_sam_state_and_order_of_steps():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    w.grad = torch.ones(2)
    optimizer.first_step(zero_grad=False)
    with pytest.raises(RuntimeError, match="second_step comes next"):
        optimizer.first_step()
    optimizer.second_step()
    torch.testing.assert_close(w.data, torch.full((2,), 0.9))
    state = copy.deepcopy(optimizer.state_dict())
    again = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    again.load_state_dict(state)
    assert torch.equal(again.state_dict()["state"][0]["momentum_buffer"], torch.ones(2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.05


def test_stale_and_missing_rows_are_left_out():
    saf = TrajectoryLoss(4, 2, lam=1.0, temperature=1.0, lag=1, start_epoch=0)
    now = torch.tensor([[1.0, 0.0]] * 4)
    saf(torch.zeros(2, 2), torch.tensor([0, 1]), 0)
    expected = trajectory_kl(now[:1], torch.zeros(1, 2), 1.0)
    torch.testing.assert_close(saf(now, torch.arange(4), 1), expected)  # 2 and 3 were never stored
    saf(now[:1], torch.tensor([0]), 2)
    assert saf(now, torch.tensor([1, 2, 3, 1]), 3) == 0  # nothing of epoch 2 is known of them


def test_nan_rows_count_as_unknown_and_the_last_duplicate_wins():
    saf = TrajectoryLoss(2, 2, lam=1.0, temperature=1.0, lag=1, start_epoch=0)
    saf(torch.tensor([[5.0, 0.0], [0.0, 0.0], [torch.nan, 0.0]]), torch.tensor([0, 0, 1]), 0)
    now = torch.tensor([[0.0, 0.0], [9.0, 0.0]], requires_grad=True)
    loss = saf(now, torch.tensor([0, 1]), 1)
    assert loss == 0
    assert torch.autograd.grad(loss, now)[0].isfinite().all()


def test_outputs_too_large_for_the_storage_count_as_unknown():
    saf = TrajectoryLoss(2, 2, lam=1.0, temperature=1.0, lag=1, start_epoch=0, storage_dtype=torch.float16)
    saf(torch.tensor([[1e6, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 0)
    now = torch.zeros(2, 2, requires_grad=True)
    loss = saf(now, torch.tensor([0, 1]), 1)
    torch.testing.assert_close(loss, trajectory_kl(now[1:], torch.tensor([[1.0, 0.0]]), 1.0))
    assert torch.autograd.grad(loss, now)[0].isfinite().all()


def test_activity_is_strict_and_the_buffer_goes_round():
    saf = TrajectoryLoss(1, 2, lag=3, start_epoch=2, end_epoch=6)
    assert [epoch for epoch in range(8) if saf.is_active(epoch)] == [3, 4, 5]
    outputs = torch.randn(9, 1, 2)
    for epoch in range(9):
        found = saf(outputs[epoch], torch.tensor([0]), epoch)
        expected = 0.3 * trajectory_kl(outputs[epoch], outputs[epoch - 3]) if 3 <= epoch < 6 else torch.zeros(())
        torch.testing.assert_close(found, expected)


def test_state_continues_and_half_storage_is_near():
    torch.manual_seed(0)
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    rows = torch.arange(4)
    saf = TrajectoryLoss(4, 3, lag=1, start_epoch=0)
    saf(first, rows, 0)
    resumed = TrajectoryLoss(4, 3, lag=1, start_epoch=0)
    resumed.load_state_dict(saf.state_dict())
    half = TrajectoryLoss(4, 3, lag=1, start_epoch=0, storage_dtype=torch.float16)
    half(first, rows, 0)
    expected = saf(second, rows, 1)
    assert resumed(second, rows, 1) == expected
    torch.testing.assert_close(half(second.bfloat16(), rows, 1), expected, rtol=0.05, atol=1e-3)


def test_large_logits_and_equal_ones():
    big = torch.tensor([[1e4, -1e4], [0.0, 1e5]], requires_grad=True)
    assert trajectory_kl(big, big.detach().flip(1)).isfinite()
    same = trajectory_kl(big, big.detach())
    assert same == 0
    assert torch.autograd.grad(same, big)[0].abs().max() == 0


def test_teacher_follows_buffers_and_rests():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    mesa = MESA(net, decay=0.5, start_epoch=0)
    before = mesa.teacher[1].running_mean.clone()
    net(torch.randn(8, 2) + 3)
    mesa.train()
    assert not mesa.teacher.training
    mesa.update(net)
    torch.testing.assert_close(mesa.teacher[1].running_mean, (before + net[1].running_mean) / 2)
    assert mesa.teacher[1].num_batches_tracked == 1
    assert not any(p.requires_grad for p in mesa.teacher.parameters())
    assert set(mesa.state_dict()) == {f"teacher.{name}" for name in net.state_dict()}
    with pytest.raises(ValueError, match="found other entries"):
        mesa.update(nn.Linear(2, 3))


def test_sharpness_of_a_network_leaves_it_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net.train()
    state = copy.deepcopy(net.state_dict())
    assert sharpness(net, F.cross_entropy, (torch.randn(8, 3), torch.arange(8) % 2), rho=0.1) > 0
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_hessian_of_a_quadratic_and_of_a_linear_form():
    torch.manual_seed(0)
    w, v = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    a = torch.diag(torch.tensor([1.0, -7.0, 2.0]))

    def quadratic():
        return 0.5 * w @ a @ w + v.sum()

    assert hessian_top_eigenvalue(quadratic, [w, v]) == pytest.approx(-7, rel=1e-3)
    assert hessian_trace(quadratic, [w, v], samples=3) == pytest.approx(-4, abs=1e-4)
    assert hessian_top_eigenvalue(lambda: v.sum(), [v]) == 0


def test_indexed_dataset():
    data = IndexedDataset(torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4)))
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)))
    assert torch.equal(batch[0], batch[2])
    assert IndexedDataset([7, 8])[1] == (1, 8)


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, w = torch.zeros(2, 3), nn.Parameter(torch.ones(1))
    saf = TrajectoryLoss(4, 3)
    for call, says in [
        (lambda: trajectory_kl(x, x[:1]), "logits, past_logits: found shapes"),
        (lambda: trajectory_kl(x, x, 0.0), "temperature: found 0.0"),
        (lambda: TrajectoryLoss(4, 3, lam=-1.0), "lam: found -1.0"),
        (lambda: TrajectoryLoss(4, 3, lag=0), "lag: found 0"),
        (lambda: TrajectoryLoss(4, 3, lag=3, start_epoch=1), "start_epoch: found 1, needed at least lag - 1 = 2"),
        (lambda: TrajectoryLoss(0, 3), "num_samples: found 0"),
        (lambda: saf(x, torch.tensor([0, 4]), 0), "indices: found 4, needed 0 to 3"),
        (lambda: saf(x[:, :2], torch.tensor([0, 1]), 0), "logits, indices: found shapes"),
        (lambda: MESA(nn.Linear(1, 1), decay=1.0), "decay: found 1.0"),
        (lambda: MESA(nn.Linear(1, 1), lam=-1.0), "lam: found -1.0"),
        (lambda: SAM([w], torch.optim.SGD, rho=-0.1, lr=0.1), "rho: found -0.1"),
        (lambda: SAM([w], torch.optim.SGD, lr=0.1).step(), "closure: found None"),
        (lambda: sharpness(nn.Linear(1, 1), F.mse_loss, (x, x), rho=0.0), "rho: found 0.0"),
        (lambda: hessian_trace(lambda: w.sum(), []), "params: found none"),
        (lambda: hessian_top_eigenvalue(lambda: w.sum(), [w], iters=0), "iters: found 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
