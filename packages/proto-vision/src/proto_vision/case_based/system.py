"""Case-based reasoning through prototypes as a system that trains, and that draws what it compares images with.

Source: "Deep Learning for Case-Based Reasoning through Prototypes", AAAI 2018, arXiv 1710.04806. Differences from the
authors' code: images are deformed on the model's device; the incomplete last batch counts in training and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from proto_core.checks import check_option
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_vision.case_based.deformation import ElasticDeformation
from proto_vision.case_based.network import CaseBasedLoss, PrototypeAutoencoder, PrototypeAutoencoderOutput
from proto_vision.classification import ImageClassifier
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.module import ImageDataModule
from proto_vision.decoded import DecodedEvidence, DecodedPrototypes, ExplainsByDistance
from proto_vision.pixels import Pixels

__all__ = ["CaseBasedModule"]


class CaseBasedModule(ExplainsByDistance, ImageClassifier):
    """Image classifier that compares an image with prototypes which its decoder can draw.

    Everything trains jointly; with ``elastic_alpha`` above 0 each training batch is deformed, and reconstructed as it
    was deformed. The decoder answers in pixel values: the data module's normalisation is undone first.

    Args:
        num_classes: C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        mean: the data module's, per channel; by default what data modules have by default.
        std: likewise.
        num_prototypes: m.
        hidden_channels: see :class:`PrototypeAutoencoder`.
        latent_channels: see :class:`PrototypeAutoencoder`.
        conv_std: see :class:`PrototypeAutoencoder`.
        lambda_class: see :class:`CaseBasedLoss`, as the other three.
        lambda_reconstruction: of the sum over pixels.
        lambda_prototype: of R1, every prototype near a sample; noisy for small batches.
        lambda_feature: of R2, every sample near a prototype.
        elastic_sigma: see :class:`ElasticDeformation`.
        elastic_alpha: likewise; 0 deforms nothing.
        lr: of Adam.
        epochs: passes over the training set.
        keep: ``"last"`` keeps the last epoch, ``"best"`` that with the best validation accuracy.

    Shapes:
        ``[N, channels, S, S]`` -> :class:`PrototypeAutoencoderOutput`.

    Raises:
        ValueError: a size below 1, a negative weight, an unknown word for ``keep``.

    Source:
        arXiv 1710.04806.

    Example:
        >>> import torch
        >>> from proto_vision import CaseBasedModule
        >>> net = CaseBasedModule(10, image_size=16, num_prototypes=12)
        >>> net(torch.rand(4, 1, 16, 16)).logits.shape
        torch.Size([4, 10])
    """

    system: ClassVar[str] = "case_based"
    paper: ClassVar[Paper] = Paper(
        title="Deep Learning for Case-Based Reasoning through Prototypes: "
        "A Neural Network that Explains Its Predictions",
        year=2017,
        arxiv="1710.04806",
        code="OscarcarLi/PrototypeDL@3ae7f47",
        evidence="code",
        summary="Prototypes in an autoencoder's latent space that its decoder draws, and a classifier of distances.",
        claim="Terms that pull prototypes and images together keep accuracy, and make decoded prototypes look real.",
    )

    def __init__(
        self,
        num_classes: int = 10,
        *,
        class_names: Sequence[str] | None = None,
        image_size: int = 28,
        in_channels: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_prototypes: int = 15,
        hidden_channels: Sequence[int] = (32, 32, 32),
        latent_channels: int = 10,
        conv_std: float | None = 0.01,
        lambda_class: float = 20.0,
        lambda_reconstruction: float = 1.0,
        lambda_prototype: float = 1.0,
        lambda_feature: float = 1.0,
        elastic_sigma: float = 4.0,
        elastic_alpha: float = 20.0,
        lr: float = 2e-3,
        epochs: int = 1500,
        keep: Literal["best", "last"] = "last",
    ) -> None:
        super().__init__(num_classes, class_names, image_size, in_channels)
        self.pixels = Pixels(in_channels, mean, std)
        self.network = PrototypeAutoencoder(
            image_size,
            in_channels,
            self.num_classes,
            num_prototypes,
            hidden_channels,
            latent_channels,
            conv_std=conv_std,
        )
        weights = (lambda_class, lambda_reconstruction, lambda_prototype, lambda_feature)
        self.loss = CaseBasedLoss(*weights, gather_distributed=lambda_prototype > 0)
        self.deformation = ElasticDeformation(elastic_sigma, elastic_alpha)
        self.lr, self.epochs, self.keep = lr, epochs, check_option("keep", keep, "best", "last")
        monitor = "val/accuracy" if keep == "best" else None
        self.stages = [Stage("training", ("*",), epochs, lr, monitor=monitor, patience=None)]
        self.stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        net = self.network
        return {
            **self.input_settings(),
            **self.pixels.settings(),
            "num_prototypes": len(net.prototypes),
            "hidden_channels": list(net.hidden_channels),
            "latent_channels": net.latent_channels,
            "conv_std": net.conv_std,
            **{f"lambda_{name}": value for name, value in self.loss.weights.items()},
            "elastic_sigma": self.deformation.sigma,
            "elastic_alpha": self.deformation.alpha,
            "lr": self.lr,
            "epochs": self.epochs,
            "keep": self.keep,
        }

    def forward(self, images: Float[Tensor, "N channels S S"]) -> PrototypeAutoencoderOutput:
        """Logits, and reconstructions in pixel values."""
        return self.network(self.pixels(images))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the four terms on a deformed batch."""
        batch = batch.stacked()
        inputs = self.pixels(batch.image)
        if self.deformation.alpha > 0:
            inputs = self.deformation(inputs)
        out = self.network(inputs)
        loss = self.loss(out.logits, batch.target, out.reconstruction, inputs, out.distances)
        self.note("train/loss", loss.detach(), batch, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over everything."""
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    def decoded_evidence(
        self, images: Float[Tensor, "N channels S S"], data: ImageDataModule | None
    ) -> DecodedEvidence:
        """Logits, distances, and how far the reconstruction is off."""
        inputs = self.pixels(images)
        out = self.network(inputs)
        error = (out.reconstruction - inputs).square().mean(dim=(1, 2, 3)).sqrt()
        facts = [{"Reconstruction error": f"{value:.3f} of the range (root mean square)"} for value in error.tolist()]
        weight = self.network.classifier.weight
        return DecodedEvidence(out.logits, out.logits.softmax(1), out.distances, weight, out.reconstruction, facts)

    def decoded_prototypes(self, data: ImageDataModule | None = None) -> DecodedPrototypes:
        """The prototypes through the decoder."""
        return DecodedPrototypes(self.network.prototype_images())
