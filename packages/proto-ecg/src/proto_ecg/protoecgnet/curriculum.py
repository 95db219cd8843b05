"""The stages of ProtoECGNet: per branch (pre-training), joint training with projection, classifier; then fusion.

Source: ProtoECGNet (arXiv 2504.08713) and its authors' training script, whose six hand-started stages these are.
Difference from the authors' code: the joint stage trains backbone, add-on and prototypes together (their stage of that
name passes only the prototypes to the optimiser), and projection always ends it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from proto_core.training import Stage

__all__ = ["Schedule", "protoecgnet_stages"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast ProtoECGNet trains; defaults are the authors'.

    Args:
        pretrain_epochs: backbone of a branch with a linear head, before its prototypes (0 leaves it out).
        joint_epochs: backbone, add-on and prototypes of a branch, at most.
        classifier_epochs: classifier of a branch, at most (0 leaves it out).
        fusion_epochs: classifier over all branches, at most.
        rounds: how often joint training and projection take turns.
        lr: learning rate of pre-training and joint training.
        classifier_lr: learning rate of classifiers.
        weight_decay: of Adam.
        scheduler: "none", "cosine" or "plateau".
        patience: epochs without a better validation macro-AUROC before a stage ends.
        l1: weight of the classifiers' L1 penalty.
    """

    pretrain_epochs: int = 0
    joint_epochs: int = 200
    classifier_epochs: int = 50
    fusion_epochs: int = 50
    rounds: int = 1
    lr: float = 1e-4
    classifier_lr: float = 1e-3
    weight_decay: float = 1.7e-4
    scheduler: Literal["none", "cosine", "plateau"] = "cosine"
    patience: int | None = 10
    l1: float = 1e-4


def protoecgnet_stages(
    branches: Sequence[str], schedule: Schedule, without_add_on: Collection[str] = ()
) -> list[Stage]:
    """Stages ``<branch>.pretrain``, ``<branch>.joint`` (``.joint2`` ...), ``<branch>.classifier`` and ``fusion``.

    Args:
        branches: names of the branches that there are, in order.
        schedule: epochs and rates; stages with 0 epochs are in the list and left out of the run.
        without_add_on: the branches whose features are the backbone's own.

    Raises:
        ValueError: fewer than one round.
    """
    if schedule.rounds < 1:
        raise ValueError(f"rounds: found {schedule.rounds}, needed at least 1")

    def stage(name: str, train: Sequence[str], epochs: int, lr: float, *, project: bool = False) -> Stage:
        return Stage(
            name=name,
            train=tuple(train),
            max_epochs=epochs,
            lr=lr,
            weight_decay=schedule.weight_decay,
            scheduler=schedule.scheduler,
            patience=schedule.patience,
            project=project,
        )

    stages = []
    for branch in branches:
        if schedule.pretrain_epochs:
            train = [f"{branch}.backbone.*", f"pretrain_heads.{branch}.*"]
            stages.append(stage(f"{branch}.pretrain", train, schedule.pretrain_epochs, schedule.lr))
        for turn in range(1, schedule.rounds + 1):
            name = f"{branch}.joint{turn if turn > 1 else ''}"
            train = [f"{branch}.backbone.*", f"{branch}.layer.prototypes"]
            train += [] if branch in without_add_on else [f"{branch}.add_on.*"]
            stages.append(stage(name, train, schedule.joint_epochs, schedule.lr, project=True))
        train = [f"{branch}.classifier.*"]
        stages.append(stage(f"{branch}.classifier", train, schedule.classifier_epochs, schedule.classifier_lr))
    return [*stages, stage("fusion", ["classifier.*"], schedule.fusion_epochs, schedule.classifier_lr)]
