"""Stages of a curriculum: what trains, for how long, and what happens at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol, runtime_checkable

from torch import nn

__all__ = ["HasStages", "Stage", "enter_stage"]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: unique in its curriculum; also names the stage's best checkpoint.
        train: patterns (``*`` matches anything) of the parameter names that train; all others are frozen.
        max_epochs: at most so many passes over the training set; 0 leaves the stage out.
        lr: learning rate.
        weight_decay: L2 penalty of the optimiser.
        scheduler: "none", "cosine" (from lr to ``floor`` lr over ``max_epochs``), "plateau" (halved after 5 epochs
            without a better value of ``monitor``) or "steps" (times ``gamma`` at each of ``milestones``).
        warmup_epochs: the rate rises to ``lr`` in equal steps over so many first epochs; "cosine" falls after them.
        milestones: epochs of the stage, counted from 1 at its end, after which the rate falls ("steps").
        gamma: factor at a milestone.
        floor: share of ``lr`` that "cosine" ends at.
        monitor: logged metric that decides on the best epoch and on stopping; ``None``: the last epoch is kept.
        mode: whether more ("max") or less ("min") of it is better.
        patience: stop after so many epochs without a better value; ``None`` never stops early.
        project: whether prototypes are projected onto training cases when the stage ends.
        overwrite: whether projected prototypes become their cases, or keep their vectors and only remember them.

    Raises:
        ValueError: a name that is no file name, a negative number of epochs, a longer warm-up than the stage, or a
            learning rate of 0 or less.
    """

    name: str
    train: Sequence[str] = ("*",)
    max_epochs: int = 10
    lr: float = 1e-3
    weight_decay: float = 0.0
    scheduler: Literal["none", "cosine", "plateau", "steps"] = "none"
    warmup_epochs: int = 0
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    floor: float = 0.0
    monitor: str | None = "val/auroc"
    mode: Literal["max", "min"] = "max"
    patience: int | None = 10
    project: bool = False
    overwrite: bool = True

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\ \0") or self.name.startswith(".") or self.name == "last":
            raise ValueError(f"stage name: found {self.name!r}, needed a plain word that can name a file (not 'last')")
        if self.max_epochs < 0 or self.lr <= 0:
            raise ValueError(
                f"stage {self.name!r}: needed max_epochs >= 0 and lr > 0, found {self.max_epochs} and {self.lr}"
            )
        if not 0 <= self.warmup_epochs <= self.max_epochs:
            needed = f"0 to {self.max_epochs}, the stage's epochs"
            raise ValueError(f"stage {self.name!r}: found {self.warmup_epochs} warmup_epochs, needed {needed}")


@runtime_checkable
class HasStages(Protocol):
    """A module that knows its curriculum."""

    stages: list[Stage]
    stage: Stage | None


def enter_stage(module: nn.Module, stage: Stage) -> None:
    """Freeze and unfreeze parameters for a stage and tell the module which stage it is in.

    Sets ``module.stage``; the module's own ``train()`` and ``training_step`` look at it.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in stage.train:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"stage {stage.name!r}: pattern {pattern!r} matches no parameter of the model")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in stage.train))
        parameter.grad = None
    module.stage = stage  # type: ignore[assignment]
    module.train(module.training)
