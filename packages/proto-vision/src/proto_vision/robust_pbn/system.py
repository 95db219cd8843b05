"""Robust prototype-based networks as a system that trains: deep on a backbone, or shallow with a certified radius.

Source: "A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations", AAAI 2025, arXiv 2412.15499.
Differences from the authors' code: one optimiser in each phase; rates are constant, as theirs turn out to be; the best
training image of every component is remembered. The shallow experiments were never released: their training is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from proto_core.checks import check_option
from proto_core.distributed import is_distributed
from proto_core.losses import ProbabilityMarginLoss, RobustnessMarginLoss
from proto_core.prototypes import PrototypeLayer
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.backbones import create_backbone
from proto_vision.classification import ImageClassifier
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.module import ImageDataModule
from proto_vision.decoded import DecodedEvidence, DecodedPrototypes, ExplainsByDistance
from proto_vision.explanation import ExplainsParts, PartEvidence
from proto_vision.feature_bank import training_features
from proto_vision.robust_pbn.cases import ComponentCases
from proto_vision.robust_pbn.certified import CertifiedAccuracy
from proto_vision.robust_pbn.deep import DeepPBN, alignment_loss, tanh_uniformity_loss
from proto_vision.robust_pbn.inputs import VectorInputs
from proto_vision.robust_pbn.shallow import ShallowPBN

__all__ = ["RobustPBNModule", "RobustPBNSchedule"]

_DEEP = ("convnext_tiny", "resnet50")
_PRETRAINING = {"tanh": 5.0}
_BASELINE = {"alignment": 5.0, "tanh": 2.0, "class": 2.0}


@dataclass(frozen=True)
class RobustPBNSchedule:
    """How long and how fast the network trains; defaults are the authors' for CUB and ConvNeXt.

    Args:
        pretrain_epochs: deep: backbone alone, without labels, on two views (0 leaves it out).
        classifier_epochs: deep: classifier alone (0 leaves it out).
        joint_epochs: everything; of the shallow network all epochs.
        lr: of the first and the last phase.
        classifier_lr: of the classifier alone.
        keep: ``"best"`` keeps the last phase's epoch with the best validation accuracy, ``"last"`` its last epoch.
    """

    pretrain_epochs: int = 12
    classifier_epochs: int = 48
    joint_epochs: int = 84
    lr: float = 3.75e-4
    classifier_lr: float = 5e-3
    keep: Literal["best", "last"] = "last"


class RobustPBNModule(ExplainsParts, ExplainsByDistance, ImageClassifier):
    """Image classifier by components that must or must not be there.

    ``network="deep"``: the channels of a backbone's map are components (:class:`DeepPBN`). Three phases: alignment of
    two views without labels, the classifier alone, everything. ``network="shallow"``: components are vectors
    (:class:`ShallowPBN`) in the space of pixel values or of a frozen encoder's features, centred and scaled by one
    number; each decision then has a certified radius, in units of pixel values (0 to 1) or of features.

    Args:
        backbone: deep: ``"convnext_tiny"`` or ``"resnet50"`` as the paper changes them, or any name of
            :func:`proto_vision.backbones.create_backbone`. Shallow: ``"pixels"``, or a name of
            :func:`proto_vision.encoders.create_encoder`, which stays as it is.
        num_classes: C, at least 2; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input; the paper's two backbones see a grey channel three times.
        mean: the data module's, per channel, for pixel values; by default what data modules have by default.
        std: likewise.
        pretrained: ImageNet weights (a download).
        network: ``"deep"`` or ``"shallow"``.
        num_components: K; by default the backbone's channels, shallow two for each class.
        head: deep: ``"cbc"``, or ``"rbf"``, the baseline of positive reasoning alone.
        kernel: shallow: ``"norm"`` or ``"gaussian"``.
        loss: ``"probability"``: margin of probabilities; shallow also ``"robustness"``: margin of the certified radius.
        margin: of the loss; of the radius in the scaled space.
        certified_radii: shallow: testing gives the accuracy certified at each of these.
        schedule: epochs and rates; AdamW without decay, shallow Adam.

    Shapes:
        ``[N, channels, S, S]`` -> as :class:`DeepPBN` or :class:`ShallowPBN`.

    Raises:
        ValueError: an unknown word, fewer than two classes, a negative radius, ``"robustness"`` or a certificate of
            the deep network; in training fewer than two views where a phase compares views.

    Source:
        arXiv 2412.15499.

    Example:
        >>> import torch
        >>> from proto_vision import RobustPBNModule
        >>> net = RobustPBNModule("conv3", 10, image_size=16, in_channels=1, num_components=20)
        >>> maps, detections, probabilities = net(torch.rand(4, 1, 16, 16))
        >>> maps.shape, probabilities.shape
        (torch.Size([4, 20, 4, 4]), torch.Size([4, 10]))
        >>> shallow = RobustPBNModule("pixels", 10, image_size=8, in_channels=1, network="shallow")
        >>> shallow.certify(torch.rand(4, 1, 8, 8), torch.arange(4)).shape
        torch.Size([4])
    """

    measure = "detection"
    larger_is_nearer = True
    about = (
        "A component is detected to a degree between 0 and 1, by the distance of the image to it: 1 where they are the "
        "same. Its weight for a class is positive reasoning (it must be there) less negative reasoning (it must not); "
        "the bias is all negative reasoning. The sum is the class's probability; those of different classes need not "
        "add up to 1. A component stands for the class of its highest weight. No change of the image shorter than the "
        "certified radius (Euclidean, over all pixel values from 0 to 1, or over the features) changes the decision."
    )
    system: ClassVar[str] = "robust_pbn"
    paper: ClassVar[Paper] = RobustnessMarginLoss.paper

    def __init__(
        self,
        backbone: str = "convnext_tiny",
        num_classes: int = 200,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 224,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pretrained: bool = False,
        network: Literal["deep", "shallow"] = "deep",
        num_components: int | None = None,
        head: Literal["cbc", "rbf"] = "cbc",
        kernel: Literal["norm", "gaussian"] = "norm",
        loss: Literal["probability", "robustness"] = "probability",
        margin: float = 0.025,
        certified_radii: Sequence[float] = (0.3, 0.6),
        schedule: RobustPBNSchedule = RobustPBNSchedule(),
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        self.kind = check_option("network", network, "deep", "shallow")
        self.loss_name = check_option("loss", loss, "probability", "robustness")
        check_option("keep", schedule.keep, "best", "last")
        if not all(radius >= 0 for radius in certified_radii):
            raise ValueError(f"certified_radii: found {list(certified_radii)}, needed numbers of 0 or more")
        if network == "deep" and loss == "robustness":
            raise ValueError("loss: found 'robustness', which needs network 'shallow': deep networks have no radius")
        self.backbone_name, self.schedule, self.margin = backbone, schedule, margin
        self.head_name, self.kernel = head, kernel
        self.chosen_components, self.certified_radii = num_components, tuple(certified_radii)
        self.probability_loss, self.robustness_loss = ProbabilityMarginLoss(margin), RobustnessMarginLoss(margin)
        self.network: DeepPBN | ShallowPBN
        if network == "deep":
            self.network = DeepPBN(self.num_classes, self._backbone(pretrained), num_components, head, pretrained)
            self.cases = ComponentCases(self.network.num_components, self.num_classes)
        else:
            self.vectors = VectorInputs(backbone, image_size, in_channels, mean, std, pretrained)
            count = 2 * self.num_classes if num_components is None else num_components
            self.network = ShallowPBN(self.vectors.dim, count, self.num_classes, kernel)
            self.origin = "as it was trained" if self.vectors.encoder is None else "the training image nearest to it"
        self.certified_fold = CertifiedAccuracy(self.certified_radii)
        self.stages = self._stages()
        self.stage: Stage | None = None

    def _backbone(self, pretrained: bool) -> Any:
        """The paper's by their names, others built here."""
        name = self.backbone_name
        if name in _DEEP:
            return name
        sizes: dict[str, Any] = {"in_channels": self.in_channels, "image_size": self.image_size}
        return create_backbone(name, pretrained=pretrained, **sizes)[0]

    def _colours(self, images: Tensor) -> Tensor:
        """The paper's backbones take three channels: a grey one three times."""
        return images.expand(-1, 3, -1, -1) if self.backbone_name in _DEEP else images

    def _stages(self) -> list[Stage]:
        plan = self.schedule
        common: dict[str, Any] = {"patience": None}
        monitor = "val/accuracy" if plan.keep == "best" else None
        if isinstance(self.network, ShallowPBN):
            return [Stage("training", ("network.*",), plan.joint_epochs, plan.lr, monitor=monitor, **common)]
        network = self.network
        classifier = ("network.head.*",) if network.head_kind == "cbc" else ("network.rbf_weight",)
        body = [f"network.{name}" for name in network.trained_backbone()]
        body += ["network.add_on.*"] if list(network.add_on.parameters()) else []
        stages: list[tuple[str, Sequence[str], int, float]] = [
            ("pretrain", body, plan.pretrain_epochs, plan.lr),
            ("classifier", classifier, plan.classifier_epochs, plan.classifier_lr),
            ("joint", (*body, *classifier), plan.joint_epochs, plan.lr),
        ]
        last = max((n for n, stage in enumerate(stages) if stage[2] > 0), default=2)
        found = []
        for n, (name, train, epochs, lr) in enumerate(stages):
            watched = monitor if n == last and name != "pretrain" else None
            ends: dict[str, Any] = {"monitor": watched, "project": n == last, "overwrite": False}
            found.append(Stage(name, tuple(train), epochs, lr, **ends, **common))
        return found

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        pixels = self.vectors.pixels.settings() if self.kind == "shallow" else {}
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            **pixels,
            "network": self.kind,
            "num_components": self.chosen_components,
            "head": self.head_name,
            "kernel": self.kernel,
            "loss": self.loss_name,
            "margin": self.margin,
            "certified_radii": list(self.certified_radii),
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> RobustPBNModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": RobustPBNSchedule(**settings["schedule"])})

    # -- what the network says

    def forward(self, images: Float[Tensor, "N channels S S"]) -> tuple[Tensor, Tensor, Tensor]:
        """What :class:`DeepPBN` says in training, or :class:`ShallowPBN` of the images' vectors."""
        return self.network(self._colours(images) if self.kind == "deep" else self.vectors(images))

    def class_outputs(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N C"]:
        """What decides: the sums over components, of which the largest wins."""
        deep = self.kind == "deep"
        return self.network(self._colours(images), inference=True)[2] if deep else self(images)[0]

    def stated_probabilities(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """The sums themselves; with the RBF head the softmax that its loss sees."""
        logits = logits.cpu().double()
        return logits.square().log1p().softmax(1) if self.head_name == "rbf" else logits.clamp(0, 1)

    def class_logits(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N C"]:
        """Logarithm of the probabilities, whose softmax divides them by their sum over classes."""
        outputs = self.class_outputs(images)
        return outputs.square().log1p() if self.head_name == "rbf" else outputs.clamp_min(1e-12).log()

    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Detections (deep), or the vectors that components are compared with, before they are scaled (shallow)."""
        return self(images)[1] if self.kind == "deep" else self.vectors.raw(images)

    def certify(self, images: Float[Tensor, "N channels S S"], targets: Tensor) -> Float[Tensor, "N"]:
        """Radius within which no change of the vector (of pixel values, or features) turns the decision from targets.

        Args:
            images: as the data module prepares them for testing.
            targets: classes ``[N]``; where the decision is another one the radius is 0.

        Raises:
            ValueError: the network is deep.
        """
        if not isinstance(self.network, ShallowPBN):
            raise ValueError("network: found 'deep', needed 'shallow': deep networks have no certified radius")
        return self.network.certify(self.vectors(images), targets) * self.vectors.scale

    # -- training

    def on_train_start(self) -> None:
        """Shallow: centre and scale the vectors, and make components training samples; once."""
        if isinstance(self.network, ShallowPBN) and not bool(self.vectors.fitted):
            data = getattr(self.trainer, "datamodule", None)
            if not isinstance(data, ImageDataModule):
                raise ValueError(
                    "network: 'shallow' needs a data module of images, whose classes components start from"
                )
            vectors, targets = (part.to(self.device) for part in training_features(self, data))
            self.vectors.fit(vectors)
            self.network.initialise(self.vectors.scaled(vectors), targets)
            if is_distributed():  # each process drew for itself, after the weights were made equal
                dist.broadcast(self.network.components.data, src=0)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The loss of the stage."""
        views = 1 if batch.image.ndim == 4 else batch.image.shape[1]
        stacked = batch.stacked()
        if isinstance(self.network, ShallowPBN):
            terms = {"class": self._margin(self.network, stacked)}
        else:
            terms = self._deep_terms(stacked, views)
        loss = torch.stack(list(terms.values())).sum()
        for name, value in terms.items():
            self.note(f"train/{name}", value.detach(), stacked)
        self.note("train/loss", loss.detach(), stacked, prog_bar=True)
        return loss

    def _margin(self, network: ShallowPBN, batch: ImageBatch) -> Tensor:
        probabilities, detections, _ = network(self.vectors(batch.image))
        if self.loss_name == "probability":
            return self.probability_loss(probabilities, batch.target)
        return self.robustness_loss(detections, network.head.reasoning, network.sigma, batch.target)

    def _deep_terms(self, batch: ImageBatch, views: int) -> dict[str, Tensor]:
        """The weighted terms of the stage."""
        phase = "joint" if self.stage is None else self.stage.name
        baseline = self.head_name == "rbf"
        maps, detections, outputs = self(batch.image)
        terms: dict[str, Tensor] = {}
        if phase == "pretrain" or (baseline and phase == "joint"):
            if views < 2:
                raise ValueError("batch: found one view of each image, needed two (--data.views [NAME])")
            terms["alignment"] = alignment_loss(*maps.chunk(views)[:2])
            terms["tanh"] = tanh_uniformity_loss(*detections.chunk(views)[:2])
        if phase != "pretrain":
            if baseline:
                terms["class"] = F.nll_loss(outputs.square().log1p().log_softmax(1), batch.target)
            else:
                terms["class"] = self.probability_loss(outputs, batch.target)
        if phase == "pretrain":
            reached = (self.current_epoch + 1) / self.schedule.pretrain_epochs
            weights = {**_PRETRAINING, "alignment": min(reached, 1.0)}
        else:
            weights = _BASELINE if phase == "joint" and baseline else {}
        return {name: weights.get(name, 1.0) * value for name, value in terms.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, after which the RBF head's weights fall a little, except while the backbone trains alone."""
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.network, DeepPBN) and (self.stage is None or self.stage.name != "pretrain"):
            self.network.shrink_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay over what the stage trains; Adam for the shallow network."""
        stage = self.stage or self.stages[-1]
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if self.kind == "shallow":
            return torch.optim.Adam(trained, lr=stage.lr)
        return torch.optim.AdamW(trained, lr=stage.lr, weight_decay=0.0)

    # -- evaluation

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the scores of the test fold and, shallow, the certified radii."""
        super().test_step(batch, batch_idx)
        if self.kind == "shallow":
            radius = self.certify(batch.image, batch.target)
            self.certified_fold.update(radius, batch.target, batch.index)

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold, with the certified accuracies and the mean radius."""
        super().on_test_epoch_end()
        if self.kind == "shallow":
            found = self.certified_fold.compute()
            self.certified_fold.reset()
            self.test_results["summary"] |= found
            for name, value in found.items():
                self.log(f"test/{name}", value)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """As every classifier's, the probabilities as they are (see :meth:`stated_probabilities`); shallow the radius.

        The ``radius`` ``[N]`` is that within which no change turns the decision into another.
        """
        outputs = self.class_outputs(batch.image)
        chosen = outputs.argmax(1)
        found = {
            "index": batch.index,
            "probabilities": self.stated_probabilities(outputs).to(outputs),
            "decisions": F.one_hot(chosen, self.num_classes).bool(),
        }
        return found | ({"radius": self.certify(batch.image, chosen)} if self.kind == "shallow" else {})

    # -- cases and explanations

    def prototype_layers(self) -> dict[str, PrototypeLayer]:
        """Where the cases of the components are kept; the shallow network has none."""
        return {"components": self.cases} if self.kind == "deep" else {}

    def prototype_features(self, batch: ImageBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Component maps and one-hot targets."""
        return {"components": (self(batch.image)[0], F.one_hot(batch.target, self.num_classes))}

    def part_evidence(self, images: Float[Tensor, "N channels S S"]) -> tuple[Float[Tensor, "N C"], list[PartEvidence]]:
        """Deep: probabilities, and what they are sums of.

        Raises:
            ValueError: the network is shallow and has no parts.
        """
        if not isinstance(self.network, DeepPBN):
            raise ValueError("network: found 'shallow', whose components are whole images; needed 'deep' for parts")
        maps, detections, outputs = self.network(self._colours(images), inference=True)
        weight, bias = self.network.evidence_weights()
        speaks = F.one_hot(weight.argmax(0), self.num_classes)
        return outputs, [PartEvidence("components", self.cases, detections, maps, weight, bias, speaks)]

    def explain(self, images: Tensor, sample_ids: Sequence[str], labels: Sequence[str] | None = None) -> Any:
        """See :meth:`ExplainsParts.explain` (deep) and :meth:`ExplainsByDistance.explain` (shallow)."""
        way = ExplainsParts if self.kind == "deep" else ExplainsByDistance
        return way.explain(self, images, sample_ids, labels)

    def explain_images(
        self,
        data: ImageDataModule,
        images: Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        top: int = 3,
        source: str = "",
    ) -> str:
        """See :class:`proto_vision.explanation.ExplainsImages`."""
        way = ExplainsParts if self.kind == "deep" else ExplainsByDistance
        return way.explain_images(self, data, images, labels=labels, top=top, source=source)

    def decoded_evidence(
        self, images: Float[Tensor, "N channels S S"], data: ImageDataModule | None
    ) -> DecodedEvidence:
        """Shallow: probabilities, detections, and the certified radius."""
        network = cast(ShallowPBN, self.network)
        probabilities, detections, _ = self(images)
        radius = self.certify(images, probabilities.argmax(1)).tolist()
        unit = "pixel values" if self.vectors.encoder is None else "features"
        facts = [{"Certified radius": f"{value:.3f} of {unit}"} for value in radius]
        positive, negative = network.head.reasoning
        stated = self.stated_probabilities(probabilities)
        return DecodedEvidence(
            probabilities, stated, detections, (positive - negative).T, None, facts, negative.sum(dim=0)
        )

    def decoded_prototypes(self, data: ImageDataModule | None = None) -> DecodedPrototypes:
        """Shallow: components as images, or the training images nearest to them.

        Raises:
            ValueError: components are features, and there is no data to look for images in.
        """
        network = cast(ShallowPBN, self.network)
        if self.vectors.encoder is None:
            return DecodedPrototypes(self.vectors.drawn(network.components))
        if data is None:
            raise ValueError("data: found none, needed the training images that components are nearest to")
        vectors, _ = training_features(self, data)
        scaled = self.vectors.scaled(vectors.to(self.device))
        nearest = data.rows("train")[network(scaled)[2].argmin(0).cpu().numpy()]
        images = torch.stack([data.model_input(data.record_ids[int(row)]) for row in nearest])
        return DecodedPrototypes(self.vectors.pixels(images.to(self.device)))
