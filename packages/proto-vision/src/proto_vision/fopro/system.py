"""FoPro as a system that trains: pretraining, prototypes from trusted images, the relation module, cleaning.

Source: "FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning", AAAI 2023, arXiv 2212.00465. Differences
from the authors' code: the stages follow each other in one run; prototypes that are missing when they are needed are
made then; the last epoch is kept, not the one that is best on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbones import create_backbone
from proto_vision.classification import ImageClassifier
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.module import ImageDataModule
from proto_vision.encoders import create_encoder
from proto_vision.fopro.bilinear import BilinearPool
from proto_vision.fopro.network import FoPro
from proto_vision.fopro.schedule import FoProSchedule
from proto_vision.label_cleaning import plain_batches

__all__ = ["FoProModule", "FoProOutput"]

_SCHEDULE = FoProSchedule()
_HEADS = ("projector", "reconstructor", "classifier", "low_dim_classifier")


class FoProOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, K]`` of the classifier on the encoder.
    """

    logits: Tensor


class FoProModule(ImageClassifier):
    """Image classifier for labels from the web, guided by a few trusted images of each class.

    The data says which labels are trusted (``proto_vision.WebFolder``, or ``--data.protocol`` with
    :class:`~proto_vision.data.noise.TrustedShots` on any source) and gives two views of each training image, the second
    strongly augmented (``--data.views [strong]``).

    Args:
        backbone: name, see :func:`proto_vision.encoders.create_encoder`; with bilinear pooling see
            :func:`proto_vision.backbones.create_backbone`.
        num_classes: K; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        pooling: ``"average"``, or ``"bilinear"`` of a backbone's maps (B-CNN).
        backbone_stage: which map bilinear pooling sees; -2 leaves out a VGG's last pooling.
        low_dim: length D of an embedding.
        projection_hidden: units of the projector's hidden layer; ``None``: it is one linear layer.
        relation_hidden: units of the relation module.
        queue_size: Q, keys kept for the contrast of instances.
        encoder_momentum: of the slow copy.
        prototype_momentum: of the prototypes; short trainings need less of both.
        temperature: of similarities.
        use_density: whether each prototype's logits are divided by its density, not by the temperature.
        margin: taken off the similarity of a trusted image to its class.
        alpha: share of the classifier in soft targets.
        threshold: gamma, score above which a label is corrected.
        distance_threshold: to a class, below which an image trains the low-dimensional classifier before cleaning.
        soft_labels: whether the classifier also learns soft targets.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`FoProOutput`.

    Raises:
        ValueError: an unknown backbone, settings out of range.

    Source:
        arXiv 2212.00465, section 3 and algorithm 1.

    Example:
        >>> import torch
        >>> from proto_vision import FoProModule
        >>> net = FoProModule("conv3", 4, image_size=8, in_channels=1, low_dim=8, projection_hidden=16, queue_size=32)
        >>> net(torch.rand(2, 1, 8, 8)).logits.shape
        torch.Size([2, 4])
    """

    system: ClassVar[str] = "fopro"
    paper: ClassVar[Paper] = Paper(
        title="FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning",
        year=2023,
        arxiv="2212.00465",
        code="yuleiqin/fopro@d0a6a72",
        evidence="code",
        summary="Prototypes from a few trusted images clean the labels of images from the web while it trains.",
        claim="A few trusted images clean labels from the web and raise the accuracy on real images.",
    )

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 1000,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 224,
        in_channels: int = 3,
        pretrained: bool = False,
        pooling: Literal["average", "bilinear"] = "average",
        backbone_stage: int = -1,
        low_dim: int = 128,
        projection_hidden: int | None = 2048,
        relation_hidden: int = 128,
        queue_size: int = 8192,
        encoder_momentum: float = 0.999,
        prototype_momentum: float = 0.999,
        temperature: float = 0.1,
        use_density: bool = True,
        margin: float = 0.5,
        alpha: float = 0.5,
        threshold: float = 0.6,
        distance_threshold: float = 20.0,
        soft_labels: bool = True,
        schedule: FoProSchedule = _SCHEDULE,
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        self.backbone_name, self.pooling, self.backbone_stage = backbone, pooling, backbone_stage
        self.schedule = schedule
        size: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "pretrained": pretrained}
        if pooling == "bilinear":
            maps, (channels,) = create_backbone(backbone, stage=backbone_stage, **size)
            encoder, features = nn.Sequential(maps, BilinearPool()), channels**2
        elif pooling == "average":
            encoder, features = create_encoder(backbone, **size)  # type: ignore[assignment]
        else:
            raise ValueError(f"pooling: found {pooling!r}, needed 'average' or 'bilinear'")
        self.options: dict[str, Any] = {
            "low_dim": low_dim,
            "projection_hidden": projection_hidden,
            "relation_hidden": relation_hidden,
            "queue_size": queue_size,
            "encoder_momentum": encoder_momentum,
            "prototype_momentum": prototype_momentum,
            "temperature": temperature,
            "use_density": use_density,
            "margin": margin,
            "alpha": alpha,
            "threshold": threshold,
            "distance_threshold": distance_threshold,
            "soft_labels": soft_labels,
        }
        self.network = FoPro(encoder, features, self.num_classes, **self.options)
        self.initialised: Tensor
        self.begun: Tensor
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("begun", torch.tensor(0))
        self.stages = self._stages(schedule)
        self.stage: Stage | None = None
        self.epoch = 0

    @staticmethod
    def _stages(schedule: FoProSchedule) -> list[Stage]:
        monitor = "val/accuracy" if schedule.keep == "best" else None
        common: dict[str, Any] = {"monitor": monitor, "patience": None, "weight_decay": schedule.weight_decay}
        heads = tuple(f"network.{name}.*" for name in _HEADS)
        rest = schedule.pretrain_epochs - schedule.frozen_epochs
        every = ("network.encoder.*", *heads, "network.relation.*")
        return [
            Stage("frozen", heads, schedule.frozen_epochs, schedule.lr, **common),
            Stage("pretrain", ("network.encoder.*", *heads), rest, schedule.lr, **common),
            Stage("relation", ("network.relation.*",), schedule.relation_epochs, schedule.relation_lr, **common),
            Stage("clean", every, schedule.epochs - schedule.pretrain_epochs, schedule.lr, **common),
        ]

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "pooling": self.pooling,
            "backbone_stage": self.backbone_stage,
            **self.options,
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> FoProModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": FoProSchedule(**settings["schedule"])})

    def forward(self, images: Float[Tensor, "N channels S S"]) -> FoProOutput:
        """Logits of the classifier."""
        return FoProOutput(self.network(images))

    @torch.no_grad()
    def judge_labels(
        self, images: Float[Tensor, "N channels S S"], labels: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """How suspicious labels are, 1 minus the soft target of the given label, and the label with the largest one.

        Args:
            images: as they are in testing.
            labels: given labels.

        Raises:
            ValueError: there are no prototypes yet.
        """
        if not bool(self.initialised):
            raise ValueError("checkpoint: its prototypes are not made yet, needed one of a later epoch")
        soft = self.network.soft_targets(images)
        return 1 - soft.gather(1, labels[:, None]).squeeze(1), soft.argmax(1)

    # -- training

    def on_train_start(self) -> None:
        """Refuse data that does not tell trusted images from others.

        Raises:
            ValueError: all images are trusted, or none, or there is no second view.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ValueError("data: needed a data module of images, some of them trusted")
        rows = data.rows("train")
        count = len(rows) if data.table.trusted is None else int(data.table.trusted[rows].sum())
        if not 0 < count < len(rows):
            raise ValueError(
                f"data: found {count} trusted images of {len(rows)}, needed some: proto_vision.WebFolder, or "
                "--data.protocol proto_vision.data.noise.TrustedShots"
            )
        if len(data.views) != 1:
            raise ValueError(f"data.views: found {list(data.views)}, needed one such as [strong]")

    def on_train_epoch_start(self) -> None:
        """Note which epoch it is, make the prototypes where it is time, bring the densities up to date."""
        assert self.stage is not None
        counted = self.stage.name != "relation"
        plan = self.schedule
        first = {"pretrain": plan.frozen_epochs, "clean": plan.pretrain_epochs}.get(self.stage.name, 0)
        self.epoch = max(int(self.begun), first)  # a stage whose best epoch was kept may have stepped back
        self.begun.fill_(self.epoch + int(counted))
        cleaning = self.stage.name in ("relation", "clean")
        if not bool(self.initialised) and (cleaning or self.epoch >= self.schedule.init_epoch):
            data: ImageDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
            rows = data.rows("train")
            assert data.table.trusted is not None
            trusted = rows[data.table.trusted[rows]]
            shown = self.trainer.is_global_zero
            self.network.initialise_prototypes(plain_batches(data, trusted, "trusted images", shown=shown))
            self.initialised.fill_(True)
        elif cleaning and bool(self.network.visited.any()):
            self.network.refresh_density()
        if self.schedule.optimizer == "adam":
            decay = self.schedule.first_decay(self.epoch) if counted else self.schedule.momentum
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    group["betas"] = (decay, group["betas"][1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set this step's rate, but for the relation module alone."""
        assert self.stage is not None
        if self.stage.name == "relation":
            return
        rate = self.schedule.rate(self.epoch + (batch_idx + 1) / max(int(self.trainer.num_training_batches), 1))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The sum of the six losses."""
        assert self.stage is not None
        if batch.image.ndim != 5:
            raise ValueError("batch: found one view of each image, needed a second (--data.views [strong])")
        name = self.stage.name
        pretraining = name in ("frozen", "pretrain")
        step = self.network.compute_losses(
            batch.image[:, 0],
            batch.image[:, 1],
            batch.target,
            batch.trusted,
            use_prototypes=not pretraining or self.epoch > self.schedule.init_epoch,
            cleaning="none" if pretraining else "confidence" if name == "relation" else "fusion",
            train_relation=not pretraining,
            pretrain_relation=name == "relation",
            update_momentum=name != "relation",
        )
        self.note("train/loss", step.total.detach(), batch, prog_bar=True)
        for term, value in step.losses.items():
            self.note(f"train/{term}", value.detach(), batch)
        self.note("train/kept", step.clean.float().mean(), batch)
        self.note("train/relabelled", (step.labels != batch.target).float().mean(), batch)
        return step.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam or SGD over what the stage trains."""
        stage, schedule = self.stage or self.stages[-1], self.schedule
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"lr": stage.lr, "weight_decay": stage.weight_decay}
        if schedule.optimizer == "sgd":
            return torch.optim.SGD(trained, momentum=schedule.momentum, **options)
        return torch.optim.Adam(trained, betas=(schedule.momentum, 0.999), **options)
