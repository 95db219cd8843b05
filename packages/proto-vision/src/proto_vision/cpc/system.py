"""CPC as a system that trains: two networks with a cleaner each, every one taught on what the other's finds clean.

The cleaner is a RECONSTRUCTION from the abstract of "Class Prototype-based Cleaner for Label Noise Learning" (arXiv
2212.10766, withdrawn from ICLR 2023; no code, no full text to be had); figures of the paper are not to be expected.
Its host is DivideMix (arXiv 2002.07394). Differences from DivideMix's code: both networks take a step on each batch,
which is parted into clean and doubtful images, where theirs draws 64 of each and trains one network after the other;
labels are guessed in evaluation mode; any number of views; losses are kept by the image's row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.distributed import all_reduce_sum, is_distributed
from proto_core.metrics import auroc
from proto_core.modes import evaluation_mode
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.classification import ImageClassifier
from proto_vision.cpc.cleaner import ClassPrototypeCleaner
from proto_vision.cpc.dividemix import (
    SemiLoss,
    gmm_clean_probability,
    guess_labels,
    mix_up,
    negative_entropy,
    refine_labels,
    uniform_prior_penalty,
)
from proto_vision.cpc.network import CPCNetwork
from proto_vision.cpc.schedule import CPCSchedule
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.module import ImageDataModule
from proto_vision.label_cleaning import plain_batches

__all__ = ["CPCModule", "CPCOutput"]

PAIR = (0, 1)
_SCHEDULE = CPCSchedule()


class CPCOutput(NamedTuple):
    """What the networks say about a batch.

    Attributes:
        logits: ``[N, K]`` sum of both networks' logits.
        features: ``[N, 2, D]`` what each network's last layer sees.
    """

    logits: Tensor
    features: Tensor


class _Division(NamedTuple):
    """What is known about the training labels in an epoch, by row of the data set's table.

    Attributes:
        mixture: ``[2, rows]`` probability w that a label is right, by each network's losses.
        clean: ``[2, rows]`` probability p that it is right, by each network's cleaner.
        divides: whether each network's cleaner leaves labels on both sides of its threshold.
    """

    mixture: Tensor
    clean: Tensor
    divides: tuple[bool, bool]


class CPCModule(ImageClassifier):
    """Image classifier for noisy labels, which also says which labels look wrong.

    After a warm-up on all labels each epoch begins with a look at all training images: a mixture on each network's
    losses says how likely a label is right (w), class prototypes learn it from the features (p). A network then keeps
    the labels that the *other* network's cleaner trusts, and guesses those of the other images (DivideMix). Two weakly
    augmented views are DivideMix's (``--data.augment shift --data.views [shift]``); one works.

    Args:
        backbone: of each network, see :func:`proto_vision.encoders.create_encoder`.
        num_classes: K; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        pretrained: weights for the backbone (a download).
        temperature: of the cleaner's cosines.
        threshold: probability above which the cleaner trusts a label.
        balanced: whether classes count alike in the cleaner's loss.
        cleaner: weight of the cleaner's loss.
        sharpening: temperature T of refined and guessed labels.
        alpha: of the mixing.
        lambda_u: largest weight of the images whose labels are guessed.
        rampup_length: epochs until it is reached.
        asymmetric: whether the warm-up has a penalty against over-confidence, as for asymmetric noise.
        history: epochs whose losses the mixture sees the mean of (DivideMix takes 5 where 90 % are noise).
        schedule: epochs and rates.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`CPCOutput`.

    Raises:
        ValueError: an unknown backbone, settings out of range.

    Source:
        arXiv 2002.07394, algorithm 1; the cleaner: a reconstruction from the abstract of arXiv 2212.10766.

    Example:
        >>> import torch
        >>> from proto_vision import CPCModule
        >>> out = CPCModule("conv3", 4, image_size=8, in_channels=1)(torch.rand(2, 1, 8, 8))
        >>> out.logits.shape, out.features.shape
        (torch.Size([2, 4]), torch.Size([2, 2, 128]))
    """

    system: ClassVar[str] = "cpc"
    paper: ClassVar[Paper] = Paper(
        title="CPC: Class Prototype-based Cleaner for Label Noise Learning",
        year=2022,
        arxiv="2212.10766",
        code=None,
        evidence="reconstruction",
        summary="Class prototypes tell right labels from wrong ones, beside DivideMix; lists the suspicious labels.",
        claim="Once labels are memorised, class prototypes find wrong ones better than a mixture on losses alone.",
    )

    def __init__(
        self,
        backbone: str = "cifar_resnet18",
        num_classes: int = 10,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 32,
        in_channels: int = 3,
        pretrained: bool = False,
        temperature: float = 0.1,
        threshold: float = 0.5,
        balanced: bool = True,
        cleaner: float = 1.0,
        sharpening: float = 0.5,
        alpha: float = 4.0,
        lambda_u: float = 25.0,
        rampup_length: float = 16,
        asymmetric: bool = False,
        history: int = 1,
        schedule: CPCSchedule = _SCHEDULE,
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        for name, value in (("sharpening", sharpening), ("alpha", alpha), ("history", history)):
            if value <= 0:
                raise ValueError(f"{name}: found {value}, needed a positive number")
        if cleaner < 0:
            raise ValueError(f"cleaner: found {cleaner}, needed a weight of 0 or more")
        self.automatic_optimization = False
        self.backbone_name, self.schedule = backbone, schedule
        self.cleaner, self.sharpening, self.alpha = cleaner, sharpening, alpha
        self.asymmetric, self.history = asymmetric, history
        size: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "pretrained": pretrained}
        networks = [CPCNetwork(backbone, self.num_classes, **size) for _ in PAIR]
        self.networks: Any = nn.ModuleList(networks)
        dim = networks[0].dim
        options: dict[str, Any] = {"temperature": temperature, "threshold": threshold, "balanced": balanced}
        self.cleaners: Any = nn.ModuleList(ClassPrototypeCleaner(dim, self.num_classes, **options) for _ in PAIR)
        self.semi = SemiLoss(lambda_u, rampup_length)
        self.fitted: Tensor
        self.begun: Tensor
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("begun", torch.tensor(0))
        common: dict[str, Any] = {
            "lr": schedule.lr,
            "weight_decay": schedule.weight_decay,
            "scheduler": "steps",
            "gamma": schedule.gamma,
            "monitor": "val/accuracy" if schedule.keep == "best" else None,
            "patience": None,
        }
        first, later = schedule.warmup_epochs, tuple(m - schedule.warmup_epochs for m in schedule.milestones)
        self.stages = [
            Stage("warmup", ("networks.*",), first, milestones=tuple(schedule.milestones), **common),
            Stage("clean", ("*",), schedule.epochs - first, milestones=later, **common),
        ]
        self.stage: Stage | None = None
        self.division: _Division | None = None
        self.past: list[Tensor] = []
        self.epoch = 0.0

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the networks."""
        own = self.cleaners[0]
        return {
            "backbone": self.backbone_name,
            **self.input_settings(),
            "temperature": own.temperature,
            "threshold": own.threshold,
            "balanced": own.balanced,
            "cleaner": self.cleaner,
            "sharpening": self.sharpening,
            "alpha": self.alpha,
            "lambda_u": self.semi.lambda_u,
            "rampup_length": self.semi.rampup_length,
            "asymmetric": self.asymmetric,
            "history": self.history,
            "schedule": asdict(self.schedule) | {"milestones": list(self.schedule.milestones)},
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> CPCModule:
        """Build an untrained system from :meth:`settings`."""
        return cls(**settings | {"schedule": CPCSchedule(**settings["schedule"])})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings, and the losses of the last epochs where the mixture sees their mean."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["cpc_losses"] = [losses.cpu() for losses in self.past]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare settings, take the losses of the last epochs back."""
        super().on_load_checkpoint(checkpoint)
        self.past = list(checkpoint.get("cpc_losses", []))

    def forward(self, images: Float[Tensor, "N channels S S"]) -> CPCOutput:
        """Logits of both networks together, and the features of each."""
        logits, features = zip(*(network(images) for network in self.networks))
        return CPCOutput(logits[0] + logits[1], torch.stack(features, 1))

    @torch.no_grad()
    def judge_labels(
        self, images: Float[Tensor, "N channels S S"], labels: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """How suspicious labels are, 1 minus the mean of both cleaners' p, and the label that the networks would give.

        Args:
            images: as they are in testing.
            labels: given labels.

        Raises:
            ValueError: the cleaners have not trained yet.
        """
        if not bool(self.fitted):
            raise ValueError("checkpoint: its cleaners have not trained, needed one of the stage 'clean'")
        out = self(images)
        trust = [cleaner.clean_probability(out.features[:, k], labels) for k, cleaner in enumerate(self.cleaners)]
        return 1 - torch.stack(trust).mean(0), out.logits.argmax(1)

    # -- which labels are right

    @property
    def cleaning(self) -> bool:
        """Whether labels are doubted, not only learnt."""
        return self.stage is not None and self.stage.name == "clean"

    def on_train_epoch_start(self) -> None:
        """Divide the training labels into right and doubtful ones (the E-step)."""
        if not self.cleaning:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ValueError("stage 'clean': needs a data module of images, whose training labels it looks at")
        self.division = self.divide(data)
        self.epoch = float(self.schedule.warmup_epochs + int(self.begun))
        self.begun += 1
        self._note_division(data, self.division)

    @torch.no_grad()
    def divide(self, data: ImageDataModule) -> _Division:
        """How likely the labels of all training images are right, by losses and by features.

        Args:
            data: whose training images are looked at once, un-augmented; ranks share the work.
        """
        rows = data.rows("train")
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        count, dim = len(data.record_ids), int(self.cleaners[0].prototypes.shape[1])
        losses = torch.zeros(2, count, device=self.device)
        clean = torch.zeros(2, count, device=self.device)
        features = None if bool(self.fitted) else torch.zeros(2, count, dim, device=self.device)
        with evaluation_mode(self):
            for batch in plain_batches(data, rows[rank::world], "training labels", shown=rank == 0):
                images, labels, index = (part.to(self.device) for part in batch[:3])
                for k in PAIR:
                    logits, found = self.networks[k](images.to(self.cleaners[k].prototypes.dtype))
                    losses[k, index] = F.cross_entropy(logits.float(), labels, reduction="none")
                    if features is None:
                        clean[k, index] = self.cleaners[k].clean_probability(found, labels).float()
                    else:
                        features[k, index] = found.float()
        train = torch.from_numpy(rows).to(self.device)
        mixture = self._mixture(all_reduce_sum(losses), train)
        if features is None:
            clean = all_reduce_sum(clean)
        else:
            labels = data.targets.to(self.device)[train]
            for k, known in enumerate(all_reduce_sum(features)[:, train]):
                clean[k, train] = self._begin_cleaner(k, known, labels, mixture[k, train])
            self.fitted.fill_(True)
        kept = (clean[:, train] > self.cleaners[0].threshold).sum(1).tolist()
        return _Division(mixture, clean, (0 < kept[0] < len(rows), 0 < kept[1] < len(rows)))

    def _mixture(self, losses: Float[Tensor, "2 rows"], train: Int[Tensor, "n"]) -> Float[Tensor, "2 rows"]:
        """w of the training rows, from the mean of the last epochs' losses."""
        some = losses[:, train]
        low, high = some.amin(1, keepdim=True), some.amax(1, keepdim=True)
        self.past = [*self.past, (some - low) / (high - low).clamp_min(1e-12)][-self.history :]
        mean = torch.stack([past.to(some) for past in self.past]).mean(0)
        mixture = torch.zeros_like(losses)
        for k in PAIR:
            mixture[k, train] = gmm_clean_probability(mean[k]).to(mixture)
        return mixture

    def _begin_cleaner(self, k: int, features: Tensor, labels: Tensor, mixture: Tensor) -> Float[Tensor, "n"]:
        """The first passes of a cleaner over all features, the same on every rank; p afterwards."""
        cleaner = copy.deepcopy(self.cleaners[k]).requires_grad_(True)  # the copy has none of DDP's hooks
        options: dict[str, Any] = {"epochs": self.schedule.cleaner_epochs, "lr": self.schedule.cleaner_lr}
        cleaner.fit(features, labels, mixture, generator=torch.Generator().manual_seed(k), **options)
        self.cleaners[k].load_state_dict(cleaner.state_dict())
        return cleaner.clean_probability(features, labels).float()

    def _note_division(self, data: ImageDataModule, division: _Division) -> None:
        """Log the share of trusted labels, and, where the right ones are known, how well wrong ones are found."""
        rows = data.rows("train")
        mixture, clean = (part[:, rows].mean(0).cpu().numpy() for part in division[:2])
        self.log("train/trusted", float((division.clean[:, rows] > self.cleaners[0].threshold).float().mean()))
        if data.table.true_targets is not None:
            right = (data.table.targets == data.table.true_targets)[rows]
            if 0 < right.sum() < len(right):
                self.log("train/auroc_prototypes", auroc(clean[right], clean[~right]))
                self.log("train/auroc_losses", auroc(mixture[right], mixture[~right]))

    # -- training

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One step of both networks."""
        views = batch.image if batch.image.ndim == 5 else batch.image.unsqueeze(1)
        if self.cleaning:
            terms = self.clean_terms(views, batch, batch_idx)
        else:
            terms = self.warmup_terms(views[:, 0], batch.target)
        loss = torch.stack([torch.stack(list(own.values())).sum() for own in terms]).sum()
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        for name in terms[0]:
            if all(name in own for own in terms):
                self.note(f"train/{name}", sum(own[name].detach() for own in terms) / 2, batch)  # type: ignore[arg-type]
        return loss.detach()

    def warmup_terms(
        self, images: Float[Tensor, "N channels S S"], labels: Int[Tensor, "N"], only: Sequence[int] = PAIR
    ) -> list[dict[str, Tensor]]:
        """Terms of the loss on all labels as given, for each network named."""
        found = []
        for k in only:
            logits = self.networks[k](images)[0]
            terms = {"class": F.cross_entropy(logits.float(), labels)}
            if self.asymmetric:
                terms["confidence"] = negative_entropy(logits)
            found.append(terms)
        return found

    def clean_terms(
        self, views: Float[Tensor, "N V channels S S"], batch: ImageBatch, batch_idx: int
    ) -> list[dict[str, Tensor]]:
        """Terms of the loss of each network, weighted: labelled, guessed, prior, cleaner.

        A network whose division has only one side learns all labels as given in this epoch.
        """
        assert self.division is not None
        epoch = self.epoch + batch_idx / max(int(self.trainer.num_training_batches), 1)
        every = views.transpose(0, 1)
        with torch.no_grad(), evaluation_mode(self.networks):
            flat = every.flatten(0, 1)
            answers = torch.stack([network(flat)[0].unflatten(0, every.shape[:2]) for network in self.networks])
        guessed = guess_labels(answers.flatten(0, 1), temperature=self.sharpening)
        found = []
        for k in PAIR:
            if self.division.divides[1 - k]:
                trust = self.division.clean[1 - k, batch.index]
                terms = self._divided_terms(k, every, batch.target, trust, answers[k], guessed, epoch)
            else:
                (terms,) = self.warmup_terms(every[0], batch.target, (k,))
            features = self.networks[k](every[0])[1]
            cleaner: Any = self.cleaners[k]
            believed = self.division.mixture[k, batch.index]
            terms["cleaner"] = self.cleaner * cleaner.loss(features, batch.target, believed)
            found.append(terms)
        return found

    def _divided_terms(
        self,
        k: int,
        every: Float[Tensor, "V N channels S S"],
        labels: Int[Tensor, "N"],
        trust: Float[Tensor, "N"],
        answers: Float[Tensor, "V N K"],
        guessed: Float[Tensor, "N K"],
        epoch: float,
    ) -> dict[str, Tensor]:
        """DivideMix's loss of one network on a batch."""
        refined = refine_labels(labels, trust, answers, temperature=self.sharpening)
        clean = trust > self.cleaners[k].threshold
        targets = torch.where(clean[:, None], refined, guessed).repeat(len(every), 1)
        inputs, targets = mix_up(every.flatten(0, 1), targets, self.alpha)
        logits, clean = self.networks[k](inputs)[0], clean.repeat(len(every))
        labelled, unlabelled, weight = self.semi(
            logits[clean], targets[clean], logits[~clean], targets[~clean], epoch, self.schedule.warmup_epochs
        )
        return {"labelled": labelled, "guessed": weight * unlabelled, "prior": uniform_prior_penalty(logits)}

    def configure_optimizers(self) -> Any:
        """SGD with momentum, one for each network and its cleaner."""
        stage = self.stage or self.stages[-1]
        found = []
        for network, cleaner in zip(self.networks, self.cleaners):
            trained = [p for part in (network, cleaner) for p in part.parameters() if p.requires_grad]
            found.append(
                torch.optim.SGD(trained, lr=stage.lr, momentum=self.schedule.momentum, weight_decay=stage.weight_decay)
            )
        return found
