"""SuSana Distancia as a system that trains: a prototypical network on episodes, with any of five losses.

Source: "SuSana Distancia is all you need", 2023, arXiv 2305.09062. Differences from the authors' code: a query is never
a support of its episode; terms are named, not found in a string; training accuracy decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from proto_core.checks import check_option
from proto_core.losses import ICNNLoss, ProtoTripletLoss
from proto_core.precision import full_precision
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbone_weights import load_backbone
from proto_vision.backbones import create_backbone
from proto_vision.data.batches import Episode
from proto_vision.data.dataset import ImageBatch
from proto_vision.embedding import EmbeddingModule
from proto_vision.few_shot.network import PrototypicalNetwork, confidence_interval

__all__ = ["TERMS", "FewShotModule", "FewShotSchedule"]

TERMS = ("cross", "prototriplet", "fullicnn", "suppicnn", "queryicnn", "protoicnn")
"""Names of the losses that can be summed, see :class:`FewShotModule`."""


def _checked(batch: Episode | ImageBatch) -> Episode:
    if not isinstance(batch, Episode):
        raise ValueError("batch: found no episode, needed data with sampling: proto_vision.data.batches.Episodes")
    return batch


class EpisodeAccuracies(Metric):
    """Accuracy of each episode, over batches and ranks (torchmetrics)."""

    full_state_update = False
    accuracies: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("accuracies", [], dist_reduce_fx="cat")

    def update(self, logits: Float[Tensor, "Q W"], labels: Int[Tensor, "Q"]) -> None:
        """Add an episode."""
        self.accuracies.append((logits.argmax(1) == labels).float().mean()[None])

    def compute(self) -> Float[Tensor, "episodes"]:
        """All episodes' accuracies."""
        return dim_zero_cat(self.accuracies)


@dataclass(frozen=True)
class FewShotSchedule:
    """How long and how fast it trains; defaults are the authors' for ConvNet-4.

    Args:
        epochs: how many.
        lr: learning rate.
        optimizer: ``"adam"``, or ``"sgd"`` (Nesterov momentum 0.9; the authors' for ResNet-12).
        weight_decay: of SGD.
        halve_every: epochs after which the rate is halved, again and again.
        keep: ``"best"`` keeps the epoch with the best validation accuracy, ``"last"`` the last.
    """

    epochs: int = 200
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 5e-4
    halve_every: int = 20
    keep: Literal["best", "last"] = "best"


class FewShotModule(EmbeddingModule):
    """Learns from episodes to classify images of classes that it never saw, by a few supports of each.

    The loss is the mean of the chosen terms:

    - ``cross``: cross-entropy of the queries' logits;
    - ``prototriplet``: :class:`~proto_core.losses.ProtoTripletLoss` of queries and prototypes;
    - ``fullicnn``: :class:`~proto_core.losses.ICNNLoss` of supports and queries together;
    - ``suppicnn``: of the supports alone;
    - ``queryicnn``: of queries among supports; ``protoicnn``: of queries among prototypes.

    Args:
        backbone: ``"convnet4"``, ``"resnet12"`` or any other, see :func:`proto_vision.backbones.create_backbone`; its
            map is averaged.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: ImageNet weights for the backbone (a download).
        backbone_weights: checkpoint of a classifier with this backbone to start from, as the authors do with ResNet-12.
        terms: names of the losses.
        temperature: T of the logits.
        margin: of the proto-triplet loss.
        k: neighbours of the ICNN losses.
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> embeddings ``[N, D]``.

    Raises:
        ValueError: no term, an unknown one or one twice, an unknown backbone; in training: batches
            that are no episodes.

    Source:
        arXiv 2305.09062, the authors' scripts.

    Example:
        >>> import torch
        >>> from proto_vision import FewShotModule
        >>> net = FewShotModule("convnet4", image_size=28, in_channels=1)
        >>> net.network(torch.rand(6, 1, 28, 28), torch.tensor([0, 0, 1, 1, 2, 2]), torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 3])
    """

    system: ClassVar[str] = "susana"
    paper: ClassVar[Paper] = ProtoTripletLoss.paper

    def __init__(
        self,
        backbone: str = "convnet4",
        *,
        image_size: int = 84,
        in_channels: int = 3,
        pretrained: bool = False,
        backbone_weights: str | None = None,
        terms: Sequence[str] = ("cross", "prototriplet", "fullicnn"),
        temperature: float = 1.0,
        margin: float = 0.5,
        k: int = 4,
        schedule: FewShotSchedule = FewShotSchedule(),
    ) -> None:
        super().__init__(image_size, in_channels)
        for term in terms:
            check_option("terms", term, *TERMS)
        if not terms or len(set(terms)) < len(terms):
            raise ValueError(f"terms: found {list(terms)}, needed one at least and none twice")
        self.backbone_name, self.terms, self.schedule = backbone, tuple(terms), schedule
        encoder, _ = create_backbone(backbone, in_channels=in_channels, pretrained=pretrained, image_size=image_size)
        if backbone_weights is not None:
            load_backbone(encoder, backbone_weights)
        self.network = PrototypicalNetwork(encoder, temperature)
        self.triplet, self.icnn = ProtoTripletLoss(margin), ICNNLoss(k)
        self.val_accuracies, self.test_accuracies = EpisodeAccuracies(), EpisodeAccuracies()
        halvings = range(schedule.halve_every, schedule.epochs, schedule.halve_every)
        self.stages = [
            Stage(
                "episodes",
                ("*",),
                schedule.epochs,
                schedule.lr,
                schedule.weight_decay if schedule.optimizer == "sgd" else 0.0,
                scheduler="steps",
                milestones=tuple(halvings),
                gamma=0.5,
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
            "terms": list(self.terms),
            "temperature": self.network.temperature,
            "margin": self.triplet.margin,
            "k": self.icnn.k,
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> FewShotModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": FewShotSchedule(**settings["schedule"])})

    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Embeddings, not normalised."""
        return self.network.embed(images)

    def answers(self, episode: Episode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings of supports and queries, prototypes in the episode's order of classes, logits of the queries."""
        embeddings = full_precision(self.embed(episode.image))
        supports, queries = embeddings.tensor_split([episode.way * episode.shot])
        prototypes = supports.unflatten(0, (episode.way, episode.shot)).mean(1)
        return supports, queries, prototypes, self.network.classify(queries, prototypes)

    def loss_terms(self, episode: Episode) -> dict[str, Tensor]:
        """The chosen terms of an episode."""
        supports, queries, prototypes, logits = self.answers(episode)
        of_supports, of_queries = episode.labels()
        classes = torch.arange(episode.way, device=queries.device)
        both, of_both = torch.cat([supports, queries]), torch.cat([of_supports, of_queries])
        compute = {
            "cross": lambda: F.cross_entropy(logits, of_queries),
            "prototriplet": lambda: self.triplet(queries, of_queries, prototypes),
            "fullicnn": lambda: self.icnn(both, of_both, instances_per_class=episode.shot + episode.query),
            "suppicnn": lambda: self.icnn(supports, of_supports),
            "queryicnn": lambda: self.icnn(queries, of_queries, supports, of_supports),
            "protoicnn": lambda: self.icnn(queries, of_queries, prototypes, classes),
        }
        return {name: compute[name]() for name in self.terms}

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The mean of the terms."""
        episode = _checked(batch)
        loss = torch.stack(list(self.loss_terms(episode).values())).mean()
        self.note("train/loss", loss.detach(), episode, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, or SGD with Nesterov momentum."""
        stage = self.stage or self.stages[-1]
        if self.schedule.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=stage.lr)
        return torch.optim.SGD(
            self.parameters(), lr=stage.lr, momentum=0.9, nesterov=True, weight_decay=stage.weight_decay
        )

    # -- evaluation by episodes

    def validation_step(self, batch: Episode | ImageBatch, batch_idx: int) -> None:
        """Accuracy of an episode."""
        episode = _checked(batch)
        self.val_accuracies.update(self.answers(episode)[3], episode.labels()[1])

    def on_validation_epoch_end(self) -> None:
        """Mean accuracy and half-width of its 95 % confidence interval."""
        for name, value in zip(("accuracy", "half_width"), confidence_interval(self.val_accuracies.compute())):
            self.log(f"val/{name}", value, prog_bar=name == "accuracy")
        self.val_accuracies.reset()

    def test_step(self, batch: Episode | ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy of an episode."""
        episode = _checked(batch)
        self.test_shape = episode.way, episode.shot
        self.test_accuracies.update(self.answers(episode)[3], episode.labels()[1])

    def on_test_epoch_end(self) -> None:
        """Mean accuracy with its 95 % confidence interval, kept in ``test_results`` and logged."""
        accuracies = self.test_accuracies.compute()
        mean, half_width = confidence_interval(accuracies)
        way, shot = self.test_shape
        row = {"episodes": f"{way}-way {shot}-shot", "count": len(accuracies), "accuracy": mean, "+-": half_width}
        summary = {"accuracy": mean, "half_width": half_width}
        self.test_results = {"summary": summary, "labels": [row], "records": len(accuracies)}
        for name, value in summary.items():
            self.log(f"test/{name}", value)
        self.test_accuracies.reset()
