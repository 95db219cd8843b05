"""A staged curriculum as one Lightning callback: several stages in one ``trainer.fit``, resumable at any epoch.

At the end of a stage the best weights of the stage come back, prototypes are projected if the stage says so, the
next stage's parameters are unfrozen, and fresh optimisers (and, under DDP, a fresh wrapper) are made. Everything that
decides where training stands is in ``last.ckpt``, which is written whole after each epoch.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader, Dataset, Subset

from proto_core.files import writable_folder
from proto_core.prototypes.projection import project_prototypes
from proto_core.training.checkpoints import WholeFileCheckpointIO, read_checkpoint
from proto_core.training.stages import HasStages, Stage, enter_stage

__all__ = ["Curriculum", "ProjectionCallback", "project_with_trainer"]

log = logging.getLogger(__name__)

_PLATEAU_PATIENCE = 5


def project_with_trainer(trainer: Trainer, module: LightningModule, *, overwrite: bool = True) -> None:
    """Project the module's prototypes onto the training set of the trainer's data module.

    The data module offers ``projection_dataset()`` (the training set, un-augmented, with a ``collate`` of its own or
    none) and ``describe(index) -> (sample id, label names)``. Each rank passes every world-size-th batch; nothing is
    repeated.

    Raises:
        ValueError: the trainer has no data module that offers this.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None or not hasattr(data, "projection_dataset"):
        raise ValueError("projection needs a data module with projection_dataset() and describe(index)")
    dataset: Dataset[Any] = data.projection_dataset()
    size = getattr(data, "batch_size", 32)
    rank, world = trainer.global_rank, trainer.world_size
    count = len(dataset)  # type: ignore[arg-type]
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)][rank::world]
    shard = Subset(dataset, [index for batch in batches for index in batch])
    workers = getattr(data, "num_workers", 0)
    loader = DataLoader(shard, batch_size=size, num_workers=workers, collate_fn=getattr(dataset, "collate", None))

    def on_device() -> Iterator[Any]:
        for batch in loader:
            yield trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch, module.device))

    with trainer.precision_plugin.forward_context():
        project_prototypes(module, on_device(), data.describe, overwrite=overwrite)


class ProjectionCallback(Callback):
    """Project prototypes every few epochs, for training without a curriculum.

    Args:
        every_n_epochs: project after each n-th epoch.

    Raises:
        ValueError: fewer than 1 epoch.
    """

    def __init__(self, every_n_epochs: int = 10) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: found {every_n_epochs}, needed at least 1")
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project when the epoch is due."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            project_with_trainer(trainer, pl_module)


class Curriculum(Callback):
    """Runs the stages of a module one after the other in one ``trainer.fit``.

    The module offers ``stages: list[Stage]`` and ``stage``; with any other module nothing happens. Checkpoints are
    written to ``dirpath``: ``last.ckpt`` after each epoch, ``<stage>.ckpt`` (best epoch of the stage by its
    ``monitor``), ``final.ckpt`` at the end. Pass ``last.ckpt`` as ``ckpt_path`` to go on after a kill at the stage and
    epoch where it was.

    Args:
        only: names of stages, or first words of them (``rhythm`` for ``rhythm.joint`` and so on); ``None`` runs all.
        weights: a checkpoint whose weights are loaded first, to run a later stage alone.
        dirpath: folder of the checkpoints; by default ``checkpoints`` in the trainer's root folder.

    Raises:
        ValueError: unknown stage, a strategy other than one device or DDP, an unwritable folder (found before
            training), a checkpoint of another curriculum.
    """

    def __init__(
        self, only: Sequence[str] | None = None, weights: str | None = None, dirpath: str | None = None
    ) -> None:
        self.only = list(only) if only else None
        self.weights = weights
        self.dirpath = dirpath
        self.folder = Path(dirpath) if dirpath else Path()
        self.stages: list[Stage] = []
        self.position = 0
        self.epoch = 0
        self.best: float | None = None
        self.since_best = 0
        self.halvings = 0
        self.finished = False
        self.history: list[dict[str, Any]] = []
        self._module: LightningModule | None = None

    @property
    def stage(self) -> Stage:
        """The stage that is running."""
        return self.stages[self.position]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the stages, check the output folder and enter the first stage."""
        if stage != "fit" or not isinstance(pl_module, HasStages):
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"strategy: found {type(trainer.strategy).__name__}; a staged curriculum runs on one device or with DDP"
            )
        known = list(pl_module.stages)
        self.stages = [item for item in known if item.max_epochs > 0 and self._selected(item.name)]
        for pattern in self.only or []:
            if not any(_matches(item.name, pattern) for item in known):
                raise ValueError(f"stages: found {pattern!r}, needed one of {[item.name for item in known]}")
        if not self.stages:
            raise ValueError(f"stages: nothing to run among {[item.name for item in known]}")
        self.folder = Path(self.dirpath) if self.dirpath else Path(trainer.default_root_dir) / "checkpoints"
        writable_folder(self.folder, "checkpoint folder")
        trainer.strategy.checkpoint_io = WholeFileCheckpointIO()
        if trainer.max_epochs in (None, -1, 1000):
            trainer.fit_loop.max_epochs = sum(item.max_epochs for item in self.stages)
        if self.weights:
            _load_weights(pl_module, self.weights)
        self._module = pl_module
        enter_stage(pl_module, self.stage)

    def _selected(self, name: str) -> bool:
        return self.only is None or any(_matches(name, pattern) for pattern in self.only)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where training starts or goes on; stop at once if the checkpoint was the last of its run."""
        if not self.stages:
            return
        trainer.should_stop = self.finished
        log.info("stage %s (%d of %d), epoch %d", self.stage.name, self.position + 1, len(self.stages), self.epoch + 1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set this epoch's learning rate."""
        if not self.stages:
            return
        rate, warmup = self.stage.lr, self.stage.warmup_epochs
        if self.epoch < warmup:
            rate *= (self.epoch + 1) / warmup
        elif self.stage.scheduler == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * (self.epoch - warmup) / (self.stage.max_epochs - warmup)))
            rate *= self.stage.floor + (1 - self.stage.floor) * share
        elif self.stage.scheduler == "plateau":
            rate *= 0.5**self.halvings
        elif self.stage.scheduler == "steps":
            rate *= self.stage.gamma ** sum(self.epoch >= milestone for milestone in self.stage.milestones)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's figure, keep the best, end the stage when it is over, write ``last.ckpt``."""
        if not self.stages:
            return
        value = math.nan if self.stage.monitor is None else self._monitored(trainer, self.stage.monitor)
        self.epoch += 1
        improved = not math.isnan(value) and (
            self.best is None or (value > self.best if self.stage.mode == "max" else value < self.best)
        )
        self.history.append({"stage": self.stage.name, "epoch": self.epoch, self.stage.monitor or "none": value})
        if improved or self.epoch == 1 or self.stage.monitor is None:
            self.best = None if math.isnan(value) else value
            self.since_best = 0
            trainer.save_checkpoint(self.folder / f"{self.stage.name}.ckpt", weights_only=False)
        else:
            self.since_best += 1
            if self.since_best % (_PLATEAU_PATIENCE + 1) == 0:
                self.halvings += 1
        patience = self.stage.patience
        if self.epoch >= self.stage.max_epochs or (patience is not None and self.since_best >= patience):
            self._end_stage(trainer, pl_module)
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)

    def _monitored(self, trainer: Trainer, name: str) -> float:
        metric = trainer.callback_metrics.get(name)
        if metric is None:
            raise ValueError(
                f"stage {self.stage.name!r}: the model logs no {name!r} (a data set without a validation part?), found "
                f"{sorted(trainer.callback_metrics)}"
            )
        return float(metric)

    def _end_stage(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ended = self.stage
        trainer.strategy.barrier("best weights are on disk")
        best = read_checkpoint(self.folder / f"{ended.name}.ckpt")
        pl_module.load_state_dict(best["state_dict"])
        found = "never defined" if self.best is None else f"{self.best:.4f}"
        kept = "the last is kept" if ended.monitor is None else f"best {ended.monitor}: {found}"
        log.info("stage %s ended, epochs: %d, %s", ended.name, self.epoch, kept)
        if ended.project:
            project_with_trainer(trainer, pl_module, overwrite=ended.overwrite)
            trainer.save_checkpoint(self.folder / f"{ended.name}.ckpt", weights_only=False)
        if self.position + 1 == len(self.stages):
            self.finished = trainer.should_stop = True
            trainer.save_checkpoint(self.folder / "final.ckpt", weights_only=False)
            return
        self.position += 1
        self.epoch, self.best, self.since_best, self.halvings = 0, None, 0, 0
        enter_stage(pl_module, self.stage)
        _fresh_optimizers(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands."""
        return {
            "stages": [item.name for item in self.stages],
            "position": self.position,
            "epoch": self.epoch,
            "best": self.best,
            "since_best": self.since_best,
            "halvings": self.halvings,
            "finished": self.finished,
            "history": self.history,
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood; outside ``fit`` there is nothing to go on with."""
        if not self.stages:
            return
        names = [item.name for item in self.stages]
        if state_dict["stages"] != names:
            raise ValueError(f"checkpoint: holds the stages {state_dict['stages']}, this run has {names}")
        self.position, self.epoch = state_dict["position"], state_dict["epoch"]
        self.best, self.since_best = state_dict["best"], state_dict["since_best"]
        self.finished = state_dict["finished"]
        self.halvings, self.history = state_dict["halvings"], list(state_dict["history"])
        if self._module is not None:
            enter_stage(self._module, self.stage)
        _restore_random(state_dict.get("random", ()))


def _restore_random(states: Sequence[torch.Tensor]) -> None:
    """Go on with the random numbers (order of records, dropout) where the checkpoint stood: CPU, then each GPU."""
    if not states:
        return
    torch.set_rng_state(states[0].cpu())
    for device, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)


def _matches(name: str, pattern: str) -> bool:
    return (
        name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1])) or name.startswith(pattern + ".")
    )


def _load_weights(module: LightningModule, path: str) -> None:
    """Weights of a checkpoint that the module agrees to."""
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path!r}: the weights do not fit this model ({reason})") from error


def _fresh_optimizers(trainer: Trainer, module: LightningModule) -> None:
    """New optimisers for the parameters that train now; under DDP a new wrapper, whose hooks know them."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = module
        gc.collect()
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)
