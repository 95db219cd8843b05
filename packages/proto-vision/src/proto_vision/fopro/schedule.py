"""How long and how fast FoPro trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from proto_core.checks import check_option

__all__ = ["FoProSchedule"]


@dataclass(frozen=True)
class FoProSchedule:
    """Epochs of each stage, and one rate over pretraining and cleaning; defaults are the authors' for WebFG496.

    The rate rises from 0, step by step, and falls as half a cosine that ends beyond the last epoch.

    Args:
        frozen_epochs: first epochs, in which the encoder rests (0 leaves them out).
        pretrain_epochs: before labels are cleaned, the frozen ones among them.
        init_epoch: epoch, counted from 0, at whose start prototypes are made; they are used from the next one on.
        relation_epochs: of the relation module alone (0 leaves them out).
        epochs: of pretraining and cleaning together.
        optimizer: ``"adam"`` or ``"sgd"``.
        lr: highest rate.
        relation_lr: of the relation module alone.
        warmup_epochs: over which the rate rises.
        momentum: of SGD, or first decay of Adam.
        late_momentum: the same from epoch ``late_epoch`` on; ``None``: no change.
        late_epoch: counted over pretraining and cleaning.
        weight_decay: of everything.
        keep: ``"best"`` keeps the epoch of a stage with the best validation accuracy, ``"last"`` its last epoch.

    Raises:
        ValueError: stages that do not lie within each other, an unknown optimiser.

    Source:
        arXiv 2212.00465, appendix (implementation details), and the authors' scripts.

    Example:
        >>> from proto_vision.fopro import FoProSchedule
        >>> schedule = FoProSchedule(epochs=40, lr=1.0, warmup_epochs=4)
        >>> [round(schedule.rate(epoch), 3) for epoch in (0, 2, 4, 23.5, 40)]
        [0.0, 0.5, 0.999, 0.5, 0.023]
    """

    frozen_epochs: int = 5
    pretrain_epochs: int = 27
    init_epoch: int = 20
    relation_epochs: int = 20
    epochs: int = 200
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    relation_lr: float = 1e-4
    warmup_epochs: int = 5
    momentum: float = 0.9
    late_momentum: float | None = None
    late_epoch: int = 40
    weight_decay: float = 1e-8
    keep: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        check_option("optimizer", self.optimizer, "adam", "sgd")
        if not 0 <= self.frozen_epochs <= self.pretrain_epochs <= self.epochs or self.epochs < 1:
            found = f"{self.frozen_epochs}, {self.pretrain_epochs}, {self.epochs}"
            raise ValueError(f"frozen_epochs, pretrain_epochs, epochs: found {found}, needed each within the next")
        if not 0 <= self.init_epoch < max(self.pretrain_epochs, 1) or self.relation_epochs < 0:
            raise ValueError(
                f"init_epoch: found {self.init_epoch}, needed one of the {self.pretrain_epochs} epochs of pretraining"
            )
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs: found {self.warmup_epochs}, needed 0 or more")

    def rate(self, epoch: float) -> float:
        """The rate when ``epoch`` epochs of pretraining and cleaning are over, parts of one counting."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        over = (epoch - max(self.warmup_epochs - 1, 0)) / (self.epochs + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * over))

    def first_decay(self, epoch: int) -> float:
        """Momentum in an epoch of pretraining and cleaning, counted from 0."""
        late = self.late_momentum is not None and epoch >= self.late_epoch
        return float(self.late_momentum if late else self.momentum)  # type: ignore[arg-type]
