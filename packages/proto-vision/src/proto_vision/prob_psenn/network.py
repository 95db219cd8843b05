"""Prob-PSENN: an autoencoder whose classes are Gaussian prototypes in its latent space, and the loss.

Source: "Uncertainty-Aware Explanations Through Probabilistic Self-Explainable Neural Networks", 2024, arXiv 2403.13740.
Differences from the authors' code: one prototype per class, no mixtures; the prediction by modes gives probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes import GaussianPrototypes, sampled_distances

__all__ = [
    "ProbPSENN",
    "ProbPSENNLoss",
    "ProbPSENNOutput",
    "VariationalProbPSENN",
    "cnn32_autoencoder",
    "latent_divergence",
]


class ProbPSENNOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, S, C]`` of every sample of the prototypes.
        distances: ``[N, P, S]`` squared, to every sample.
        latents: ``[N, D]``.
        reconstruction: of the images.
        log_prob: ``[N, P]`` log-density of the latents under every prototype.
    """

    logits: Tensor
    distances: Tensor
    latents: Tensor
    reconstruction: Tensor
    log_prob: Tensor


class ProbPSENN(nn.Module):
    """Class c owns a random prototype ``N(mu_c, L_c L_c^T)``; logits are weighted squared distances to samples of it.

    Samples are drawn once per batch and shared by its images: ``logits[n, s] = W d[n, :, s]``. The prediction is the
    mean over samples of the probabilities. Only the prototypes are random.

    Args:
        encoder: images -> ``[N, D]``.
        decoder: ``[N, D]`` -> images.
        num_classes: C, also the number P of prototypes.
        dim: D.
        covariance: ``"full"`` or ``"diag"``.
        num_samples: S, where a call does not say.
        prior_std: see :class:`~proto_core.prototypes.GaussianPrototypes`.

    Attributes:
        prototypes: :class:`~proto_core.prototypes.GaussianPrototypes`.
        classifier: Linear(P, C) without bias, from ``-0.5 I`` plus U(-1e-8, 1e-8).

    Shapes:
        images -> :class:`ProbPSENNOutput`; noise ``[S, P, D]`` takes the place of a draw from N(0, I).

    Raises:
        ValueError: a size below 1, an unknown covariance, latents that are not ``[N, D]``, noise of another shape.

    Source:
        arXiv 2403.13740, section 3.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import ProbPSENN, cnn32_autoencoder
        >>> net = ProbPSENN(*cnn32_autoencoder(dim=8), num_classes=3, dim=8)
        >>> net(torch.rand(4, 1, 32, 32)).logits.shape, net.predict_proba(torch.rand(4, 1, 32, 32)).shape
        (torch.Size([4, 10, 3]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_classes: int,
        dim: int,
        covariance: str = "full",
        num_samples: int = 10,
        prior_std: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, num_samples=num_samples)
        self.encoder, self.decoder, self.num_samples = encoder, decoder, num_samples
        self.prototypes = GaussianPrototypes(num_classes, dim, covariance, prior_std)
        self.classifier = nn.Linear(num_classes, num_classes, bias=False)
        self.reset_classifier()

    def reset_classifier(self) -> None:
        """``-0.5 I`` plus noise of 1e-8."""
        nn.init.uniform_(self.classifier.weight, -1e-8, 1e-8)
        with torch.no_grad():
            self.classifier.weight.diagonal().sub_(0.5)

    def extra_repr(self) -> str:
        """Samples."""
        return f"num_samples={self.num_samples}"

    def encode(self, x: Float[Tensor, "N *pixels"]) -> Float[Tensor, "N D"]:
        """Latent vectors."""
        return self._encoded(x, self.prototypes.loc.shape[1])

    def latents(self, x: Float[Tensor, "N *pixels"]) -> Float[Tensor, "N D"]:
        """Latent vectors that :meth:`forward` judges: those of :meth:`encode`."""
        return self.encode(x)

    def _encoded(self, x: Tensor, columns: int) -> Tensor:
        found = self.encoder(x.to(self.classifier.weight.dtype))  # pixels come in float32, whatever the precision
        if found.ndim != 2 or found.shape[1] != columns:
            raise ValueError(f"encoder: found latents of shape {tuple(found.shape)}, needed [N, {columns}]")
        return found

    def sample(
        self, num_samples: int | None = None, noise: Shaped[Tensor, "S P D"] | None = None
    ) -> Float[Tensor, "S P D"]:
        """Samples of the prototypes, with gradient."""
        count = num_samples if num_samples is not None else self.num_samples if noise is None else len(noise)
        return self.prototypes.sample(count, noise)

    def decide(
        self, latents: Float[Tensor, "N D"], samples: Float[Tensor, "S P D"]
    ) -> tuple[Float[Tensor, "N S C"], Float[Tensor, "N P S"]]:
        """Logits and distances of latent vectors for samples of the prototypes."""
        distances = sampled_distances(latents, samples)
        with no_autocast(distances):
            return distances.mT @ self.classifier.weight.to(distances.dtype).T, distances

    def forward(
        self,
        x: Float[Tensor, "N *pixels"],
        num_samples: int | None = None,
        noise: Shaped[Tensor, "S P D"] | None = None,
    ) -> ProbPSENNOutput:
        """Logits of every sample and what the loss needs."""
        return self.judge(self.latents(x), num_samples, noise)

    def judge(
        self,
        latents: Float[Tensor, "N D"],
        num_samples: int | None = None,
        noise: Shaped[Tensor, "S P D"] | None = None,
    ) -> ProbPSENNOutput:
        """What :meth:`forward` says of latent vectors."""
        logits, distances = self.decide(latents, self.sample(num_samples, noise))
        return ProbPSENNOutput(logits, distances, latents, self.decoder(latents), self.prototypes.log_prob(latents))

    def predict_proba(
        self,
        x: Float[Tensor, "N *pixels"],
        num_samples: int | None = None,
        noise: Shaped[Tensor, "S P D"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """Mean over samples of the probabilities."""
        return self.decide(self.encode(x), self.sample(num_samples, noise))[0].softmax(2).mean(1)

    def predict_mode(self, x: Float[Tensor, "N *pixels"]) -> Float[Tensor, "N C"]:
        """Probabilities where every prototype is its mean."""
        return self.decide(self.encode(x), self.prototypes.mode().unsqueeze(0))[0].softmax(2).squeeze(1)


class VariationalProbPSENN(ProbPSENN):
    """A :class:`ProbPSENN` whose images are random too: the encoder gives mean and log-variance of the latents.

    In training mode the latents are sampled, otherwise they are the mean. The loss gets :func:`latent_divergence`
    beside the four terms of :class:`ProbPSENNLoss`.

    Args:
        encoder: images -> ``[N, 2 D]``, the means first.
        decoder: ``[N, D]`` -> images.
        num_classes: see :class:`ProbPSENN`, as all others.
        dim: D.
        covariance: of the prototypes.
        num_samples: of the prototypes.
        prior_std: of the prototypes.

    Shapes:
        images -> :class:`ProbPSENNOutput`.

    Raises:
        ValueError: as :class:`ProbPSENN`; what the encoder gives is not ``[N, 2 D]``.

    Source:
        arXiv 2403.13740, the authors' variational autoencoder.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import VariationalProbPSENN, cnn32_autoencoder, latent_divergence
        >>> net = VariationalProbPSENN(*cnn32_autoencoder(dim=8, variational=True), num_classes=3, dim=8)
        >>> mean, log_variance = net.posterior(torch.rand(4, 1, 32, 32))
        >>> out = net.judge(net.draw(mean, log_variance))
        >>> out.logits.shape, latent_divergence(mean, log_variance).shape
        (torch.Size([4, 10, 3]), torch.Size([]))
    """

    def posterior(self, x: Float[Tensor, "N *pixels"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        """Mean and log-variance of the latents, in float32 or wider."""
        mean, log_variance = full_precision(self._encoded(x, 2 * self.prototypes.loc.shape[1])).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, x: Float[Tensor, "N *pixels"]) -> Float[Tensor, "N D"]:
        """Means of the latents."""
        return self.posterior(x)[0].to(self.classifier.weight.dtype)

    def draw(self, mean: Float[Tensor, "N D"], log_variance: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """In training mode a sample of the latents, with gradient, otherwise their mean."""
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return drawn.to(self.classifier.weight.dtype)

    def latents(self, x: Float[Tensor, "N *pixels"]) -> Float[Tensor, "N D"]:
        """In training mode a sample, otherwise the means."""
        return self.draw(*self.posterior(x))


def latent_divergence(mean: Float[Tensor, "N D"], log_variance: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Mean over images of ``KL(N(mean, exp(log_variance)) || N(0, I)) = -sum(1 + lv - mean^2 - exp(lv)) / 2``.

    Returns:
        The divergence; 0 for an empty batch.

    Raises:
        ValueError: shapes that differ, or are not ``[N, D]``.

    Source:
        "Auto-Encoding Variational Bayes", arXiv 1312.6114, appendix B.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import latent_divergence
        >>> latent_divergence(torch.ones(2, 3), torch.zeros(2, 3))
        tensor(1.5000)
    """
    if mean.ndim != 2 or mean.shape != log_variance.shape:
        shapes = f"{tuple(mean.shape)} and {tuple(log_variance.shape)}"
        raise ValueError(f"mean, log_variance: found shapes {shapes}, needed [N, D] twice")
    mean, wide = full_precision(mean), full_precision(log_variance)
    return -(1 + wide - mean.square() - wide.exp()).sum() / (2 * max(len(mean), 1))


class ProbPSENNLoss(nn.Module):
    """``lambda_nll nll + lambda_reconstruction R + lambda_prototype R1 + lambda_data R2``.

    ``nll`` is the mean over images and samples of ``-log softmax(logits)_y`` (mean of the log, not log of the mean); R
    the mean squared error over all elements; R1 the mean over classes of the smallest ``-log N(z; mu_c, Sigma_c)`` in
    the batch; R2 the mean over images of ``-log N(z; mu_y, Sigma_y)``, clamped to [-1, 10000] with gradient zero
    outside: it does not pull once a fit is tight, nor at points far off, so that prototypes should start fitted.

    Args:
        lambda_nll: weight of nll.
        lambda_reconstruction: weight of R.
        lambda_prototype: weight of R1.
        lambda_data: weight of R2.
        gather_distributed: take R1 over the joint batch of all ranks.

    Shapes:
        logits ``[N, S, C]``, targets ``[N]``, reconstruction and inputs ``[N, ...]``, log_prob ``[N, C]`` -> scalar; 0
        for an empty batch.

    Raises:
        ValueError: a negative weight; targets outside 0..C-1; log_prob of other columns than C; a reconstruction of
            another shape than the inputs.

    Source:
        arXiv 2403.13740, section 3; weights of the authors' code.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import ProbPSENNLoss
        >>> loss, image = ProbPSENNLoss(), torch.zeros(2, 1, 4, 4)
        >>> terms = loss.terms(torch.zeros(2, 5, 2), torch.tensor([0, 1]), image, image + 1, -torch.eye(2))
        >>> {name: round(float(value), 3) for name, value in terms.items()}
        {'nll': 0.693, 'reconstruction': 1.0, 'prototype': 0.0, 'data': 1.0}
    """

    def __init__(
        self,
        lambda_nll: float = 1.0,
        lambda_reconstruction: float = 10.0,
        lambda_prototype: float = 0.0,
        lambda_data: float = 0.05,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed
        self.weights = {
            "nll": lambda_nll,
            "reconstruction": lambda_reconstruction,
            "prototype": lambda_prototype,
            "data": lambda_data,
        }
        for name, value in self.weights.items():
            if not value >= 0:
                raise ValueError(f"lambda_{name}: found {value}, needed at least 0")

    def extra_repr(self) -> str:
        """Weights."""
        return ", ".join(f"lambda_{name}={value}" for name, value in self.weights.items())

    def terms(
        self,
        logits: Float[Tensor, "N S C"],
        targets: Int[Tensor, "N"],
        reconstruction: Shaped[Tensor, "N *pixels"],
        inputs: Shaped[Tensor, "N *pixels"],
        log_prob: Float[Tensor, "N C"],
    ) -> dict[str, Tensor]:
        """The four terms without their weights: ``nll``, ``reconstruction``, ``prototype``, ``data``."""
        if logits.ndim != 3 or logits.shape[1] == 0:
            raise ValueError(f"logits: found shape {tuple(logits.shape)}, needed [N, S, C] with S at least 1")
        check_class_targets(logits[:, 0], targets, empty=True)
        if tuple(log_prob.shape) != (len(targets), logits.shape[2]):
            needed = (len(targets), logits.shape[2])
            raise ValueError(f"log_prob: found shape {tuple(log_prob.shape)}, needed {needed}")
        if reconstruction.shape != inputs.shape:
            shapes = f"{tuple(reconstruction.shape)} and {tuple(inputs.shape)}"
            raise ValueError(f"reconstruction, inputs: found shapes {shapes}, needed the same")
        unlikely = -full_precision(log_prob)
        joint = gather_with_grad(unlikely) if self.gather_distributed else unlikely
        error = (full_precision(reconstruction) - full_precision(inputs)).square()
        wanted = targets.repeat_interleave(logits.shape[1])
        own = unlikely.gather(1, targets.unsqueeze(1)).clamp(-1, 10_000)
        nll = F.cross_entropy(full_precision(logits).flatten(0, 1), wanted, reduction="sum")
        return {
            "nll": nll / max(len(wanted), 1),
            "reconstruction": error.sum() / max(error.numel(), 1),
            "prototype": joint.amin(0).mean() if len(joint) else joint.sum(),
            "data": own.sum() / max(len(own), 1),
        }

    def forward(
        self,
        logits: Float[Tensor, "N S C"],
        targets: Int[Tensor, "N"],
        reconstruction: Shaped[Tensor, "N *pixels"],
        inputs: Shaped[Tensor, "N *pixels"],
        log_prob: Float[Tensor, "N C"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch."""
        terms = self.terms(logits, targets, reconstruction, inputs, log_prob)
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def cnn32_autoencoder(
    in_channels: int = 1,
    dim: int = 40,
    widths: Sequence[int] = (32, 32, 64, 256),
    variational: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of images of 32 x 32 pixels in [-1, 1]; the decoder ends in tanh.

    Batch norm trains on more than one image: a last batch of one has to be dropped.

    Args:
        in_channels: of the image.
        dim: D.
        widths: channels after each of the first four convolutions; (64, 128, 256, 512) for colour.
        variational: whether the encoder gives means and log-variances, ``[N, 2 D]``.

    Shapes:
        ``[N, in_channels, 32, 32]`` -> ``[N, D]``, and back.

    Raises:
        ValueError: a size below 1, or not four widths.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import cnn32_autoencoder
        >>> encoder, decoder = cnn32_autoencoder(dim=8)
        >>> codes = encoder(torch.rand(2, 1, 32, 32))
        >>> codes.shape, decoder(codes).shape
        (torch.Size([2, 8]), torch.Size([2, 1, 32, 32]))
    """
    if len(widths) != 4 or min(*widths, in_channels, dim) < 1:
        found = f"{in_channels}, {dim} and {tuple(widths)}"
        raise ValueError(f"in_channels, dim, widths: found {found}, needed sizes of 1 or more, and four widths")
    a, b, c, d = widths
    encoder = nn.Sequential(
        *_normed(nn.Conv2d(in_channels, a, 4, 2, 1)),
        *_normed(nn.Conv2d(a, b, 4, 2, 1)),
        *_normed(nn.Conv2d(b, c, 4, 2, 1)),
        *_normed(nn.Conv2d(c, d, 4)),
        nn.Conv2d(d, 2 * dim if variational else dim, 1),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Unflatten(1, (dim, 1, 1)),
        *_normed(nn.Conv2d(dim, d, 1)),
        *_normed(nn.ConvTranspose2d(d, c, 4)),
        *_normed(nn.ConvTranspose2d(c, b, 4, 2, 1)),
        *_normed(nn.ConvTranspose2d(b, a, 4, 2, 1)),
        nn.ConvTranspose2d(a, in_channels, 4, 2, 1),
        nn.Tanh(),
    )
    return encoder, decoder


def _normed(layer: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels, eps=1e-3, momentum=0.01), nn.LeakyReLU(0.2)]
