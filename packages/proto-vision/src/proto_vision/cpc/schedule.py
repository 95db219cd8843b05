"""How long and how fast CPC trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["CPCSchedule"]


@dataclass(frozen=True)
class CPCSchedule:
    """How long and how fast CPC trains, by SGD; defaults are DivideMix's for CIFAR-10.

    Args:
        warmup_epochs: with all labels as given (30 for CIFAR-100).
        epochs: of all, the warm-up among them.
        lr: of everything.
        momentum: of SGD.
        weight_decay: of everything.
        milestones: epochs, counted from the first of the warm-up, after which the rate falls.
        gamma: factor at a milestone.
        cleaner_epochs: passes over all features, at the end of the warm-up, that the cleaners begin with.
        cleaner_lr: of Adam in these passes.
        keep: ``"best"`` keeps the epoch of a stage with the best validation accuracy, ``"last"`` its last epoch.

    Raises:
        ValueError: a longer warm-up than training.
    """

    warmup_epochs: int = 10
    epochs: int = 300
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: Sequence[int] = (150,)
    gamma: float = 0.1
    cleaner_epochs: int = 5
    cleaner_lr: float = 1e-2
    keep: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs <= self.epochs or self.epochs < 1:
            found = f"{self.warmup_epochs} and {self.epochs}"
            raise ValueError(f"warmup_epochs, epochs: found {found}, needed a warm-up within training")
