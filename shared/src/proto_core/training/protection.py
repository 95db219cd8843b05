"""Weights that keep what they have learned, as a Lightning callback: null-space projection in any system."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from proto_core.optim.null_space import NullSpaceProjection
from proto_core.training.landscape import silent

__all__ = ["NullSpaceCallback"]


class NullSpaceCallback(L.Callback):
    """Protect what a finished fit has learned: later fits move weights only in the null space of its inputs.

    At the end of each fit the inputs of the chosen layers are collected over the training set and the projectors
    follow; in later fits with the same callback (or one that has loaded its state) every step is projected, whatever
    the optimiser. See :class:`proto_core.optim.NullSpaceProjection`; inputs are averaged over each batch, so that small
    batches protect more. Freeze biases and norms where they should stay too.

    Args:
        modules: patterns (``*`` matches anything) of the names of linear layers and convolutions.
        offset: see :func:`proto_core.optim.null_space_mask`.
        normalize: divide projectors by their Frobenius norm.

    Raises:
        ValueError: no layer has such a name.

    Example:
        >>> from proto_core.training import NullSpaceCallback
        >>> callback = NullSpaceCallback(modules=["backbone.*"])
    """

    def __init__(self, modules: Sequence[str] = ("*",), *, offset: float = 0.0, normalize: bool = False) -> None:
        self.modules = list(modules)
        self.projection = NullSpaceProjection(offset, normalize)
        self._before: dict[str, Tensor] = {}
        self._step = -1

    def layers(self, pl_module: nn.Module) -> list[str]:
        """Names of the layers that are protected."""
        names = [
            name
            for name, layer in pl_module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and any(fnmatchcase(name, pattern) for pattern in self.modules)
        ]
        if not names:
            raise ValueError(f"modules: found no linear layer or convolution that matches {self.modules}")
        return names

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the names before hours of training."""
        self.layers(pl_module)
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the weights."""
        known = dict(pl_module.named_parameters())
        self._before = {name: known[name].detach().clone() for name in self.projection.projectors if name in known}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Project what the step has changed."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        known = dict(pl_module.named_parameters())
        for name, old in self._before.items():
            known[name].copy_(old + self.projection.project(name, known[name] - old))

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect the inputs of this fit's training set."""
        training = pl_module.training
        pl_module.eval()
        fresh = NullSpaceProjection(self.projection.offset, self.projection.normalize)
        try:
            with silent(pl_module), fresh.collect(pl_module, self.layers(pl_module)):
                for number, batch in enumerate(trainer.train_dataloader or []):
                    moved = trainer.strategy.batch_to_device(batch)
                    with trainer.precision_plugin.forward_context():
                        pl_module.training_step(moved, number)
        finally:
            pl_module.train(training)
        for name, cov in fresh.covariances.items():
            cov = trainer.strategy.reduce(cov, reduce_op="sum")
            known = self.projection.covariances
            known[name] = known[name] + cov if name in known else cov
        self.projection.fit()

    def state_dict(self) -> dict[str, Any]:
        """Covariances and projectors."""
        return self.projection.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.projection.load_state_dict(state_dict)
