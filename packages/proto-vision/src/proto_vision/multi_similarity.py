"""Multi-similarity as a system that trains: an embedding that retrieves images of classes it never saw.

Source: "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019, arXiv 1904.06627.
Differences from the authors' code: any backbone, whose map is averaged; the rate of the backbone is what the schedule
says (theirs is written down and never used); an anchor without a positive or a negative adds 0 (theirs crashes); under
DDP pairs are of the joint batch; the last epoch is kept unless there are classes to validate on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses import MultiSimilarityLoss, gpw_surrogate, pair_weights
from proto_core.metrics import recall_at_k
from proto_core.precision import no_autocast, unit_vectors
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbones import create_backbone
from proto_vision.classification import adam_by_part
from proto_vision.data.dataset import ImageBatch
from proto_vision.embedding import EmbeddingModule

__all__ = ["MultiSimilarityModule", "MultiSimilaritySchedule", "PairLoss"]

PairLoss = Literal["multi_similarity", "contrastive", "triplet", "lifted_structure", "binomial_deviance", "n_pair"]


@dataclass(frozen=True)
class MultiSimilaritySchedule:
    """How long and how fast it trains, by Adam; defaults are the authors' 3,000 steps, as 30 epochs of 100 batches.

    Args:
        epochs: of as many batches as the sampling has (``ClassBalanced(batches=100)``).
        lr: learning rate.
        backbone_lr_factor: rate of the backbone as a share of ``lr``.
        weight_decay: of everything.
        milestones: epochs after which the rate falls.
        gamma: factor at a milestone.
        keep: ``"best"`` keeps the epoch with the best Recall@K (the first K) of the validation fold, ``"last"`` the
            last.
    """

    epochs: int = 30
    lr: float = 3e-5
    backbone_lr_factor: float = 1.0
    weight_decay: float = 5e-4
    milestones: Sequence[int] = (12, 24)
    gamma: float = 0.1
    keep: Literal["best", "last"] = "last"


class MultiSimilarityModule(EmbeddingModule):
    """Embeddings of unit length, compared by cosine, trained on pairs within batches of P classes x K images.

    Batches need pairs of one class: give the data ``sampling: proto_vision.data.batches.ClassBalanced``.

    Args:
        backbone: name, see :func:`proto_vision.backbones.create_backbone`; its map is averaged.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        embedding_dim: D.
        freeze_norm: batch norm of the backbone keeps its statistics in training (for pretrained weights).
        loss: ``"multi_similarity"``, or another loss of the general pair weighting, with its own numbers, to compare.
        alpha: sharpness for positives.
        beta: sharpness for negatives.
        base: similarity in the middle of both hinges.
        margin: of the mining.
        mining: whether to mine.
        ranks: K of Recall@K.
        schedule: epochs and rates.

    Attributes:
        backbone: image -> map; other systems start from its weights
            (:func:`proto_vision.backbone_weights.load_backbone`).
        projection: the linear layer.

    Shapes:
        ``[N, channels, S, S]`` -> ``[N, D]``.

    Raises:
        ValueError: an unknown backbone or loss, no rank or one below 1, ``backbone_lr_factor`` of 0 or less.

    Source:
        arXiv 1904.06627, section 4.

    Example:
        >>> import torch
        >>> from proto_vision import MultiSimilarityModule
        >>> net = MultiSimilarityModule("conv3", image_size=16, in_channels=1, embedding_dim=32)
        >>> net(torch.rand(2, 1, 16, 16)).detach().norm(dim=1).round(decimals=4)
        tensor([1., 1.])
    """

    system: ClassVar[str] = "multi_similarity"
    paper: ClassVar[Paper] = MultiSimilarityLoss.paper

    def __init__(
        self,
        backbone: str = "torchvision/googlenet",
        *,
        image_size: int = 227,
        in_channels: int = 3,
        pretrained: bool = False,
        embedding_dim: int = 512,
        freeze_norm: bool = True,
        loss: PairLoss = "multi_similarity",
        alpha: float = 2.0,
        beta: float = 40.0,
        base: float = 0.5,
        margin: float = 0.1,
        mining: bool = True,
        ranks: Sequence[int] = (1, 2, 4, 8),
        schedule: MultiSimilaritySchedule = MultiSimilaritySchedule(),
    ) -> None:
        super().__init__(image_size, in_channels)
        check_option("loss", loss, *PairLoss.__args__)  # type: ignore[attr-defined]  # the words of a Literal
        check_positive(embedding_dim=embedding_dim, backbone_lr_factor=schedule.backbone_lr_factor)
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ranks: found {list(ranks)}, needed one at least and none below 1")
        self.backbone_name, self.freeze_norm, self.loss_name = backbone, freeze_norm, loss
        self.ranks, self.schedule = tuple(ranks), schedule
        self.backbone, (channels,) = create_backbone(
            backbone, in_channels=in_channels, pretrained=pretrained, image_size=image_size
        )
        self.projection = nn.Linear(channels, embedding_dim)
        nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
        nn.init.zeros_(self.projection.bias)
        self.loss = MultiSimilarityLoss(alpha, beta, base, margin, mining, gather_distributed=True)
        self.stages = [
            Stage(
                "train",
                max_epochs=schedule.epochs,
                lr=schedule.lr,
                weight_decay=schedule.weight_decay,
                scheduler="steps",
                milestones=tuple(schedule.milestones),
                gamma=schedule.gamma,
                monitor=f"val/recall@{self.ranks[0]}" if schedule.keep == "best" else None,
                patience=None,
            )
        ]
        self.stage: Stage | None = None
        self.train(self.training)

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        kept = ("alpha", "beta", "base", "margin", "mining")
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "embedding_dim": self.projection.out_features,
            "freeze_norm": self.freeze_norm,
            "loss": self.loss_name,
            **{name: getattr(self.loss, name) for name in kept},
            "ranks": list(self.ranks),
            "schedule": asdict(self.schedule) | {"milestones": list(self.schedule.milestones)},
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> MultiSimilarityModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": MultiSimilaritySchedule(**settings["schedule"])})

    def train(self, mode: bool = True) -> MultiSimilarityModule:
        """As in every module, but for batch norm that is to keep its statistics."""
        super().train(mode)
        if self.freeze_norm and hasattr(self, "backbone"):
            for layer in self.backbone.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        return self

    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Embeddings of unit length."""
        return unit_vectors(self.projection(self.backbone(images).mean(dim=(2, 3))))

    def figures(
        self,
        embeddings: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        gallery: Float[Tensor, "G D"] | None = None,
        gallery_targets: Int[Tensor, "G"] | None = None,
    ) -> Mapping[str, float]:
        """Recall@K: share of images with one of their class among the K most similar others.

        Raises:
            ValueError: an image without another of its class.
        """
        found = recall_at_k(embeddings, targets, gallery, gallery_targets, k=self.ranks)
        return {f"recall@{rank}": value for rank, value in found.items()}

    def pair_loss(self, embeddings: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """The chosen loss of a batch; of losses other than multi-similarity a value of the same gradient."""
        if self.loss_name == "multi_similarity":
            return self.loss(embeddings, targets)
        joint, labels = gather_with_grad(embeddings), gather_with_grad(targets)
        with no_autocast(joint):
            similarity = joint @ joint.T
            return gpw_surrogate(similarity, labels, pair_weights(similarity, labels, self.loss_name)) / len(labels)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The loss over the pairs of a batch; further views of an image are further images of its class."""
        batch = batch.stacked()
        loss = self.pair_loss(self.embed(batch.image), batch.target)
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the backbone may have a rate of its own."""
        stage = self.stage or self.stages[0]
        backbone_lr = stage.lr * self.schedule.backbone_lr_factor
        parts = {"backbone": (backbone_lr, stage.weight_decay), "projection": (stage.lr, stage.weight_decay)}
        return adam_by_part(self, stage, parts)
