"""Prob-PSENN as a system that trains: the autoencoder alone, then Gaussians fitted to its codes, then everything.

Source: "Uncertainty-Aware Explanations Through Probabilistic Self-Explainable Neural Networks", 2024, arXiv 2403.13740.
Differences from the authors' code: evaluation uses the same samples of the prototypes for every batch, so that it can
be repeated; the diagonal start stores standard deviations, not variances; images are enlarged before normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from proto_core.checks import check_option, check_positive
from proto_core.metrics import aleatoric_uncertainty, auroc, epistemic_uncertainty, predictive_entropy
from proto_core.metrics.fold import FoldScores
from proto_core.modes import evaluation_mode
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.classification import ImageClassifier
from proto_vision.data.dataset import ImageBatch, ImageDataset
from proto_vision.data.module import ImageDataModule
from proto_vision.decoded import DecodedEvidence, DecodedPrototypes, ExplainsByDistance
from proto_vision.pixels import Pixels
from proto_vision.prob_psenn.network import (
    ProbPSENN,
    ProbPSENNLoss,
    ProbPSENNOutput,
    VariationalProbPSENN,
    cnn32_autoencoder,
    latent_divergence,
)
from proto_vision.prob_psenn.uncertainty import explanatory_epistemic_uncertainty, overlap_index

__all__ = ["PSENNSchedule", "ProbPSENNModule"]

_UNCERTAINTIES = {
    "predictive_entropy": predictive_entropy,
    "aleatoric": aleatoric_uncertainty,
    "epistemic": epistemic_uncertainty,
}
_SHOWN = 8


@dataclass(frozen=True)
class PSENNSchedule:
    """How long and how fast Prob-PSENN trains; the numbers of epochs are ours, the paper's are not established.

    Args:
        autoencoder_epochs: encoder and decoder alone (0 leaves it out).
        joint_epochs: everything.
        lr: of Adam.
        start: ``"fitted"``: the joint stage begins with the mean and covariance of each class's codes; ``"random"``:
            with prototypes as they were drawn.
        keep: ``"best"`` keeps the joint epoch with the best validation accuracy, ``"last"`` the last one.
    """

    autoencoder_epochs: int = 20
    joint_epochs: int = 60
    lr: float = 1e-3
    start: Literal["fitted", "random"] = "fitted"
    keep: Literal["best", "last"] = "best"


class ProbPSENNModule(ExplainsByDistance, ImageClassifier):
    """Image classifier whose classes are distributions of prototypes, with uncertainties of answer and explanation.

    The autoencoder is :func:`cnn32_autoencoder`: images of 32 x 32 pixels. Its pixels lie in [-1, 1]; the data
    module's normalisation is undone first.

    Args:
        num_classes: C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: 32.
        in_channels: of the input.
        mean: the data module's, per channel; by default what data modules have by default.
        std: likewise.
        dim: D of the latent space.
        widths: see :func:`cnn32_autoencoder`.
        covariance: ``"full"`` or ``"diag"``.
        num_samples: S in training.
        eval_samples: S in evaluation.
        prior_std: see :class:`~proto_core.prototypes.GaussianPrototypes`.
        lambda_nll: see :class:`ProbPSENNLoss`, as the other three.
        lambda_reconstruction: of the mean over pixels.
        lambda_prototype: of R1.
        lambda_data: of R2.
        variational: whether images are random in the latent space too, see :class:`VariationalProbPSENN`.
        lambda_divergence: of the divergence of their latents from N(0, I), where they are.
        schedule: epochs and rate.

    Shapes:
        ``[N, channels, 32, 32]`` -> :class:`ProbPSENNOutput`, with new samples for each call.

    Raises:
        ValueError: another image size, a size below 1, an unknown word; a training batch of one image.

    Source:
        arXiv 2403.13740.

    Example:
        >>> import torch
        >>> from proto_vision import ProbPSENNModule
        >>> net = ProbPSENNModule(10, dim=8, widths=(4, 4, 8, 16))
        >>> net.class_logits(torch.rand(4, 1, 32, 32)).shape
        torch.Size([4, 10])
    """

    measure = "mean distance"
    remark = (
        "Prototypes are distributions: their picture is that of the mean, distances are averages over samples, and the "
        "logits are averages likewise, while a probability is the average of the samples' probabilities. The overlap "
        "says how much the distances to two classes' prototypes are alike (0 to 1); the share of nearer training "
        "images says how far off the image is from what is known of the nearest class (1: farther than all of them)."
    )
    system: ClassVar[str] = "prob_psenn"
    paper: ClassVar[Paper] = Paper(
        title="Uncertainty-Aware Explanations Through Probabilistic Self-Explainable Neural Networks",
        year=2024,
        arxiv="2403.13740",
        code="vadel/Prob-PSENN",
        evidence="code",
        summary="Classes as Gaussian prototypes that a decoder draws; uncertainty of answer and explanation.",
        claim="Random prototypes cost no accuracy, and their uncertainties find inputs of unknown classes.",
    )
    eval_noise: Tensor
    fitted: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 32,
        in_channels: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dim: int = 40,
        widths: Sequence[int] = (32, 32, 64, 256),
        covariance: Literal["full", "diag"] = "full",
        num_samples: int = 10,
        eval_samples: int = 100,
        prior_std: float = 1.0,
        lambda_nll: float = 1.0,
        lambda_reconstruction: float = 10.0,
        lambda_prototype: float = 0.0,
        lambda_data: float = 0.05,
        variational: bool = False,
        lambda_divergence: float = 0.05,
        schedule: PSENNSchedule = PSENNSchedule(),
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        if image_size != 32:
            raise ValueError(f"image_size: found {image_size}, needed 32 (--data.image_size 32)")
        check_positive(eval_samples=eval_samples)
        check_option("start", schedule.start, "fitted", "random")
        check_option("keep", schedule.keep, "best", "last")
        self.schedule, self.widths, self.eval_samples = schedule, tuple(widths), eval_samples
        self.pixels = Pixels(in_channels, mean, std)
        if not lambda_divergence >= 0:
            raise ValueError(f"lambda_divergence: found {lambda_divergence}, needed at least 0")
        self.lambda_divergence = lambda_divergence
        encoder, decoder = cnn32_autoencoder(in_channels, dim, widths, variational)
        kind = VariationalProbPSENN if variational else ProbPSENN
        self.network = kind(encoder, decoder, self.num_classes, dim, covariance, num_samples, prior_std)
        weights = (lambda_nll, lambda_reconstruction, lambda_prototype, lambda_data)
        self.loss = ProbPSENNLoss(*weights, gather_distributed=lambda_prototype > 0)
        self.uncertain_fold = _ErrorDetection()
        noise = torch.randn(eval_samples, self.num_classes, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("eval_noise", noise, persistent=False)
        self.register_buffer("fitted", torch.tensor(False))
        monitor = "val/accuracy" if schedule.keep == "best" else None
        parts = ("network.encoder.*", "network.decoder.*")
        alone, joint = schedule.autoencoder_epochs, schedule.joint_epochs
        self.stages = [
            Stage("autoencoder", parts, alone, schedule.lr, monitor=None, patience=None),
            Stage("joint", ("*",), joint, schedule.lr, monitor=monitor, patience=None),
        ]
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        net = self.network
        return {
            **self.input_settings(),
            **self.pixels.settings(),
            "dim": net.prototypes.loc.shape[1],
            "widths": list(self.widths),
            "covariance": net.prototypes.covariance,
            "num_samples": net.num_samples,
            "eval_samples": self.eval_samples,
            "prior_std": net.prototypes.prior_std,
            **{f"lambda_{name}": value for name, value in self.loss.weights.items()},
            "variational": isinstance(net, VariationalProbPSENN),
            "lambda_divergence": self.lambda_divergence,
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> ProbPSENNModule:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings | {"schedule": PSENNSchedule(**settings["schedule"])})

    def inputs(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N channels S S"]:
        """Images as the autoencoder sees them: pixels from -1 to 1."""
        return self.pixels(images) * 2 - 1

    def forward(self, images: Float[Tensor, "N channels S S"]) -> ProbPSENNOutput:
        """Logits of new samples, and what the loss needs."""
        return self.network(self.inputs(images))

    def sampled_logits(
        self, images: Float[Tensor, "N channels S S"]
    ) -> tuple[Float[Tensor, "N samples C"], Float[Tensor, "N P samples"]]:
        """Logits and distances for the samples that all evaluation shares."""
        latents = self.network.encode(self.inputs(images))
        return self.network.decide(latents, self.network.sample(noise=self.eval_noise))

    def class_logits(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N C"]:
        """Logarithm of the mean over samples of the probabilities."""
        return self.sampled_logits(images)[0].log_softmax(2).logsumexp(1) - math.log(self.eval_samples)

    # -- training

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the four terms; the reconstruction alone while the autoencoder trains."""
        batch = batch.stacked()
        if len(batch.image) == 1:
            raise ValueError("batch: found one image, batch norm needed 2 or more (--data.drop_last true)")
        inputs, net = self.inputs(batch.image), self.network
        divergence: Tensor | float = 0.0
        if isinstance(net, VariationalProbPSENN):
            mean, log_variance = net.posterior(inputs)
            latents, divergence = net.draw(mean, log_variance), latent_divergence(mean, log_variance)
        else:
            latents = net.encode(inputs)
        if self.stage is not None and self.stage.name == "autoencoder":
            loss = (net.decoder(latents).float() - inputs).square().mean()
        else:
            out = net.judge(latents)
            loss = self.loss(out.logits, batch.target, out.reconstruction, inputs, out.log_prob)
        loss = loss + self.lambda_divergence * divergence
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        """Fit the prototypes once, when the joint stage begins."""
        joint = self.stage is not None and self.stage.name == "joint"
        if joint and self.schedule.start == "fitted" and not bool(self.fitted):
            data = getattr(self.trainer, "datamodule", None)
            if not isinstance(data, ImageDataModule):
                raise ValueError("schedule.start: 'fitted' needs a data module of images, 'random' needs none")
            self.fit_prototypes(data)

    def fit_prototypes(self, data: ImageDataModule) -> None:
        """Mean and covariance of the codes of each class's training images."""
        self.network.prototypes.fit(*self.codes(data))
        self.fitted.fill_(True)

    @torch.no_grad()
    def codes(self, data: ImageDataModule) -> tuple[Float[Tensor, "M D"], Int[Tensor, "M"]]:
        """Latent vectors and targets of the training images, un-augmented."""
        loader = DataLoader(
            data.projection_dataset(),
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            collate_fn=ImageDataset.collate,
        )
        found, targets = [], []
        with evaluation_mode(self):
            for batch in track(loader, "codes of the training images", transient=True):
                found.append(self.network.encode(self.inputs(batch.image.to(self.device))).float())
                targets.append(batch.target.to(self.device))
        return torch.cat(found), torch.cat(targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over what the stage trains."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.schedule.lr)

    # -- evaluation

    def uncertainties(self, probabilities: Float[Tensor, "N S C"]) -> dict[str, Float[Tensor, "N"]]:
        """Predictive entropy, aleatoric and epistemic uncertainty, in nats."""
        return {name: function(probabilities) for name, function in _UNCERTAINTIES.items()}

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect scores and uncertainties of the test fold."""
        probabilities = self.sampled_logits(batch.image)[0].softmax(2)
        scores = probabilities.mean(1)
        self.test_fold.update(scores, batch.target, batch.index)
        wrong = scores.argmax(1) != batch.target
        self.uncertain_fold.update(torch.stack([*self.uncertainties(probabilities).values()], 1), wrong, batch.index)

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold, and how well each uncertainty finds errors."""
        found = self.uncertain_fold.compute()
        self.uncertain_fold.reset()
        super().on_test_epoch_end()
        self.test_results["summary"] |= found
        for name, value in found.items():
            self.log(f"test/{name}", value)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """As every classifier's, and the uncertainties ``[N]``."""
        probabilities = self.sampled_logits(batch.image)[0].softmax(2)
        return super().predict_step(batch, batch_idx) | self.uncertainties(probabilities)

    # -- explanations

    def training_distances(self, data: ImageDataModule) -> list[Float[Tensor, " T"]]:
        """For each class the mean distances of its training images to its own prototype."""
        latents, targets = self.codes(data)
        samples = self.network.sample(noise=self.eval_noise)
        parts = [self.network.decide(part, samples)[1].mean(2) for part in latents.split(1024)]
        own = torch.cat(parts).gather(1, targets.unsqueeze(1)).squeeze(1)
        return [own[targets == c] for c in range(self.num_classes)]

    def decoded_evidence(
        self, images: Float[Tensor, "N channels S S"], data: ImageDataModule | None
    ) -> DecodedEvidence:
        """Mean logits and distances; with ``data`` also the uncertainties of explanations."""
        latents = self.network.encode(self.inputs(images))
        logits, distances = self.network.decide(latents, self.network.sample(noise=self.eval_noise))
        probabilities, means = logits.softmax(2), distances.mean(2)
        chosen = probabilities.mean(1)
        facts: dict[str, list[str]] = {
            _NAMES[name]: [f"{value:.3f} nats" for value in values.tolist()]
            for name, values in self.uncertainties(probabilities).items()
        }
        if data is not None:
            overlap = overlap_index(distances, chosen.argmax(1)).tolist() if self.eval_samples > 1 else []
            far = explanatory_epistemic_uncertainty(self.training_distances(data), means).tolist()
            if overlap:
                facts["Overlap of distances"] = [f"{value:.3f}" for value in overlap]
            facts["Nearer training images of the nearest class"] = [f"{100 * value:.1f} %" for value in far]
        rows = [{name: values[n] for name, values in facts.items()} for n in range(len(images))]
        picture = (self.network.decoder(latents) + 1) / 2
        return DecodedEvidence(logits.mean(1), chosen, means, self.network.classifier.weight, picture, rows)

    def decoded_prototypes(self, data: ImageDataModule | None = None) -> DecodedPrototypes:
        """The means, some samples, and the spread of all samples that evaluation uses."""
        net = self.network
        samples = net.sample(noise=self.eval_noise)
        means = (net.decoder(net.prototypes.mode()) + 1) / 2
        drawn = torch.stack([(net.decoder(part) + 1) / 2 for part in samples])  # a sample of every class at once
        spread = drawn.std(0, correction=0).mean(1)
        return DecodedPrototypes(means, drawn[:_SHOWN], spread)


_NAMES = {
    "predictive_entropy": "Uncertainty of the prediction",
    "aleatoric": "of it within samples (aleatoric)",
    "epistemic": "of it between samples (epistemic)",
}


class _ErrorDetection(FoldScores):
    """How well uncertainties tell errors from right answers, over a whole fold."""

    def update(self, uncertainties: Tensor, wrong: Tensor, index: Tensor) -> None:
        """Collect a batch: uncertainties ``[N, 3]``, which answers are wrong ``[N]``."""
        self.collect(uncertainties, wrong, index)

    def compute(self) -> dict[str, float]:
        """AUROC of each uncertainty; nothing where all answers are right, or all wrong."""
        values, wrong = self.gathered()
        if bool(wrong.all()) or not bool(wrong.any()):
            return {}
        named = zip(_UNCERTAINTIES, values.T)
        return {f"auroc_errors_{name}": auroc(column[wrong], column[~wrong]) for name, column in named}
