"""Callbacks for flat minima and protected weights: each equals the same training written out in plain torch."""

import copy

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from proto_core.optim import MESA, SAM, GradientNormRegularizer, TrajectoryLoss
from proto_core.training import (
    GradientNormCallback,
    MESACallback,
    NullSpaceCallback,
    SAFCallback,
    SAMCallback,
    WholeFileCheckpointIO,
)


class Classifier(L.LightningModule):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(4, 8), middle, nn.ReLU(), nn.Linear(8, 3))
        self.calls = 0

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(self.net(batch[1]), batch[2])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def data(seed: int = 1) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 4, generator=g)
    return TensorDataset(torch.arange(24), x, (x @ torch.randn(4, 3, generator=g)).argmax(1))


def fit(module: L.LightningModule, callbacks: list[L.Callback], epochs: int = 3, seed: int = 1, **options):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **{k: v for k, v in options.items() if k != "ckpt_path"},
    )
    trainer.fit(module, DataLoader(data(seed), batch_size=8), ckpt_path=options.get("ckpt_path"))
    return trainer


def by_hand(step, epochs: int = 3, norm: bool = False) -> nn.Module:
    module = Classifier(norm)
    optimizer = module.configure_optimizers()
    for epoch in range(epochs):
        for rows, x, y in DataLoader(data(), batch_size=8):
            step(module.net, optimizer, rows, x, y, epoch)
    return module


def same(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def differs(one: nn.Module, two: nn.Module) -> bool:
    return any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(adaptive):
    module = Classifier()
    fit(module, [SAMCallback(rho=0.3, adaptive=adaptive)])
    sam = None

    def step(net, optimizer, rows, x, y, epoch):
        nonlocal sam
        sam = sam or SAM(net.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.2, momentum=0.9)
        sam.zero_grad()
        F.cross_entropy(net(x), y).backward()
        sam.first_step()
        F.cross_entropy(net(x), y).backward()
        sam.second_step()

    same(module, by_hand(step))
    assert module.calls == 2 * 9


def test_sam_moves_running_statistics_once():
    module, plain = Classifier(norm=True), Classifier(norm=True)
    fit(module, [SAMCallback(rho=0.0)])
    fit(plain, [])
    same(module, plain)
    assert module.net[1].num_batches_tracked == 9


def test_saf():
    options = {"lam": 2.0, "lag": 1, "start_epoch": 0}
    module, callback = Classifier(), SAFCallback(24, 3, "net", 0, **options)
    fit(module, [callback], epochs=4)
    loss = TrajectoryLoss(24, 3, temperature=5.0, **options)

    def step(net, optimizer, rows, x, y, epoch):
        optimizer.zero_grad()
        logits = net(x)
        (F.cross_entropy(logits, y) + loss(logits, rows, epoch)).backward()
        optimizer.step()

    same(module, by_hand(step, epochs=4))
    for name, value in callback.state_dict().items():
        torch.testing.assert_close(value, loss.state_dict()[name], rtol=1e-4, atol=1e-5)
    plain = Classifier()
    fit(plain, [], epochs=4)
    assert differs(module, plain)


def test_mesa():
    options = {"lam": 2.0, "decay": 0.9, "start_epoch": 0}
    module, callback = Classifier(), MESACallback("net", **options)
    fit(module, [callback], epochs=4)
    mesa = None

    def step(net, optimizer, rows, x, y, epoch):
        nonlocal mesa
        mesa = mesa or MESA(net, temperature=5.0, **options)
        optimizer.zero_grad()
        logits = net(x)
        (F.cross_entropy(logits, y) + mesa(x, logits, epoch)).backward()
        optimizer.step()
        mesa.update(net)

    same(module, by_hand(step, epochs=4))
    same(callback.loss.teacher, mesa.teacher)


def test_gradient_norm():
    options = {"rho": 0.1, "r": 0.05, "lam": 0.5, "eta": 0.5, "epsilon": 0.01}
    module, callback = Classifier(), GradientNormCallback("net", **options)
    fit(module, [callback])
    regularizer = None

    def step(net, optimizer, rows, x, y, epoch):
        nonlocal regularizer
        regularizer = regularizer or GradientNormRegularizer(net, **options)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        regularizer.apply(lambda: net(x).mean())
        optimizer.step()

    same(module, by_hand(step))
    torch.testing.assert_close(torch.as_tensor(callback.regularizer.lam), torch.as_tensor(regularizer.lam))
    assert float(regularizer.lam) != 0.5


def test_null_space_protects_the_first_fit():
    callback = NullSpaceCallback(["net.0"], offset=0.0)
    module = Classifier()
    fit(module, [callback])
    assert callback.projection.covariances["net.0.weight"].shape == (4, 4)
    projector = callback.projection.projectors["net.0.weight"]
    torch.testing.assert_close(projector @ projector, projector, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(module.net[0].weight.detach())
    covariance = callback.projection.covariances["net.0.weight"].clone()
    fit(module, [callback], seed=2)
    change = module.net[0].weight.detach() - before
    assert change.norm() > 1e-3
    torch.testing.assert_close(change @ projector, change, rtol=1e-3, atol=1e-5)
    assert (callback.projection.covariances["net.0.weight"] - covariance).trace() > 0, "tasks add up"


@pytest.mark.parametrize(
    "build",
    [
        lambda: SAFCallback(24, 3, "net", 0, lag=1, start_epoch=0),
        lambda: MESACallback("net", start_epoch=0, decay=0.9),
        lambda: GradientNormCallback("net", lam=0.5, eta=0.5),
    ],
)
def test_training_goes_on_where_a_checkpoint_ended(build, tmp_path):
    whole = Classifier()
    fit(whole, [build()], epochs=4)
    first = Classifier()
    trainer = fit(first, [build()], epochs=2, plugins=[WholeFileCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Classifier()
    fit(second, [build()], epochs=4, ckpt_path=tmp_path / "half.ckpt")
    same(second, whole)


class Silent(Classifier):
    def training_step(self, batch, batch_idx):
        return self.net[0](batch[1]).sum()


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callback", "options", "message"),
    [
        (Classifier, lambda: SAMCallback(rho=-1.0), {}, "rho: found -1.0"),
        (Classifier, SAMCallback, {"accumulate_grad_batches": 2}, "found accumulate_grad_batches=2, needed 1"),
        (Manual, SAMCallback, {}, "SAMCallback: found manual optimisation in Manual"),
        (Classifier, lambda: MESACallback("body"), {}, "module: found 'body', needed the name .* net"),
        (Classifier, lambda: MESACallback(""), {}, "module: found ''"),
        (Silent, lambda: MESACallback("net"), {}, "was not called in this training step"),
        (Classifier, lambda: SAFCallback(24, 3, "net"), {}, "batch: found list without 'index'"),
        (Classifier, lambda: NullSpaceCallback(["head.*"]), {}, "modules: found no linear layer"),
    ],
)
def test_refuses(module, callback, options, message):
    with pytest.raises(ValueError, match=message):
        fit(module(), [callback()], **options)
