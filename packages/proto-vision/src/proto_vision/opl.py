"""OPL as a system that trains: a classifier, cross-entropy, and beside it the orthogonal projection loss of the core.

Source: "Orthogonal Projection Loss", ICCV 2021, arXiv 2103.14021. Differences from the authors' code: the weight of the
loss and its gamma are settings for any data (theirs are fixed for some); the warm-up ends with the first epoch's last
step; cosines within and between classes are measured over the whole test fold. With wrong labels, doubtful samples are
looked for before each epoch, by the network as it is (theirs: before every tenth, by the best so far on the test set).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_option
from proto_core.distributed import all_reduce_sum, is_distributed
from proto_core.losses import OrthogonalProjectionLoss
from proto_core.modes import evaluation_mode
from proto_core.precision import full_precision
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbones import create_backbone
from proto_vision.classification import ImageClassifier
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.module import ImageDataModule
from proto_vision.embedding import FoldEmbeddings
from proto_vision.label_cleaning import plain_batches
from proto_vision.truncated import TruncatedLoss

__all__ = ["OPLClassifier", "OPLOutput", "OPLSchedule"]


class OPLOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, C]``.
        features: ``[N, D]``, what the last layer gets and the loss is taken of.
    """

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class OPLSchedule:
    """How long and how fast OPL trains, by SGD; defaults are the authors' for CIFAR-100.

    Args:
        epochs: of training.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of everything.
        milestones: epochs after which the rate falls.
        gamma: factor at a milestone.
        warmup: whether the rate rises from 0 during the first epoch, step by step.
        keep: ``"best"`` keeps the epoch with the best validation accuracy, ``"last"`` the last.

    Raises:
        ValueError: a negative number of epochs or a rate of 0 or less, from the stage that is made of it.
    """

    epochs: int = 200
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: Sequence[int] = (60, 120, 160)
    gamma: float = 0.2
    warmup: bool = True
    keep: Literal["best", "last"] = "best"


class OPLClassifier(ImageClassifier):
    """Image classifier whose features have one direction per class, at right angles to those of other classes.

    The loss is ``CE(logits, y) + weight OPL(features, y)``; the answer is that of any classifier, the largest logit.
    Where labels may be wrong, the truncated loss can take the place of cross-entropy: from epoch ``start_prune`` on,
    counted from 0, it leaves out the training images whose label had a probability of k at most before the epoch. OPL
    is taken of all.

    Args:
        backbone: name, see :func:`proto_vision.backbones.create_backbone`; its map is averaged to the features.
        num_classes: C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        weight: of the orthogonal projection loss (the paper's lambda); 0 leaves plain cross-entropy.
        gamma: weight of pairs of two classes within it.
        negative: ``"mean_abs"`` (authors' code) or ``"abs_mean"`` (the paper's formula).
        classification: ``"cross_entropy"``, or ``"truncated"`` for labels of which some are wrong, see
            :class:`proto_vision.truncated.TruncatedLoss`.
        q: of the truncated loss.
        k: of the truncated loss.
        start_prune: epochs before the truncated loss leaves out any image.
        schedule: epochs and rates.

    Attributes:
        backbone: image -> map; other systems start from its weights
            (:func:`proto_vision.backbone_weights.load_backbone`).
        head: the linear layer.
        kept: ``[rows]`` bool, training images that the truncated loss has not left out in this epoch, or ``None``.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`OPLOutput`.

    Raises:
        ValueError: fewer than two classes, a negative weight or gamma, an unknown backbone, ``negative`` or
            ``classification``, q, k or ``start_prune`` out of range; when it trains with the truncated loss: no data
            module of images.

    Source:
        arXiv 2103.14021, section 3; the truncated loss: arXiv 1805.07836.

    Example:
        >>> import torch
        >>> from proto_vision import OPLClassifier
        >>> net = OPLClassifier("conv3", 10, image_size=16, in_channels=1)
        >>> out = net(torch.rand(4, 1, 16, 16))
        >>> out.logits.shape, out.features.shape
        (torch.Size([4, 10]), torch.Size([4, 128]))
    """

    system: ClassVar[str] = "opl"
    paper: ClassVar[Paper] = OrthogonalProjectionLoss.paper

    def __init__(
        self,
        backbone: str = "cifar_resnet56",
        num_classes: int = 100,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 32,
        in_channels: int = 3,
        pretrained: bool = False,
        weight: float = 1.0,
        gamma: float = 0.5,
        negative: Literal["mean_abs", "abs_mean"] = "mean_abs",
        classification: Literal["cross_entropy", "truncated"] = "cross_entropy",
        q: float = 0.7,
        k: float = 0.5,
        start_prune: int = 40,
        schedule: OPLSchedule = OPLSchedule(),
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        if self.num_classes < 2:
            raise ValueError(f"num_classes: found {self.num_classes}, needed 2 at least: classes are told apart")
        if not weight >= 0:
            raise ValueError(f"weight: found {weight}, needed at least 0")
        if start_prune < 0:
            raise ValueError(f"start_prune: found {start_prune}, needed 0 epochs or more")
        self.backbone_name, self.weight, self.schedule = backbone, weight, schedule
        self.classification = check_option("classification", classification, "cross_entropy", "truncated")
        self.truncated, self.start_prune = TruncatedLoss(q, k), start_prune
        self.kept: Tensor | None = None
        self.backbone, (channels,) = create_backbone(
            backbone, in_channels=in_channels, pretrained=pretrained, image_size=image_size
        )
        self.head = nn.Linear(channels, self.num_classes)
        self.orthogonal = OrthogonalProjectionLoss(gamma, negative=negative)
        self.test_features = FoldEmbeddings()
        self.stages = [
            Stage(
                "train",
                max_epochs=schedule.epochs,
                lr=schedule.lr,
                weight_decay=schedule.weight_decay,
                scheduler="steps",
                milestones=tuple(schedule.milestones),
                gamma=schedule.gamma,
                monitor="val/accuracy" if schedule.keep == "best" else None,
                patience=None,
            )
        ]
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "weight": self.weight,
            "gamma": self.orthogonal.gamma,
            "negative": self.orthogonal.negative,
            "classification": self.classification,
            "q": self.truncated.q,
            "k": self.truncated.k,
            "start_prune": self.start_prune,
            "schedule": asdict(self.schedule) | {"milestones": list(self.schedule.milestones)},
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> OPLClassifier:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": OPLSchedule(**settings["schedule"])})

    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Features, what stays when the classes are others; not normalised."""
        return self.backbone(images).mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "N channels S S"]) -> OPLOutput:
        """Logits and features."""
        features = self.embed(images)
        return OPLOutput(self.head(features), features)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The classification's loss and the weighted one; notes cosines. Views of an image are images of their own."""
        batch = batch.stacked()
        out = self(batch.image)
        if self.classification == "truncated":
            loss = self.truncated(out.logits, batch.target, None if self.kept is None else self.kept[batch.index])
        else:
            loss = F.cross_entropy(full_precision(out.logits), batch.target)
        if self.weight > 0:
            loss = loss + self.weight * self.orthogonal(out.features, batch.target)
        with torch.no_grad():
            within, between = self.orthogonal.components(out.features, batch.target)
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        self.note("train/within", within, batch)
        self.note("train/between", between, batch)
        return loss

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """In the first epoch, raise the rate step by step to that of the stage."""
        if not self.schedule.warmup or self.trainer.current_epoch > 0:
            return
        reached = (batch_idx + 1) / int(self.trainer.num_training_batches)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.lr * reached

    def on_train_epoch_start(self) -> None:
        """Choose the images that the truncated loss leaves out."""
        self.kept = None
        if self.classification == "cross_entropy" or self.trainer.current_epoch < self.start_prune:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ValueError("classification 'truncated': needs a data module of images, whose labels it looks at")
        self.kept = self.trusted_rows(data)
        self.log("train/kept", float(self.kept[data.rows("train")].float().mean()))

    @torch.no_grad()
    def trusted_rows(self, data: ImageDataModule) -> Bool[Tensor, " rows"]:
        """Training images whose label has a probability above k, asked un-augmented; ranks share the work.

        Args:
            data: the images.

        Returns:
            One answer for each row of its table; False for rows of other folds.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        kept = torch.zeros(len(data.record_ids), device=self.device)
        with evaluation_mode(self):
            for batch in plain_batches(data, data.rows("train")[rank::world], "training labels", shown=rank == 0):
                logits = self(batch.image.to(self.head.weight)).logits
                kept[batch.index.to(kept.device)] = self.truncated.keeps(logits, batch.target.to(kept.device)).float()
        return all_reduce_sum(kept) > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        stage = self.stage or self.stages[0]
        return torch.optim.SGD(
            self.parameters(), lr=stage.lr, momentum=self.schedule.momentum, weight_decay=stage.weight_decay
        )

    # -- what the features have become

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect scores and features of the test fold."""
        out = self(batch.image)
        self.test_fold.update(out.logits.float().softmax(1), batch.target, batch.index)
        self.test_features.update(out.features, batch.target, batch.index)

    def on_test_epoch_end(self) -> None:
        """Accuracy and its like; ``within`` and ``between``, the mean (absolute) cosines of pairs of test images."""
        super().on_test_epoch_end()
        features, targets = (part.to(self.device) for part in self.test_features.gathered())
        for name, value in zip(("within", "between"), self.orthogonal.components(features, targets)):
            self.test_results["summary"][name] = float(value)
            self.log(f"test/{name}", value)
        self.test_features.reset()
