"""AMCL as a system that trains: a backbone, several heads, and a learned temperature for every pair of views.

Source: "Adaptive Multi-head Contrastive Learning", ECCV 2024, arXiv 2310.05615. Differences from the authors' code,
whose step has no negatives and does not run: the loss is the paper's table (:mod:`proto_core.losses`); all five
frameworks train; the momentum encoder of MoCo and BYOL is in evaluation mode; in the three frameworks that would
collapse or standardise (SimSiam, BYOL, Barlow Twins) the hidden layers have batch norm, which is our reading; so is the
rate for BYOL, which has none in the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses import AdaptiveMultiHeadContrastiveLoss
from proto_core.metrics import knn_predict
from proto_core.precision import unit_vectors
from proto_core.systems import Paper
from proto_core.training import Stage, Teacher
from proto_vision.data.dataset import ImageBatch
from proto_vision.embedding import EmbeddingModule
from proto_vision.encoders import create_encoder
from proto_vision.feature_bank import training_features

__all__ = ["AMCL", "AMCLSchedule", "Framework", "MultiHeadProjector"]

Framework = Literal["simclr", "moco", "simsiam", "byol", "barlow"]

RATES = {"simclr": 0.06, "moco": 0.08, "simsiam": 0.05, "byol": 0.05, "barlow": 0.11}
KINDS = {"simclr": "ntxent", "moco": "ntxent", "simsiam": "simsiam", "byol": "simsiam", "barlow": "barlow"}


class MultiHeadProjector(nn.Module):
    """C projections of the same features, alike in form, each with weights of its own: ``Linear, ReLU, Linear``.

    Args:
        in_dim: of the features.
        hidden_dim: of the hidden layer.
        out_dim: d.
        num_heads: C.
        norm: batch norm before each ReLU.

    Attributes:
        heads: the C networks.

    Shapes:
        ``[N, in_dim]`` -> ``[C, N, out_dim]``.

    Raises:
        ValueError: a size below 1.

    Source:
        arXiv 2310.05615, section 3.

    Example:
        >>> import torch
        >>> from proto_vision.amcl import MultiHeadProjector
        >>> MultiHeadProjector(16, 8, 4)(torch.rand(5, 16)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self, in_dim: int = 512, hidden_dim: int = 512, out_dim: int = 128, num_heads: int = 3, *, norm: bool = False
    ) -> None:
        super().__init__()
        check_positive(in_dim=in_dim, hidden_dim=hidden_dim, out_dim=out_dim, num_heads=num_heads)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(in_dim, hidden_dim),
                *([nn.BatchNorm1d(hidden_dim)] if norm else []),
                nn.ReLU(),
                nn.Linear(hidden_dim, out_dim),
            )
            for _ in range(num_heads)
        )

    def forward(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "C N d"]:
        """Projections of every head."""
        return torch.stack([head(features) for head in self.heads])


@dataclass(frozen=True)
class AMCLSchedule:
    """How long and how fast AMCL trains, by SGD with a rate that falls as a cosine; defaults are the authors'.

    Args:
        epochs: of training.
        lr: the first rate, for a batch of 512; ``None``: the authors' for the framework, 0.06 (SimCLR), 0.08 (MoCo),
            0.05 (SimSiam, BYOL) or 0.11 (Barlow Twins).
        momentum: of SGD.
        weight_decay: of all weights.
        keep: ``"best"`` keeps the epoch with the best vote of neighbours on the validation fold, ``"last"`` the last.
    """

    epochs: int = 800
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    keep: Literal["best", "last"] = "last"


class AMCL(EmbeddingModule):
    """Features without labels: two views of an image are told from other images by several heads at once.

    Needs two views of each training image (``--data.augment contrast --data.views [contrast]``). Labels serve only to
    measure: in validation and test each image is classified by the vote of its nearest training images.

    Args:
        framework: ``"simclr"``, ``"moco"``, ``"simsiam"``, ``"byol"`` or ``"barlow"``.
        num_heads: C, projections (of SimSiam and BYOL: predictors).
        backbone: name, see :func:`proto_vision.encoders.create_encoder`.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        hidden_dim: of the heads.
        embedding_dim: d.
        beta: weight of the temperatures' regulariser.
        lower: smallest temperature; the code has 1e-5, with which training can diverge.
        upper: largest temperature.
        shared: one network of temperatures for all heads.
        negatives: ``"max"`` (the paper) or ``"logsumexp"``, which trains better from scratch; for SimCLR and MoCo.
        normalize: projections of norm 1, also before their temperature is asked for; otherwise it sees their norms.
        offdiag_weight: of Barlow Twins.
        queue_size: negatives that MoCo keeps.
        momentum: of the momentum encoder of MoCo and BYOL.
        neighbours: that vote.
        vote_temperature: of their votes.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> features ``[N, F]`` of the backbone.

    Raises:
        ValueError: an unknown framework or backbone, a size below 1, what the loss refuses; in training: other than
            two views, a batch of one image (but for MoCo).

    Source:
        arXiv 2310.05615, section 3 and its table of losses.

    Example:
        >>> import torch
        >>> from proto_vision import AMCL
        >>> AMCL("simclr", 2, "conv3", image_size=16, in_channels=1)(torch.rand(4, 1, 16, 16)).shape
        torch.Size([4, 128])
    """

    system: ClassVar[str] = "amcl"
    paper: ClassVar[Paper] = AdaptiveMultiHeadContrastiveLoss.paper
    queue: Tensor

    def __init__(
        self,
        framework: Framework = "simclr",
        num_heads: int = 3,
        backbone: str = "cifar_resnet18",
        *,
        image_size: int = 32,
        in_channels: int = 3,
        pretrained: bool = False,
        hidden_dim: int = 512,
        embedding_dim: int = 128,
        beta: float = 0.1,
        lower: float = 0.05,
        upper: float = 2.0,
        shared: bool = True,
        negatives: Literal["max", "logsumexp"] = "max",
        normalize: bool = False,
        offdiag_weight: float = 5e-3,
        queue_size: int = 4096,
        momentum: float = 0.99,
        neighbours: int = 200,
        vote_temperature: float = 0.1,
        schedule: AMCLSchedule = AMCLSchedule(),
    ) -> None:
        super().__init__(image_size, in_channels)
        check_option("framework", framework, *get_args(Framework))
        check_positive(queue_size=queue_size, neighbours=neighbours, vote_temperature=vote_temperature)
        self.framework, self.backbone_name, self.schedule = framework, backbone, schedule
        self.given: dict[str, Any] = {
            "framework": framework,
            "num_heads": num_heads,
            "backbone": backbone,
            "hidden_dim": hidden_dim,
            "embedding_dim": embedding_dim,
            "beta": beta,
            "lower": lower,
            "upper": upper,
            "shared": shared,
            "negatives": negatives,
            "normalize": normalize,
            "offdiag_weight": offdiag_weight,
            "queue_size": queue_size,
            "momentum": momentum,
            "neighbours": neighbours,
            "vote_temperature": vote_temperature,
        }
        self.backbone, size = create_encoder(
            backbone, in_channels=in_channels, pretrained=pretrained, image_size=image_size
        )
        predicts, norm = framework in ("simsiam", "byol"), framework in ("simsiam", "byol", "barlow")
        heads = 1 if predicts else num_heads
        self.projector = MultiHeadProjector(size, hidden_dim, embedding_dim, heads, norm=norm)
        self.predictor: MultiHeadProjector | None = None
        if predicts:
            self.predictor = MultiHeadProjector(embedding_dim, hidden_dim, embedding_dim, num_heads, norm=True)
        self.loss = AdaptiveMultiHeadContrastiveLoss(
            *(embedding_dim, num_heads, KINDS[framework], beta, lower, upper),
            shared=shared,
            negatives=negatives,
            offdiag_weight=offdiag_weight,
            gather_distributed=framework != "moco",
        )
        self.teacher: Teacher | None = None
        if framework in ("moco", "byol"):
            self.teacher = Teacher(nn.Sequential(self.backbone, self.projector), momentum)
        if framework == "moco":
            self.register_buffer("queue", unit_vectors(torch.randn(num_heads, queue_size, embedding_dim)))
        parts = ((name, part) for name, part in self.named_children() if name != "teacher")
        trained = [name for name, part in parts if any(True for _ in part.parameters())]
        self.stages = [
            Stage(
                "contrast",
                tuple(f"{name}.*" for name in trained),
                schedule.epochs,
                RATES[framework] if schedule.lr is None else schedule.lr,
                schedule.weight_decay,
                scheduler="cosine",
                monitor="val/knn_accuracy" if schedule.keep == "best" else None,
                patience=None,
            )
        ]
        self.stage: Stage | None = None
        self.bank: tuple[Tensor, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        return {**self.given, **self.input_settings(), "schedule": asdict(self.schedule)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> AMCL:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": AMCLSchedule(**settings["schedule"])})

    def check_settings(self, found: dict[str, Any]) -> None:
        """Refuse a checkpoint of another framework or another kind of input.

        Raises:
            ValueError: names what differs.
        """
        if found["framework"] != self.framework:
            raise ValueError(
                f"checkpoint: trained with framework {found['framework']!r}, this model has {self.framework!r}"
            )
        super().check_settings(found)

    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N F"]:
        """Features of the backbone; the heads serve training alone."""
        return self.backbone(images)

    # -- training

    def projections(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "C N d"]:
        """What the loss compares: projections of every head; of SimSiam and BYOL every predictor's answer."""
        z = self.projector(self.backbone(images))
        return self._scaled(z if self.predictor is None else self.predictor(z[0]))

    def contrast(self, one: Float[Tensor, "N channels S S"], two: Float[Tensor, "N channels S S"]) -> Float[Tensor, ""]:
        """The loss of two views of the same images; MoCo's queue takes in the new keys in training mode.

        With MoCo the mean of both directions, as in the authors' code.
        """
        if self.framework in ("simclr", "barlow"):
            return self.loss(self.projections(one), self.projections(two))
        if self.framework == "moco":
            assert self.teacher is not None
            keys = [self._scaled(self.teacher(view)) for view in (one, two)]
            queue = self.queue.clone()  # backward needs what the newest keys overwrite
            forth = self.loss(self.projections(one), keys[1], queue)
            back = self.loss(self.projections(two), keys[0], queue)
            if self.training:
                self._enqueue(torch.cat(keys, dim=1))
            return (forth + back) / 2
        if self.teacher is not None:
            goals = [self._scaled(self.teacher(view)[0]) for view in (one, two)]
            return self.loss(self.projections(one), self.projections(two), targets=tuple(goals))
        assert self.predictor is not None
        first, second = (self.projector(self.backbone(view))[0] for view in (one, two))
        answers = (self._scaled(self.predictor(z)) for z in (first, second))
        return self.loss(*answers, targets=(self._scaled(first), self._scaled(second)))

    def _scaled(self, z: Tensor) -> Tensor:
        return unit_vectors(z) if self.given["normalize"] else z

    @torch.no_grad()
    def _enqueue(self, keys: Float[Tensor, "C N d"]) -> None:
        """The newest keys of all ranks push out the oldest."""
        joint = gather_with_grad(keys.transpose(0, 1).contiguous()).transpose(0, 1).to(self.queue)
        self.queue.copy_(torch.cat([joint, self.queue], dim=1)[:, : self.queue.shape[1]])

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The loss of the two views of a batch."""
        if batch.image.ndim != 5 or batch.image.shape[1] != 2:
            found = 1 if batch.image.ndim == 4 else batch.image.shape[1]
            raise ValueError(f"batch: found {found} views of each image, needed two (--data.views [contrast])")
        if len(batch.image) < 2 and self.framework != "moco":
            raise ValueError("batch: found 1 image, needed 2 at least to compare (--data.drop_last true)")
        loss = self.contrast(*batch.image.unbind(1))
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, after which the momentum encoder takes one towards the network."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.update(nn.Sequential(self.backbone, self.projector))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum; the curriculum lets its rate fall."""
        stage = self.stage or self.stages[0]
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=stage.lr, momentum=self.schedule.momentum, weight_decay=stage.weight_decay)

    # -- evaluation: the vote of the nearest training images

    def figures(
        self,
        embeddings: Float[Tensor, "N F"],
        targets: Int[Tensor, "N"],
        gallery: Float[Tensor, "G F"] | None = None,
        gallery_targets: Int[Tensor, "G"] | None = None,
    ) -> Mapping[str, float]:
        """``knn_accuracy``: share of images whose class is what the nearest of the gallery vote for.

        Args:
            embeddings: of the fold.
            targets: their classes.
            gallery: features that vote; ``None``: those of the training images.
            gallery_targets: their classes.

        Raises:
            ValueError: no gallery, and no training images.
        """
        if gallery is None or gallery_targets is None:
            if self.bank is None:
                raise ValueError("gallery: found none, needed a trainer with a data module, whose training images vote")
            gallery, gallery_targets = (part.to(embeddings.device) for part in self.bank)
        classes = int(gallery_targets.max()) + 1
        neighbours, temperature = self.given["neighbours"], self.given["vote_temperature"]
        voted = knn_predict(embeddings, gallery, gallery_targets, classes, neighbours, temperature)
        self.bank = None
        return {"knn_accuracy": float((voted[:, 0] == targets).double().mean())}

    def on_validation_epoch_start(self) -> None:
        """Embed the training images."""
        self._fill_bank()

    def on_test_epoch_start(self) -> None:
        """Embed the training images."""
        self._fill_bank()

    def _fill_bank(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            with self.trainer.precision_plugin.forward_context():
                self.bank = training_features(self, data)
