"""What the demos of all domains do alike: a quiet trainer that runs a curriculum and names its stages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from proto_core.cli.training import KeepSettings
from proto_core.training import Curriculum

__all__ = ["quiet_lightning", "staged_trainer"]


class _Progress(TQDMProgressBar):
    """Lightning's bar with the stage's name in front."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Curriculum) and callback.stages:
                stage = callback.stage
                self.train_progress_bar.set_description(f"{stage.name} {callback.epoch + 1}/{stage.max_epochs}")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Only warnings that are not Lightning's own, and its errors."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
            yield
    finally:
        logger.setLevel(level)


def staged_trainer(out: Path, name: str, settings: str) -> pl.Trainer:
    """A trainer for one device that runs a curriculum and shows its progress.

    Args:
        out: its root folder.
        name: folder in it, for the checkpoints.
        settings: YAML that is kept in them, see :class:`~proto_core.cli.training.KeepSettings`.
    """
    return pl.Trainer(
        default_root_dir=out,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[Curriculum(dirpath=str(out / name)), KeepSettings(settings), _Progress(leave=False)],
    )
