"""UNPG as a system that trains: a backbone, an embedding, and the margin softmax with unified negatives of the core.

Source: "Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition", BMVC 2022,
arXiv 2203.11593. Differences from the authors' code: pairs are of the joint batch of all ranks (theirs are of each
rank's own, and they warn of it); the rate rises by epochs in the warm-up; any backbone and any size of image; the
validation fold is verified while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.losses import UNPGLoss
from proto_core.systems import Paper
from proto_core.training import Stage, check_label_names
from proto_vision.classification import class_names_or_numbers
from proto_vision.data.dataset import ImageBatch
from proto_vision.embedding import EmbeddingModule
from proto_vision.encoders import create_encoder
from proto_vision.unpg.iresnet import IRESNETS, IResNet
from proto_vision.verification import verification_figures

__all__ = ["UNPGModule", "UNPGSchedule"]


@dataclass(frozen=True)
class UNPGSchedule:
    """How long and how fast UNPG trains, by SGD; defaults are the authors'.

    Args:
        epochs: of training.
        warmup_epochs: over which the rate rises to ``lr``; from there it falls to 0 as a cosine.
        lr: highest rate, of network and class weights.
        momentum: of SGD.
        weight_decay: of everything.
    """

    epochs: int = 20
    warmup_epochs: int = 3
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4


class UNPGModule(EmbeddingModule):
    """Embeddings of faces (or of anything with identities), compared by cosine, of identities never seen in training.

    Trained by :class:`~proto_core.losses.UNPGLoss`; what is compared is the embedding of the image joined with that of
    its mirror image.

    Args:
        backbone: ``"iresnet34"``, ``"iresnet50"``, ``"iresnet100"``, ``"iresnet_small"`` (small images), or a name of
            :func:`proto_vision.encoders.create_encoder`, whose features then go through a linear layer and BN.
        num_classes: C, identities that train; taken from ``class_names`` where these are given.
        class_names: names of the identities in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: weights for a backbone that is no iResNet (a download).
        embedding_dim: D.
        dropout: before the linear layer of an iResNet.
        margin: ``"arcface"``, ``"cosface"`` or ``"magface"``.
        s: scale of the cosines.
        m: margin of ArcFace and CosFace.
        whisker: of the filter of pairs, in interquartile ranges; ``None``: all pairs.
        negatives: ``"unified"``, or ``"class"`` for the plain margin softmax.
        l_margin: MagFace's margin at norm ``l_a``.
        u_margin: MagFace's margin at norm ``u_a``.
        l_a: smallest norm that MagFace tells apart.
        u_a: largest norm.
        lambda_g: weight of MagFace's norm term.
        flip: whether the mirror image's embedding is joined to what is compared.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> ``[N, 2 D]``; ``[N, D]`` without ``flip``.

    Raises:
        ValueError: an unknown backbone or margin, fewer than two identities, ``pretrained`` for an iResNet.

    Source:
        arXiv 2203.11593, sections 3 and 4.

    Example:
        >>> import torch
        >>> from proto_vision import UNPGModule
        >>> net = UNPGModule("iresnet_small", 40, image_size=32, in_channels=1, embedding_dim=64).eval()
        >>> net.embed(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 128])
    """

    system: ClassVar[str] = "unpg"
    paper: ClassVar[Paper] = UNPGLoss.paper

    def __init__(
        self,
        backbone: str = "iresnet100",
        num_classes: int = 85742,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 112,
        in_channels: int = 3,
        pretrained: bool = False,
        embedding_dim: int = 512,
        dropout: float = 0.4,
        margin: Literal["arcface", "cosface", "magface"] = "arcface",
        s: float = 64.0,
        m: float = 0.5,
        whisker: float | None = 1.5,
        negatives: Literal["unified", "class"] = "unified",
        l_margin: float = 0.45,
        u_margin: float = 0.8,
        l_a: float = 10.0,
        u_a: float = 110.0,
        lambda_g: float = 35.0,
        flip: bool = True,
        schedule: UNPGSchedule = UNPGSchedule(),
    ) -> None:
        super().__init__(image_size, in_channels)
        self.class_names = class_names_or_numbers(class_names, num_classes)
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise ValueError(f"num_classes: found {self.num_classes}, needed 2 at least: identities are told apart")
        self.backbone_name, self.embedding_dim, self.dropout = backbone, embedding_dim, dropout
        self.flip, self.schedule = flip, schedule
        if backbone in IRESNETS:
            if pretrained:
                raise ValueError(f"pretrained: there are no weights for {backbone!r}")
            network: nn.Module = IResNet(
                backbone, embedding_dim, in_channels=in_channels, image_size=image_size, dropout=dropout
            )
        else:
            encoder, features = create_encoder(
                backbone, in_channels=in_channels, image_size=image_size, pretrained=pretrained
            )
            network = nn.Sequential(encoder, nn.Linear(features, embedding_dim), nn.BatchNorm1d(embedding_dim))
        self.network = network
        sizes: dict[str, Any] = {
            "l_margin": l_margin,
            "u_margin": u_margin,
            "l_a": l_a,
            "u_a": u_a,
            "lambda_g": lambda_g,
        }
        self.loss = UNPGLoss(
            embedding_dim, self.num_classes, margin, s, m, whisker, negatives, **sizes, gather_distributed=True
        )
        self.stages = [
            Stage(
                "train",
                max_epochs=schedule.epochs,
                lr=schedule.lr,
                weight_decay=schedule.weight_decay,
                scheduler="cosine",
                warmup_epochs=schedule.warmup_epochs,
                monitor=None,
                patience=None,
            )
        ]
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        kept = ("margin", "s", "m", "whisker", "negatives", "l_margin", "u_margin", "l_a", "u_a", "lambda_g")
        return {
            "backbone": self.backbone_name,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            **self.input_settings(),
            "embedding_dim": self.embedding_dim,
            "dropout": self.dropout,
            **{name: getattr(self.loss, name) for name in kept},
            "flip": self.flip,
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> UNPGModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": UNPGSchedule(**settings["schedule"])})

    def check_settings(self, found: dict[str, Any]) -> None:
        """Refuse a checkpoint of other identities or another kind of input.

        Raises:
            ValueError: names what differs.
        """
        check_label_names(found["class_names"], self.class_names)
        super().check_settings(found)

    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N E"]:
        """What is compared by cosine: the embedding, beside it that of the mirror image."""
        if not self.flip:
            return self.network(images)
        return torch.cat([self.network(images), self.network(images.flip(-1))], dim=1)

    def figures(
        self,
        embeddings: Float[Tensor, "N E"],
        targets: Int[Tensor, "N"],
        gallery: Float[Tensor, "G E"] | None = None,
        gallery_targets: Int[Tensor, "G"] | None = None,
    ) -> Mapping[str, float]:
        """Verification and identification, see :func:`proto_vision.verification.verification_figures`."""
        return verification_figures(embeddings, targets, gallery, gallery_targets)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Margin softmax of raw embeddings; further views of an image are further images of its identity.

        Raises:
            ValueError: a batch of one image.
        """
        batch = batch.stacked()
        if len(batch.target) < 2:
            raise ValueError("batch: found 1 image, needed 2 for batch norm (set --data.drop_last true)")
        loss = self.loss(self.network(batch.image), batch.target)
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum over network and class weights."""
        stage = self.stage or self.stages[0]
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(
            parameters, lr=stage.lr, momentum=self.schedule.momentum, weight_decay=stage.weight_decay
        )
