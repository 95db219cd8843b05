"""ProtoGCD as a system that trains: labelled and unlabelled images together, one prototype per known or new class.

Source: "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery", TPAMI 2025, arXiv
2504.03755. Differences from the authors' code: the last epoch is kept (they choose by the labels of unlabelled images);
figures of the test fold stand beside those of the unlabelled training images; any backbone and any source of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from proto_core.metrics import cluster_accuracy
from proto_core.modes import evaluation_mode
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.classification import ImageClassifier, class_names_or_numbers
from proto_vision.data.dataset import ImageBatch, ImageDataset
from proto_vision.data.discovery import new_names
from proto_vision.data.module import ImageDataModule
from proto_vision.encoders import Trained, create_encoder, trained_patterns
from proto_vision.protogcd.losses import ProtoGCDLoss
from proto_vision.protogcd.network import HeadOutput, ProtoGCD, ProtoGCDHead
from proto_vision.protogcd.selection import prototype_score

__all__ = ["Discovered", "ProtoGCDModule", "ProtoGCDSchedule"]


@dataclass(frozen=True)
class ProtoGCDSchedule:
    """How long and how fast ProtoGCD trains, by SGD with a cosine over the epochs; defaults are the authors'.

    Args:
        epochs: of training.
        lr: at first.
        final: share of ``lr`` that the cosine ends at.
        momentum: of SGD.
        weight_decay: of all weights but biases and other vectors.
        wait_epochs: see :class:`DAPLLoss`.
        ramp_epochs: see :class:`DAPLLoss`; ``None``: half of the epochs.
        init_ratio: see :class:`DAPLLoss`.
        final_ratio: see :class:`DAPLLoss`.
    """

    epochs: int = 200
    lr: float = 0.1
    final: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-5
    wait_epochs: int = 0
    ramp_epochs: int | None = None
    init_ratio: float = 0.0
    final_ratio: float = 1.0

    def ramp(self) -> dict[str, Any]:
        """The arguments of the losses that the epoch decides on."""
        return {
            "num_epochs": self.epochs,
            "wait_epochs": self.wait_epochs,
            "ramp_epochs": self.epochs // 2 if self.ramp_epochs is None else self.ramp_epochs,
            "init_ratio": self.init_ratio,
            "final_ratio": self.final_ratio,
        }


class Discovered(NamedTuple):
    """What a network says about the training images of a data set, un-augmented, in the order of its table.

    Attributes:
        rows: ``[N]`` of the table.
        features: ``[N, D]`` of the backbone.
        probabilities: ``[N, K]``.
        targets: ``[N]`` classes of the table.
        labelled: ``[N]`` whether training had the image's label.
    """

    rows: Int[np.ndarray, " N"]
    features: Float[Tensor, "N D"]
    probabilities: Float[Tensor, "N K"]
    targets: Int[Tensor, " N"]
    labelled: Bool[Tensor, " N"]


class ProtoGCDModule(ImageClassifier):
    """Sorts images into known classes and new ones, from some images with labels and many without.

    Training needs two views of each image (``--data.augment window --data.views [window]``) and a data module that says
    which labels may be used: any source with ``--data.protocol proto_vision.data.discovery.CategoryDiscovery
    --data.sampling proto_vision.data.discovery.HalfLabelled``, or :class:`~proto_vision.data.discovery.PartlyLabelled`.

    Args:
        backbone: name, see :func:`proto_vision.encoders.create_encoder`.
        num_classes: K, known and new; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets, those with labels first.
        num_prototypes: K where it is not the number of classes of the data, to compare several.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: weights for the backbone (a download).
        trained: which part of the backbone trains: ``"all"``, ``"last"`` (its last block) or ``"none"``.
        hidden_dim: of the projection.
        bottleneck_dim: of the projection.
        num_layers: of the projection.
        weight_sup: see :class:`ProtoGCDLoss`.
        weight_entropy: see :class:`ProtoGCDLoss`.
        weight_separation: see :class:`ProtoGCDLoss`.
        temperature: of the probabilities and see :class:`ProtoGCDLoss`.
        teacher_temperature: see :class:`ProtoGCDLoss`.
        schedule: epochs and rates.

    Attributes:
        old: ``[K]`` bool, which classes had labelled images in training.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`HeadOutput`.

    Raises:
        ValueError: fewer than two classes, an unknown backbone; when training: batches that are not of two views, a
            labelled class beyond the prototypes.

    Source:
        arXiv 2504.03755, sections 4 and 5.

    Example:
        >>> import torch
        >>> from proto_vision import ProtoGCDModule
        >>> net = ProtoGCDModule("mlp", 10, image_size=8, in_channels=1, trained="all", hidden_dim=32, bottleneck_dim=8)
        >>> net(torch.rand(4, 1, 8, 8)).logits.shape
        torch.Size([4, 10])
    """

    system: ClassVar[str] = "protogcd"
    paper: ClassVar[Paper] = Paper(
        title="ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery",
        year=2025,
        arxiv="2504.03755",
        code="mashijie1028/ProtoGCD@8835a4d",
        evidence="code",
        summary="Finds the classes of unlabelled images, known and new ones, by one set of prototypes for both.",
        claim="Unlabelled images fall into their classes, known and new, where k-means and soft labels alone fail.",
    )

    old: Tensor

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224.dino",
        num_classes: int = 200,
        *,
        class_names: Sequence[str] | None = None,
        num_prototypes: int | None = None,
        image_size: int = 224,
        in_channels: int = 3,
        pretrained: bool = False,
        trained: Trained = "last",
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        weight_sup: float = 0.35,
        weight_entropy: float = 2.0,
        weight_separation: float = 0.1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.05,
        schedule: ProtoGCDSchedule = ProtoGCDSchedule(),
    ) -> None:
        names = class_names_or_numbers(class_names, num_classes)
        count = len(names) if num_prototypes is None else num_prototypes
        if count < 2:
            name = "num_classes" if num_prototypes is None else "num_prototypes"
            raise ValueError(f"{name}: found {count}, needed 2 at least: pseudo-labels compare two classes")
        names = [*names[:count], *new_names(names, max(count - len(names), 0))]
        super().__init__(count, names, image_size, in_channels)
        self.backbone_name, self.trained, self.schedule = backbone, trained, schedule
        self.head_settings = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim, "num_layers": num_layers}
        self.loss_settings: dict[str, Any] = {
            "weight_sup": weight_sup,
            "weight_entropy": weight_entropy,
            "weight_separation": weight_separation,
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
        }
        encoder, size = create_encoder(backbone, in_channels=in_channels, image_size=image_size, pretrained=pretrained)
        self.network = ProtoGCD(encoder, ProtoGCDHead(size, count, **self.head_settings))
        self.loss = ProtoGCDLoss(**self.loss_settings, **schedule.ramp(), gather_distributed=True)
        self.register_buffer("old", torch.zeros(count, dtype=torch.bool))
        parts = [f"network.backbone.{pattern}" for pattern in trained_patterns(encoder, trained)]
        cosine: dict[str, Any] = {"scheduler": "cosine", "floor": schedule.final, "monitor": None, "patience": None}
        self.stages = [Stage("discover", ("network.head.*", *parts), schedule.epochs, schedule.lr, **cosine)]
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "trained": self.trained,
            **self.head_settings,
            **self.loss_settings,
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> ProtoGCDModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": ProtoGCDSchedule(**settings["schedule"])})

    @property
    def label_names(self) -> list[str]:
        """Names of the classes that had labels, and ``new 1`` and so on for all others, whose clusters have no name."""
        old = self.old.tolist()
        new = iter(new_names([name for name, known in zip(self.class_names, old) if known], old.count(False)))
        return [name if known else next(new) for name, known in zip(self.class_names, old)]

    def forward(self, images: Float[Tensor, "N channels S S"]) -> HeadOutput:
        """Projections, logits and unit prototypes."""
        return self.network(images)

    def features(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Features of the backbone, which the prototypes are compared with."""
        return self.network.backbone(images)

    def class_logits(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N K"]:
        """Cosine similarities over the temperature, whose softmax are the probabilities."""
        return self(images).logits / self.loss.temperature

    # -- training

    def on_fit_start(self) -> None:
        """Note which classes have labelled images."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        rows = data.rows("train")
        trusted = data.table.trusted
        labelled = np.unique(data.table.targets[rows if trusted is None else rows[trusted[rows]]])
        if labelled.size and labelled[-1] >= self.num_classes:
            raise ValueError(f"num_classes: found {self.num_classes}, needed {labelled[-1] + 1}: those with labels")
        self.old.zero_()
        self.old[torch.from_numpy(labelled)] = True

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the terms on two views."""
        if batch.image.ndim != 5 or batch.image.shape[1] != 2:
            found = tuple(batch.image.shape)
            raise ValueError(
                f"batch: found images of shape {found}, needed two views of each, such as --data.augment window "
                "--data.views [window]"
            )
        out = self(batch.stacked().image)
        terms = self.loss(*out, batch.target, batch.trusted, self.current_epoch)
        for name, value in terms.items():
            self.note(f"train/{'loss' if name == 'total' else name}", value.detach(), batch, prog_bar=name == "total")
        return terms["total"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD; no weight decay on biases and other vectors."""
        s = self.schedule
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": s.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.SGD([group for group in groups if group["params"]], lr=s.lr, momentum=s.momentum)

    # -- evaluation

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the scores of the validation fold."""
        self.val_fold.update(self.class_logits(batch.image).softmax(1), batch.target, batch.index)

    def on_validation_epoch_end(self) -> None:
        """Accuracy of the clusters of the whole fold: all, known and new classes."""
        for name, value in self._accuracies(*self.val_fold.gathered()).items():
            self.log(f"val/{name}", value, prog_bar=name == "all")
        self.val_fold.reset()

    def on_test_epoch_end(self) -> None:
        """All figures of the whole fold, and of the unlabelled training images, kept in ``test_results`` and logged."""
        scores, targets = self.test_fold.gathered()
        summary = self._accuracies(scores, targets)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            found = self.discover(data)
            if not bool(found.labelled.all()):
                unlabelled = self._accuracies(found.probabilities[~found.labelled], found.targets[~found.labelled])
                summary |= {f"unlabelled_{name}": value for name, value in unlabelled.items()}
        names = None if data is None else data.table.class_names
        rows = self._clusters(scores.argmax(1), targets, names)
        self.test_results = {"summary": summary, "labels": rows, "records": len(targets)}
        for name, value in summary.items():
            self.log(f"test/{name}", value)
        self.test_fold.reset()

    def _accuracies(self, scores: Float[Tensor, "N K"], targets: Int[Tensor, "N"]) -> dict[str, float]:
        """Shares of images in the cluster of their class, one assignment for all; NaN where there is no image."""
        old = torch.zeros(max(self.num_classes, int(targets.max()) + 1), dtype=torch.bool)
        old[: self.num_classes] = self.old.cpu()
        found = cluster_accuracy(targets, scores.argmax(1), old[targets])
        assert isinstance(found, tuple)
        return dict(zip(("all", "old", "new"), found))

    def _clusters(
        self, places: Int[Tensor, "N"], targets: Int[Tensor, "N"], names: Sequence[str] | None
    ) -> list[dict[str, Any]]:
        """For each cluster its size, its most frequent class and that class's share."""
        classes = int(targets.max()) + 1
        counts = torch.zeros(self.num_classes, classes, dtype=torch.long)
        counts.index_put_((places, targets), torch.ones_like(places), accumulate=True)
        names = [f"class {number}" for number in range(classes)] if names is None else names
        sizes, (most, which) = counts.sum(1), counts.max(1)
        return [
            {"cluster": label, "images": size, "class": names[c] if size else "", "share": top / max(size, 1)}
            for label, size, top, c in zip(self.label_names, sizes.tolist(), most.tolist(), which.tolist())
        ]

    @torch.no_grad()
    def discover(self, data: ImageDataModule) -> Discovered:
        """Features and probabilities of a data set's training images.

        Args:
            data: whose training images are looked at once, un-augmented.
        """
        images = data.projection_dataset()
        loader: DataLoader[ImageBatch] = DataLoader(
            images, batch_size=data.batch_size, num_workers=data.num_workers, collate_fn=ImageDataset.collate
        )
        features, probabilities = [], []
        with evaluation_mode(self):
            for batch in track(loader, "training images", transient=True):
                found = self.features(batch.image.to(self.device))
                logits = self.network.head(found).logits / self.loss.temperature
                features.append(found.float().cpu())
                probabilities.append(logits.softmax(1).cpu())
        rows = torch.from_numpy(images.rows)
        return Discovered(
            images.rows, torch.cat(features), torch.cat(probabilities), images.targets[rows], images.trusted[rows]
        )

    def fit_score(self, found: Discovered) -> float:
        """How well this number of prototypes fits, see :func:`prototype_score`.

        Args:
            found: of :meth:`discover`.
        """
        prototypes = self.network.head.prototypes.detach().cpu()
        return prototype_score(found.features, prototypes, found.targets, found.labelled)
