"""EvalProtoPNet as a system that trains: warm-up without alignment, then everything; no projection of vectors.

Source: "Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype Networks", ICCV 2023,
arXiv 2212.05946. Differences from the authors' code: the rate falls after every third joint epoch (their first fall
comes an epoch early); prototypes are never projected, as there, but remember the training image that shows each best,
so that explanations have a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import ClusterLoss, SeparationLoss, SubspaceOrthogonalityLoss
from proto_core.precision import full_precision
from proto_core.prototypes import PrototypeLayer
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbones import create_backbone
from proto_vision.classification import ImageClassifier, adam_by_part
from proto_vision.data.dataset import ImageBatch
from proto_vision.evalprotopnet.network import EvalProtoPNet, EvalProtoPNetOutput, SDFALoss
from proto_vision.explanation import ExplainsParts, PartEvidence

__all__ = ["EvalProtoPNetModule", "EvalSchedule"]


@dataclass(frozen=True)
class EvalSchedule:
    """How long and how fast EvalProtoPNet trains; defaults are the authors' script's.

    Args:
        warmup_epochs: everything but the backbone, without alignment (0 leaves it out).
        joint_epochs: everything.
        lr: of add-on and prototypes.
        backbone_lr: of the backbone.
        aggregation_lr: of the head's weights.
        weight_decay: of backbone and add-on.
        milestones: joint epochs after which the rates fall.
        gamma: factor at a milestone.
        keep: ``"best"`` keeps the epoch of a stage with the best validation accuracy, ``"last"`` its last epoch.
    """

    warmup_epochs: int = 5
    joint_epochs: int = 7
    lr: float = 3e-3
    backbone_lr: float = 1e-4
    aggregation_lr: float = 1e-6
    weight_decay: float = 1e-3
    milestones: Sequence[int] = (3, 6)
    gamma: float = 0.2
    keep: Literal["best", "last"] = "best"


class EvalProtoPNetModule(ExplainsParts, ImageClassifier):
    """Image classifier whose part prototypes keep to the same part: their activations follow shallow features.

    Args:
        backbone: name, see :func:`proto_vision.backbones.create_backbone`.
        num_classes: C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        backbone_stage: which of the backbone's maps is the deep one.
        prototypes_per_class: K.
        prototype_channels: D.
        cluster: weight of :class:`~proto_core.losses.ClusterLoss`.
        separation: weight of :class:`~proto_core.losses.SeparationLoss`.
        orthogonality: weight of :class:`~proto_core.losses.SubspaceOrthogonalityLoss`.
        alignment: weight of :class:`SDFALoss` in the joint stage (the paper's lambda).
        threshold: of the alignment.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`EvalProtoPNetOutput`.

    Raises:
        ValueError: fewer than two classes, an unknown backbone.

    Source:
        arXiv 2212.05946, section 5.

    Example:
        >>> import torch
        >>> from proto_vision import EvalProtoPNetModule
        >>> net = EvalProtoPNetModule("conv3", 10, image_size=16, in_channels=1, prototypes_per_class=2)
        >>> net(torch.rand(4, 1, 16, 16)).logits.shape
        torch.Size([4, 10])
    """

    system: ClassVar[str] = "evalprotopnet"
    paper: ClassVar[Paper] = Paper(
        title="Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype Networks",
        year=2023,
        arxiv="2212.05946",
        code="hqhQAQ/EvalProtoPNet@ab33e5d",
        evidence="code",
        summary="Part prototypes aligned with shallow features; consistency and stability of any part prototypes.",
        claim="Alignment with shallow features carries over to unseen images at no cost in accuracy.",
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
        prototypes_per_class: int = 10,
        prototype_channels: int = 64,
        cluster: float = 0.8,
        separation: float = 0.08,
        orthogonality: float = 1e-4,
        alignment: float = 0.5,
        threshold: float = 0.1,
        schedule: EvalSchedule = EvalSchedule(),
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        if self.num_classes < 2:
            raise ValueError(f"num_classes: found {self.num_classes}, needed 2 at least: prototypes compare classes")
        self.backbone_name, self.backbone_stage, self.schedule = backbone, backbone_stage, schedule
        network, channels = create_backbone(
            backbone,
            in_channels=in_channels,
            pretrained=pretrained,
            stage=backbone_stage,
            shallow=True,
            image_size=image_size,
        )
        self.network = EvalProtoPNet(
            network,
            channels[1],
            self.num_classes,
            prototypes_per_class=prototypes_per_class,
            prototype_channels=prototype_channels,
        )
        self.weights = {
            "cluster": cluster,
            "separation": separation,
            "orthogonality": orthogonality,
            "alignment": alignment,
        }
        self.cluster, self.separation = ClusterLoss(), SeparationLoss()
        self.orthogonality = SubspaceOrthogonalityLoss("l1")
        self.alignment = SDFALoss(prototypes_per_class, threshold=threshold)
        monitor = "val/accuracy" if schedule.keep == "best" else None
        common: dict[str, Any] = {"monitor": monitor, "patience": None}
        new = ("network.addon.*", "network.prototypes.*", "network.aggregation.*")
        fall: dict[str, Any] = {"scheduler": "steps", "milestones": schedule.milestones, "gamma": schedule.gamma}
        self.stages = [
            Stage("warmup", new, schedule.warmup_epochs, schedule.lr, **common),
            Stage("joint", ("*",), schedule.joint_epochs, schedule.lr, project=True, overwrite=False, **fall, **common),
        ]
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        net = self.network
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "backbone_stage": self.backbone_stage,
            "prototypes_per_class": net.prototypes_per_class,
            "prototype_channels": net.prototypes.prototypes.shape[1],
            **self.weights,
            "threshold": self.alignment.threshold,
            "schedule": asdict(self.schedule) | {"milestones": list(self.schedule.milestones)},
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> EvalProtoPNetModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": EvalSchedule(**settings["schedule"])})

    def forward(self, images: Float[Tensor, "N channels S S"]) -> EvalProtoPNetOutput:
        """Logits and what the losses need."""
        return self.network(images)

    def loss_terms(self, out: EvalProtoPNetOutput, targets: Int[Tensor, "N"]) -> dict[str, Tensor]:
        """Every term of the loss, without its weight; ``class`` is the cross-entropy."""
        layer = self.network.prototypes
        return {
            "class": F.cross_entropy(full_precision(out.logits), targets),
            "cluster": self.cluster(out.max_cosine, targets, layer.class_identity),
            "separation": self.separation(out.max_cosine, targets, layer.class_identity),
            "orthogonality": self.orthogonality(layer.prototypes, self.num_classes),
            "alignment": self.alignment(out.maps, out.shallow, out.deep, targets),
        }

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the terms; alignment counts in the joint stage alone."""
        terms = self.loss_terms(self(batch.image), batch.target)
        if self.stage is not None and self.stage.name == "warmup":
            del terms["alignment"]
        loss = torch.stack([value * self.weights.get(name, 1.0) for name, value in terms.items()]).sum()
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Bring the prototypes back to unit length."""
        self.network.prototypes.normalize_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam: backbone and head at rates of their own, weight decay on backbone and add-on."""
        stage, schedule = self.stage or self.stages[-1], self.schedule
        parts = {
            "backbone": (schedule.backbone_lr, schedule.weight_decay),
            "addon": (stage.lr, schedule.weight_decay),
            "prototypes": (stage.lr, 0.0),
            "aggregation": (schedule.aggregation_lr, 0.0),
        }
        return adam_by_part(self.network, stage, parts)

    # -- cases and explanations

    def prototype_layers(self) -> dict[str, PrototypeLayer]:
        """The prototypes."""
        return {"prototypes": self.network.prototypes}

    def prototype_features(self, batch: ImageBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and one-hot targets."""
        _, deep = self.network.backbone(batch.image)
        return {"prototypes": (self.network.addon(deep), F.one_hot(batch.target, self.num_classes))}

    def part_evidence(self, images: Float[Tensor, "N channels S S"]) -> tuple[Float[Tensor, "N C"], list[PartEvidence]]:
        """Logits, and what they are sums of."""
        net = self.network
        out = net(images)
        weight = net.prototypes.class_identity.T * net.aggregation.shares().flatten()
        activations = out.maps.amax(dim=(2, 3))
        return out.logits, [PartEvidence("prototypes", net.prototypes, activations, out.maps, weight)]
