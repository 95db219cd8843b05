"""ST-ProtoPNet as a system that trains: warm-up, joint training, projection, heads.

Source: "Learning Support and Trivial Prototypes for Interpretable Image Classification", ICCV 2023, arXiv 2301.04011.
Differences from the authors' code: the best epoch is chosen on a validation fold or the last one is kept, never by the
test set; a round of joint training always ends with the projection, and the heads follow; while only heads train, the
backbone stays in evaluation mode, as in the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import (
    ClosenessLoss,
    ClusterLoss,
    DiscriminationLoss,
    IncorrectConnectionL1Loss,
    SeparationLoss,
    SubspaceOrthogonalityLoss,
)
from proto_core.metrics import FoldAccuracy
from proto_core.precision import full_precision
from proto_core.prototypes import PrototypeLayer
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbones import create_backbone
from proto_vision.classification import ImageClassifier, adam_by_part
from proto_vision.data.dataset import ImageBatch
from proto_vision.explanation import ExplainsParts, PartEvidence
from proto_vision.st_protopnet.network import BRANCHES, BranchOutput, STProtoPNet, STProtoPNetOutput

__all__ = ["STLossWeights", "STProtoPNetModule", "STSchedule"]


@dataclass(frozen=True)
class STLossWeights:
    """Weights of the branch losses; defaults are the authors'.

    Args:
        cluster: pull towards a prototype of the own class.
        separation_trivial: push away from other classes' prototypes, trivial branch.
        separation_support: likewise, support branch.
        orthogonality: of the prototypes of a class.
        discrimination: trivial prototypes of two classes far apart.
        closeness: support prototypes of two classes close.
        l1: heads' weights towards other classes.
        masking: ``"exclude"`` or ``"multiply"`` (as the authors' code), see :class:`proto_core.losses.ClusterLoss`.
    """

    cluster: float = 0.8
    separation_trivial: float = 0.08
    separation_support: float = 0.48
    orthogonality: float = 1e-3
    discrimination: float = 1.0
    closeness: float = 1.0
    l1: float = 1e-4
    masking: str = "exclude"


@dataclass(frozen=True)
class STSchedule:
    """How long and how fast ST-ProtoPNet trains; defaults are the authors' for cropped birds.

    Args:
        warmup_epochs: add-ons and prototypes alone (0 leaves it out).
        joint_epochs: backbone, add-ons and prototypes; ends with the projection.
        head_epochs: heads alone (0 leaves it out).
        rounds: how often joint training and heads take turns; the rates go on falling where the last round left them.
        lr: of add-ons and prototypes.
        backbone_lr: of the backbone.
        head_lr: of the heads.
        weight_decay: of backbone and add-ons.
        milestones: joint epochs, counted over all rounds, after which the rates fall.
        gamma: factor at a milestone.
        keep: ``"best"`` keeps the epoch of a stage with the best validation accuracy, ``"last"`` its last epoch.
    """

    warmup_epochs: int = 5
    joint_epochs: int = 25
    head_epochs: int = 10
    rounds: int = 1
    lr: float = 3e-3
    backbone_lr: float = 1e-4
    head_lr: float = 1e-4
    weight_decay: float = 5e-4
    milestones: Sequence[int] = (7, 9, 11, 13)
    gamma: float = 0.2
    keep: Literal["best", "last"] = "best"


class STProtoPNetModule(ExplainsParts, ImageClassifier):
    """Image classifier whose logits are sums over parts of training images, trivial ones and those near the border.

    Batches take turns: the even ones train the trivial branch, the odd ones the support branch, each with its own
    loss; after every step all prototypes are brought back to unit length.

    Args:
        backbone: name, see :func:`proto_vision.backbones.create_backbone`.
        num_classes: C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        backbone_stage: which of the backbone's maps; -2 leaves out a VGG's last pooling.
        prototypes_per_class: in each branch.
        prototype_channels: D.
        variant: ``"projection"`` or ``"cosine"``, see :class:`STProtoPNet`.
        upsample: cosine variant, maps of twice the size.
        incorrect_strength: the heads' first weight towards other classes.
        loss: weights of the losses.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`STProtoPNetOutput`.

    Raises:
        ValueError: fewer than two classes or one round, an unknown backbone or variant.

    Source:
        arXiv 2301.04011, sections 3 and 4.

    Example:
        >>> import torch
        >>> from proto_vision import STProtoPNetModule
        >>> net = STProtoPNetModule("conv2", 10, image_size=16, in_channels=1, prototypes_per_class=2)
        >>> net(torch.rand(4, 1, 16, 16)).logits.shape
        torch.Size([4, 10])
    """

    system: ClassVar[str] = "st_protopnet"
    paper: ClassVar[Paper] = Paper(
        title="Learning Support and Trivial Prototypes for Interpretable Image Classification",
        year=2023,
        arxiv="2301.04011",
        code="cwangrun/ST-ProtoPNet@935aaa1",
        evidence="code",
        summary="Image classes explained by parts of training images: typical ones and those near the class border.",
        claim="Trivial and support prototypes complement each other: their sum is more accurate than either set, and "
        "support prototypes lie nearer to other classes.",
    )

    def __init__(
        self,
        backbone: str = "resnet34",
        num_classes: int = 200,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 224,
        in_channels: int = 3,
        pretrained: bool = False,
        backbone_stage: int = -1,
        prototypes_per_class: int = 5,
        prototype_channels: int = 64,
        variant: str = "projection",
        upsample: bool = False,
        incorrect_strength: float = -0.5,
        loss: STLossWeights = STLossWeights(),
        schedule: STSchedule = STSchedule(),
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        if self.num_classes < 2:
            raise ValueError(f"num_classes: found {self.num_classes}, needed 2 at least: prototypes compare classes")
        self.automatic_optimization = False
        self.backbone_name, self.backbone_stage = backbone, backbone_stage
        network, channels = create_backbone(
            backbone, in_channels=in_channels, pretrained=pretrained, stage=backbone_stage, image_size=image_size
        )
        self.network = STProtoPNet(
            network,
            channels[-1],
            self.num_classes,
            prototypes_per_class=prototypes_per_class,
            prototype_channels=prototype_channels,
            variant=variant,
            upsample=upsample,
            incorrect_strength=incorrect_strength,
        )
        self.weights, self.schedule = loss, schedule
        self.cluster, self.separation = ClusterLoss(loss.masking), SeparationLoss(loss.masking)
        self.orthogonality, self.sparsity = SubspaceOrthogonalityLoss("l1"), IncorrectConnectionL1Loss()
        self.discrimination, self.closeness = DiscriminationLoss(), ClosenessLoss()
        self.branch_folds = torch.nn.ModuleDict({name: FoldAccuracy() for name in BRANCHES})
        self.stages = st_protopnet_stages(schedule)
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        net = self.network
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "backbone_stage": self.backbone_stage,
            "prototypes_per_class": net.prototypes_per_class,
            "prototype_channels": net.prototypes_trivial.prototypes.shape[1],
            "variant": net.variant,
            "upsample": net.upsample,
            "incorrect_strength": net.incorrect_strength,
            "loss": asdict(self.weights),
            "schedule": asdict(self.schedule) | {"milestones": list(self.schedule.milestones)},
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> STProtoPNetModule:
        """Build an untrained network from :meth:`settings`."""
        loss, schedule = STLossWeights(**settings["loss"]), STSchedule(**settings["schedule"])
        return cls(**settings | {"loss": loss, "schedule": schedule})

    def forward(self, images: Float[Tensor, "N channels S S"]) -> STProtoPNetOutput:
        """Both branches and the sum of their logits."""
        return self.network(images)

    def train(self, mode: bool = True) -> STProtoPNetModule:
        """Training mode; a backbone under trained heads stays in evaluation mode."""
        super().train(mode)
        stage = getattr(self, "stage", None)
        if stage is not None and stage.name.startswith("heads"):
            self.network.backbone.eval()
        return self

    # -- training

    def branch_loss(self, name: str, out: BranchOutput, targets: Tensor) -> Tensor:
        """The loss of one branch on a batch (arXiv 2301.04011, equations of sections 3.2 and 3.3)."""
        net, weights = self.network, self.weights
        layer = net.layer(name)
        trivial = name == "trivial"
        separation = weights.separation_trivial if trivial else weights.separation_support
        between, strength = (
            (self.discrimination, weights.discrimination) if trivial else (self.closeness, weights.closeness)
        )
        return (
            F.cross_entropy(full_precision(out.logits), targets)
            + weights.cluster * self.cluster(out.cosines, targets, layer.class_identity)
            + separation * self.separation(out.cosines, targets, layer.class_identity)
            + weights.orthogonality * self.orthogonality(layer.prototypes, self.num_classes)
            + strength * between(layer.prototypes, self.num_classes)
            + weights.l1 * self.sparsity(net.head(name).weight, layer.class_identity)
        )

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One step of the branch whose turn it is."""
        name = BRANCHES[batch_idx % 2]
        out = self.network.branch(name, self.network.backbone(batch.image))
        loss = self.branch_loss(name, out, batch.target)
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        resting = [p for p in self._of_branch(BRANCHES[1 - batch_idx % 2]) if p.requires_grad]
        optimizer = cast(Any, self.optimizers())
        optimizer.zero_grad()
        # the other branch takes part with nothing, since DDP waits for every parameter; it then gets no gradient, so
        # that Adam leaves it alone
        self.manual_backward(loss + torch.stack([p.sum() for p in resting]).sum() * 0)
        for parameter in resting:
            parameter.grad = None
        optimizer.step()
        self.network.normalize_prototypes()
        return loss.detach()

    def _of_branch(self, name: str) -> list[torch.nn.Parameter]:
        return [p for key, p in self.network.named_parameters() if key.split(".")[0].endswith(f"_{name}")]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over what the stage trains: backbone at its own rate, no weight decay on prototypes and heads."""
        stage = self.stage or self.stages[-1]
        schedule = self.schedule
        parts = {
            "backbone": (schedule.backbone_lr, schedule.weight_decay),
            "addon": (stage.lr, schedule.weight_decay),
            "prototypes": (stage.lr, 0.0),
            "head": (stage.lr, 0.0),
        }
        return adam_by_part(self.network, stage, parts)

    # -- evaluation

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the scores of the test fold, of the sum and of each branch."""
        out = self(batch.image)
        folds = [self.test_fold, *self.branch_folds.values()]
        for fold, logits in zip(folds, (out.logits, out.logits_trivial, out.logits_support)):
            cast(FoldAccuracy, fold).update(logits.float().softmax(1), batch.target, batch.index)

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold, and the accuracy of each branch alone."""
        super().on_test_epoch_end()
        for name, fold in self.branch_folds.items():
            metric = cast(Any, fold)
            value = float(metric.compute())
            self.test_results["summary"][f"accuracy_{name}"] = value
            self.log(f"test/accuracy_{name}", value)
            metric.reset()

    # -- projection (see proto_core.prototypes.projection.ProjectsPrototypes)

    def prototype_layers(self) -> dict[str, PrototypeLayer]:
        """Both sets of prototypes."""
        return self.network.prototype_layers()

    def prototype_features(self, batch: ImageBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and one-hot targets of each set."""
        return self.network.prototype_features((batch.image, batch.target, batch.index))

    # -- explanation (see proto_vision.explanation)

    def part_evidence(self, images: Float[Tensor, "N channels S S"]) -> tuple[Float[Tensor, "N C"], list[PartEvidence]]:
        """Logits, and for each branch what they are sums of."""
        net = self.network
        backbone_map = net.backbone(images)
        found, logits = [], torch.zeros(len(images), self.num_classes, device=images.device)
        for name in BRANCHES:
            out = net.branch(name, backbone_map)
            logits = logits + out.logits
            found.append(PartEvidence(name, net.layer(name), out.similarities, out.maps, net.head(name).weight))
        return logits, found


def st_protopnet_stages(schedule: STSchedule) -> list[Stage]:
    """Stages ``warmup``, then per round ``joint`` (``joint2`` ...), which ends with the projection, and ``heads``.

    Raises:
        ValueError: fewer than one round.
    """
    if schedule.rounds < 1:
        raise ValueError(f"rounds: found {schedule.rounds}, needed at least 1")
    monitor = "val/accuracy" if schedule.keep == "best" else None
    new = ("network.addon_*", "network.prototypes_*")
    common: dict[str, Any] = {"monitor": monitor, "patience": None}
    stages = [Stage("warmup", new, schedule.warmup_epochs, schedule.lr, **common)]
    for turn in range(1, schedule.rounds + 1):
        number = str(turn) if turn > 1 else ""
        falls = tuple(milestone - (turn - 1) * schedule.joint_epochs for milestone in schedule.milestones)
        steps: dict[str, Any] = {"scheduler": "steps", "milestones": falls, "gamma": schedule.gamma}
        train = ("network.backbone.*", *new)
        stages.append(
            Stage(f"joint{number}", train, schedule.joint_epochs, schedule.lr, project=True, **steps, **common)
        )
        stages.append(Stage(f"heads{number}", ("network.head_*",), schedule.head_epochs, schedule.head_lr, **common))
    return stages
