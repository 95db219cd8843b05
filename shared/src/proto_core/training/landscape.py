"""Flat minima as Lightning callbacks: what ``proto_core.optim`` has, switched on in any system.

``--trainer.callbacks+=proto_core.training.SAMCallback`` on a command line, or ``Trainer(callbacks=[...])``. They need
automatic optimisation and work on one process or several. SAF, MESA and the gradient norm look at a network inside the
module by its name; whatever it returns, its logits are the attribute ``logits``, or the first entry, or itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from proto_core.optim.gradient_norm import GradientNormRegularizer
from proto_core.optim.sharpness import ascend, buffers_at_rest, restore
from proto_core.optim.trajectory import MESA, TrajectoryLoss, trajectory_kl

__all__ = ["GradientNormCallback", "MESACallback", "SAFCallback", "SAMCallback"]


class _WatchesNetwork(L.Callback):
    """Sees what the network inside the module gets and gives in training."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._inputs: tuple[Any, ...] | None = None
        self._logits: Tensor | None = None
        self._watching = True
        self._hook: Any = None

    def network(self, pl_module: L.LightningModule) -> nn.Module:
        """The network by its name."""
        found = dict(pl_module.named_modules()).get(self.module) if self.module else None
        if found is None:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"module: found {self.module!r}, needed the name of a network inside, such as {names}")
        return found

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch."""
        _check_automatic(self, pl_module)
        self._hook = self.network(pl_module).register_forward_hook(self._see)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop to watch."""
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop to watch."""
        self._forget()

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._inputs = self._logits = None

    def _see(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if network.training and torch.is_grad_enabled() and self._watching:
            self._inputs, self._logits = inputs, logits_of(output)

    def seen(self) -> tuple[tuple[Any, ...], Tensor]:
        """Inputs and logits of the last training forward."""
        if self._inputs is None or self._logits is None:
            raise ValueError(f"module: {self.module!r} was not called in this training step, nothing can be said of it")
        return self._inputs, self._logits


class SAFCallback(_WatchesNetwork):
    """SAF in any classifier: see :class:`proto_core.optim.TrajectoryLoss`.

    Args:
        num_samples: size of the training set.
        num_classes: C.
        module: name of the network inside the module.
        index: where a batch holds the numbers of its samples: an attribute's name, or a position
            (:class:`proto_core.optim.IndexedDataset` puts them at 0).
        lam: weight.
        temperature: T.
        lag: epochs to look back.
        start_epoch: the first active epoch is the one after.
        end_epoch: from here on it is inactive; ``None``: never.

    Raises:
        ValueError: manual optimisation, no network of that name, a batch without the numbers.

    Example:
        >>> from proto_core.training import SAFCallback
        >>> callback = SAFCallback(num_samples=1000, num_classes=10, module="net", index=0)
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        module: str,
        index: str | int = "index",
        *,
        lam: float = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__(module)
        self.index = index
        options = {"lam": lam, "temperature": temperature, "lag": lag, "start_epoch": start_epoch}
        self.loss = TrajectoryLoss(num_samples, num_classes, end_epoch=end_epoch, **options)  # type: ignore[arg-type]
        self._rows: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the numbers of the samples."""
        if isinstance(self.index, str):
            rows = getattr(batch, self.index, None)
        else:
            rows = batch[self.index] if isinstance(batch, Sequence) and len(batch) > self.index else None
        if not isinstance(rows, Tensor):
            raise ValueError(f"batch: found {type(batch).__name__} without {self.index!r}, needed the samples' numbers")
        self._rows = rows
        self.loss.to(pl_module.device)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the term."""
        assert self._rows is not None
        _add(trainer, loss, self.loss(self.seen()[1], self._rows, trainer.current_epoch))

    def state_dict(self) -> dict[str, Any]:
        """The stored outputs."""
        return dict(self.loss.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.loss.load_state_dict(state_dict)


class MESACallback(_WatchesNetwork):
    """MESA in any classifier: see :class:`proto_core.optim.MESA`; one forward pass of the average more a step.

    Args:
        module: name of the network inside the module.
        lam: weight.
        temperature: T.
        decay: of the average.
        start_epoch: the first active epoch is the one after.
        end_epoch: from here on it is inactive; ``None``: never.

    Raises:
        ValueError: manual optimisation, no network of that name.

    Example:
        >>> from proto_core.training import MESACallback
        >>> callback = MESACallback(module="net", decay=0.999)
    """

    def __init__(
        self,
        module: str,
        *,
        lam: float = 0.8,
        temperature: float = 5.0,
        decay: float = 0.9998,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__(module)
        self.options: dict[str, Any] = {"lam": lam, "temperature": temperature, "decay": decay}
        self.options |= {"start_epoch": start_epoch, "end_epoch": end_epoch}
        self.loss: MESA | None = None
        self._kept: dict[str, Any] | None = None
        self._step = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the network, or take up the copy of a checkpoint."""
        if self.loss is None:
            self.loss = MESA(self.network(pl_module), **self.options)
        if self._kept is not None:
            self.loss.teacher.load_state_dict(self._kept)
            self._kept = None
        self.loss.to(pl_module.device)
        self._step = trainer.global_step
        super().on_fit_start(trainer, pl_module)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the term."""
        assert self.loss is not None
        inputs, logits = self.seen()
        if self.loss.is_active(trainer.current_epoch):
            with torch.no_grad():
                past = logits_of(self.loss.teacher(*inputs))
            _add(trainer, loss, self.loss.lam * trajectory_kl(logits, past, self.loss.temperature))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Move the average after every step of the optimiser."""
        assert self.loss is not None
        if trainer.global_step > self._step:
            self.loss.update(self.network(pl_module))
            self._step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {} if self.loss is None else dict(self.loss.teacher.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over when training begins."""
        self._kept = state_dict or None


class GradientNormCallback(_WatchesNetwork):
    """Gradient-norm regularisation in any system: see :class:`proto_core.optim.GradientNormRegularizer`.

    G is the mean of all the network's outputs over the batch.

    Args:
        module: name of the network inside the module.
        rho: radius of the constraint.
        r: step of the finite difference.
        lam: multiplier at the start.
        eta: step of the multiplier.
        epsilon: how much the mean output may change.
        constrained: ``False``: lam stays as it is.
        clamp_lambda: keep lam at least 0.

    Raises:
        ValueError: manual optimisation, no network of that name, gradients of several batches added up.

    Example:
        >>> from proto_core.training import GradientNormCallback
        >>> callback = GradientNormCallback(module="net", lam=0.1)
    """

    def __init__(
        self,
        module: str,
        *,
        rho: float = 0.05,
        r: float = 0.05,
        lam: float = 1e-3,
        eta: float = 1e-3,
        epsilon: float = 0.1,
        constrained: bool = True,
        clamp_lambda: bool = True,
    ) -> None:
        super().__init__(module)
        self.options = {"rho": rho, "r": r, "lam": lam, "eta": eta, "epsilon": epsilon}
        self.options |= {"constrained": constrained, "clamp_lambda": clamp_lambda}
        self.regularizer: GradientNormRegularizer | None = None
        self._kept: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take hold of the network."""
        _check_one_batch_a_step(self, trainer)
        self.regularizer = GradientNormRegularizer(self.network(pl_module), **self.options)  # type: ignore[arg-type]
        if self._kept:
            self.regularizer.load_state_dict(self._kept)
        super().on_fit_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Add to the gradients, before they are clipped."""
        assert self.regularizer is not None
        network, (inputs, _) = self.network(pl_module), self.seen()
        self._watching = False
        try:
            with trainer.precision_plugin.forward_context():
                self.regularizer.apply(lambda: logits_of(network(*inputs)).float().mean())
        finally:
            self._watching = True

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return {} if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over when training begins."""
        self._kept = state_dict


class SAMCallback(L.Callback):
    """Sharpness-aware minimisation in any system: the step's gradient is that of the worst point nearby.

    See :class:`proto_core.optim.SAM`. Each step runs the training step twice; the second neither logs nor moves
    buffers.

    Args:
        rho: radius.
        adaptive: scale-invariant radius.

    Raises:
        ValueError: a negative rho, manual optimisation, gradients of several batches added up.

    Example:
        >>> from proto_core.training import SAMCallback
        >>> callback = SAMCallback(rho=0.05)
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False) -> None:
        if not rho >= 0:
            raise ValueError(f"rho: found {rho}, needed at least 0")
        self.rho = rho
        self.adaptive = adaptive
        self._batch: tuple[Any, int] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is one step a batch."""
        _check_automatic(self, pl_module)
        _check_one_batch_a_step(self, trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for the second pass."""
        self._batch = batch, batch_idx

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Replace the gradients by those of the worst point."""
        assert self._batch is not None
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moving:
            return
        kept = ascend([(p, p.grad, self.rho, self.adaptive) for p in moving])
        optimizer.zero_grad()
        try:
            with silent(pl_module), buffers_at_rest(pl_module):
                found = trainer.strategy.training_step(*self._batch)
                loss: Any = found["loss"] if isinstance(found, dict) else found
                loss.backward()
        finally:
            restore(kept)


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a network returns.

    Raises:
        ValueError: nothing in it is a tensor.
    """
    for _ in range(4):
        if isinstance(output, Tensor):
            return output
        output = getattr(output, "logits", None) if hasattr(output, "logits") else next(iter(output), None)
    raise ValueError("output of the network: found no tensor, needed one, one first, or an attribute `logits`")


def _add(trainer: L.Trainer, loss: Tensor, term: Tensor) -> None:
    """Add to the loss in place: what goes backward is this very tensor."""
    loss.add_(term.to(loss) / trainer.accumulate_grad_batches)


def _check_automatic(callback: L.Callback, pl_module: L.LightningModule) -> None:
    if not pl_module.automatic_optimization:
        name = type(pl_module).__name__
        raise ValueError(f"{type(callback).__name__}: found manual optimisation in {name}, needed automatic")


def _check_one_batch_a_step(callback: L.Callback, trainer: L.Trainer) -> None:
    if trainer.accumulate_grad_batches != 1:
        found = trainer.accumulate_grad_batches
        raise ValueError(f"{type(callback).__name__}: found accumulate_grad_batches={found}, needed 1")


@contextmanager
def silent(pl_module: L.LightningModule) -> Iterator[None]:
    """Without logging."""
    pl_module.log = pl_module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del pl_module.log, pl_module.log_dict
