"""PALM as a system that trains: encoder, head, the loss of the core, the paper's rates, and detection when tested.

Source: "Learning with Mixture of Prototypes for Out-of-Distribution Detection", ICLR 2024, arXiv 2402.02653.
Differences from the authors' code: there is an evaluation path; known images are classified by their nearest prototype
(the loss trains no classifier, and they report no accuracy); each step takes the rate at its end, so that the first one
is not lost to a rate of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.losses import PALMLoss
from proto_core.metrics import FoldAccuracy, auroc, classification_figures, fpr_at_tpr
from proto_core.ood import MahalanobisOOD
from proto_core.precision import unit_vectors
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.classification import ImageClassifier
from proto_vision.data.dataset import ImageBatch
from proto_vision.encoders import create_encoder
from proto_vision.feature_bank import training_features

__all__ = ["PALM", "PALMOutput", "PALMSchedule"]


@dataclass(frozen=True)
class PALMSchedule:
    """How long and how fast PALM trains, by SGD with Nesterov momentum; defaults are the authors' for CIFAR.

    Args:
        epochs: of training.
        warmup_epochs: over which the rate rises from 0, step by step; from there it falls as a cosine.
        lr: highest rate, for a batch of 512.
        final: the last step's rate as a share of ``lr``.
        momentum: of SGD.
        weight_decay: of all weights.
        keep: ``"best"`` keeps the epoch with the lowest training loss, ``"last"`` the last one.

    Raises:
        ValueError: no epoch, a longer warm-up than training.

    Example:
        >>> from proto_vision.palm import PALMSchedule
        >>> schedule = PALMSchedule(epochs=4, warmup_epochs=2, lr=1.0)
        >>> [round(schedule.rate(epoch), 4) for epoch in (1, 2, 3, 4)]
        [0.5, 1.0, 0.5005, 0.001]
    """

    epochs: int = 500
    warmup_epochs: int = 10
    lr: float = 0.5
    final: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-6
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs <= self.epochs or self.epochs < 1:
            raise ValueError(
                f"warmup_epochs, epochs: found {self.warmup_epochs} and {self.epochs}, needed a warm-up within training"
            )

    def rate(self, epoch: float) -> float:
        """The rate when ``epoch`` epochs are over, parts of one counting."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        over = min((epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1), 1.0)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * over)))


class PALMOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, C]`` similarity to the nearest prototype of each class, over the temperature.
        embeddings: ``[N, D]`` of norm 1, from the head.
        features: ``[N, F]`` from the encoder, for detection.
    """

    logits: Tensor
    embeddings: Tensor
    features: Tensor


class PALM(ImageClassifier):
    """Encoder whose features tell images of known classes from others.

    Trained by :class:`~proto_core.losses.PALMLoss` on several views of each image (``--data.augment simclr
    --data.views [simclr]``; a single view works). Detection is :class:`~proto_core.ood.MahalanobisOOD` on the features,
    fitted to the training images. ``test`` reports it where the test fold holds images of classes that were not trained
    (``--data.protocol UnseenClasses``), beside the accuracy by the nearest prototype on images of those that were.

    Args:
        backbone: name, see :func:`proto_vision.encoders.create_encoder`.
        num_classes: C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        embedding_dim: D.
        prototypes_per_class: K.
        momentum: of the prototypes.
        temperature: of the similarities.
        proto_temperature: of the contrast of prototypes.
        lambda_pcon: weight of that contrast.
        epsilon: temperature of the assignment.
        sinkhorn_iterations: of the assignment.
        top_k: prototypes of its class that a sample is assigned to, at most; 0: all.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`PALMOutput`.

    Raises:
        ValueError: an unknown backbone, what the loss refuses (fewer than two classes among it).

    Source:
        arXiv 2402.02653, section 3 and appendix (training).

    Example:
        >>> import torch
        >>> from proto_vision import PALM
        >>> net = PALM("conv3", 4, image_size=16, in_channels=1, embedding_dim=8)
        >>> out = net(torch.rand(2, 1, 16, 16))
        >>> out.logits.shape, out.embeddings.shape, out.features.shape
        (torch.Size([2, 4]), torch.Size([2, 8]), torch.Size([2, 128]))
    """

    system: ClassVar[str] = "palm"
    paper: ClassVar[Paper] = PALMLoss.paper

    def __init__(
        self,
        backbone: str = "cifar_resnet34",
        num_classes: int = 10,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 32,
        in_channels: int = 3,
        pretrained: bool = False,
        embedding_dim: int = 128,
        prototypes_per_class: int = 6,
        momentum: float = 0.999,
        temperature: float = 0.1,
        proto_temperature: float = 0.5,
        lambda_pcon: float = 1.0,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        top_k: int = 5,
        schedule: PALMSchedule = PALMSchedule(),
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        self.backbone_name, self.schedule = backbone, schedule
        self.loss_settings: dict[str, Any] = {
            "embedding_dim": embedding_dim,
            "prototypes_per_class": prototypes_per_class,
            "momentum": momentum,
            "temperature": temperature,
            "proto_temperature": proto_temperature,
            "lambda_pcon": lambda_pcon,
            "epsilon": epsilon,
            "sinkhorn_iterations": sinkhorn_iterations,
            "top_k": top_k,
        }
        self.encoder, size = create_encoder(
            backbone, in_channels=in_channels, pretrained=pretrained, image_size=image_size
        )
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, embedding_dim))
        self.loss = PALMLoss(self.num_classes, **self.loss_settings)
        best: dict[str, Any] = {"monitor": "train/loss" if schedule.keep == "best" else None, "mode": "min"}
        self.stages = [Stage("palm", ("*",), schedule.epochs, schedule.lr, patience=None, **best)]
        self.stage: Stage | None = None
        self.detector: MahalanobisOOD | None = None
        self.ood_fold = FoldAccuracy()

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            **self.loss_settings,
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> PALM:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": PALMSchedule(**settings["schedule"])})

    def ood_features(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N F"]:
        """The encoder's features, which detection looks at."""
        return self.encoder(images)

    def embed(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N D"]:
        """Embeddings of norm 1."""
        return unit_vectors(self.head(features))

    def forward(self, images: Float[Tensor, "N channels S S"]) -> PALMOutput:
        """Features, embeddings, and the logits of the nearest prototypes."""
        features = self.encoder(images)
        embeddings = self.embed(features)
        similarity = self.loss.prototypes(embeddings)
        classes = self.loss.prototypes.labels.expand_as(similarity)
        lowest = similarity.new_full((len(similarity), self.num_classes), -torch.inf)
        nearest = lowest.scatter_reduce(1, classes, similarity, "amax")
        return PALMOutput(nearest / self.loss.temperature, embeddings, features)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The loss over all views of the batch."""
        every = batch.stacked()
        loss = self.loss(self.embed(self.encoder(every.image)), every.target)
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        for name, value in self.loss.terms.items():
            self.note(f"train/{name}", value, batch)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set this step's rate."""
        steps = int(self.trainer.num_training_batches)
        rate = self.schedule.rate(self.trainer.current_epoch + (batch_idx + 1) / steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum."""
        s = self.schedule
        return torch.optim.SGD(
            self.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, nesterov=s.momentum > 0
        )

    # -- detection

    def on_test_start(self) -> None:
        """Fit the detector to the training images of the trainer's data module, where the test has unknown classes.

        Raises:
            ValueError: the test has no image of a known class.
        """
        self.detector = None
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        known = data.targets[data.rows("test")] < self.num_classes
        if not bool(known.any()):
            raise ValueError(
                f"{data}: the test fold holds no image of the {self.num_classes} classes that were trained, needed "
                "some of them (with the protocol UnseenClasses: seen_tested: true)"
            )
        if not bool(known.all()):
            with self.trainer.precision_plugin.forward_context():
                self.detector = MahalanobisOOD().fit(training_features(self, data)[0])

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the scores of the known classes, and how known each image looks."""
        out, known = self(batch.image), batch.target < self.num_classes
        self.test_fold.update(out.logits[known].softmax(1), batch.target[known], batch.index[known])
        if self.detector is not None:
            score = self.detector.score(out.features)
            self.ood_fold.update(score.unsqueeze(1), batch.target, batch.index)

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold, kept in ``test_results`` and logged."""
        scores, targets = self.test_fold.gathered()
        self.test_results = classification_figures(scores, targets, self.class_names)
        if self.detector is not None:
            scores, targets = self.ood_fold.gathered()
            inside, outside = (scores[rows, 0] for rows in (targets < self.num_classes, targets >= self.num_classes))
            self.test_results["summary"] |= {
                "unknown_auroc": auroc(inside, outside),
                "unknown_fpr95": fpr_at_tpr(inside, outside),
            }
        for name, value in self.test_results["summary"].items():
            self.log(f"test/{name}", value)
        self.test_fold.reset()
        self.ood_fold.reset()
