"""The network of case-based reasoning through prototypes: an autoencoder, distances to prototypes, a linear layer.

Source: "Deep Learning for Case-Based Reasoning through Prototypes", AAAI 2018, arXiv 1710.04806. Differences from the
authors' code: latent vectors are in the order (channel, row, column); distances are clamped at 0; any image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_positive
from proto_core.distances import sq_euclidean
from proto_core.distributed import gather_with_grad
from proto_core.precision import full_precision, no_autocast

__all__ = ["CaseBasedLoss", "PrototypeAutoencoder", "PrototypeAutoencoderOutput"]


class PrototypeAutoencoderOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, C]``.
        reconstruction: ``[N, C_in, H, W]`` in (0, 1).
        latents: ``[N, D]``, at least 0.
        distances: ``[N, m]`` squared, to every prototype.
    """

    logits: Tensor
    reconstruction: Tensor
    latents: Tensor
    distances: Tensor


class PrototypeAutoencoder(nn.Module):
    """Classifies by ``logits = d W^T``, ``d_ij = |z_i - p_j|^2`` in the latent space of an autoencoder.

    Encoder: convolutions of kernel 3 and stride 2 with ReLU, padded so that n pixels become ``ceil(n / 2)``: of the
    padding, half (rounded down) comes first. The decoder is the mirror image, each layer the adjoint of its
    convolution, with weights of its own; its last activation is a sigmoid, so that pixels lie in (0, 1). Prototypes
    are vectors of the latent space, seen through the decoder.

    Args:
        image_size: pixels of a side, or ``(H, W)``; any size from 1.
        in_channels: of the image.
        num_classes: C.
        num_prototypes: m.
        hidden_channels: after each convolution but the last.
        latent_channels: after the last one.
        conv_std: convolutions start from ``N(0, conv_std^2)`` with biases 0 as the authors'; ``None``: as PyTorch's,
            which learns faster.

    Attributes:
        encoder_convs: Conv2d without padding, image to latent.
        decoder_convs: ConvTranspose2d without padding, latent to image.
        prototypes: Parameter ``[m, D]``, from U[0, 1).
        classifier: Linear(m, C) without bias, from U[0, 1).

    Shapes:
        ``[N, C_in, H, W]`` -> :class:`PrototypeAutoencoderOutput`.

    Raises:
        ValueError: a size below 1; images or latent vectors of another shape.

    Source:
        arXiv 1710.04806, sections 2 and 3.

    Example:
        >>> import torch
        >>> from proto_vision.case_based import PrototypeAutoencoder
        >>> net = PrototypeAutoencoder()
        >>> out = net(torch.rand(2, 1, 28, 28))
        >>> out.logits.shape, out.latents.shape, net.prototype_images().shape
        (torch.Size([2, 10]), torch.Size([2, 40]), torch.Size([15, 1, 28, 28]))
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        num_prototypes: int = 15,
        hidden_channels: Sequence[int] = (32, 32, 32),
        latent_channels: int = 10,
        *,
        conv_std: float | None = 0.01,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        widths = [in_channels, *hidden_channels, latent_channels]
        for name, value in (
            *(("image_size", side) for side in (height, width)),
            *(("in_channels", in_channels), ("num_classes", num_classes), ("num_prototypes", num_prototypes)),
            *(("hidden_channels", channels) for channels in hidden_channels),
            ("latent_channels", latent_channels),
        ):
            if value < 1:
                raise ValueError(f"{name}: found {value}, needed 1 or more")
        if conv_std is not None:
            check_positive(conv_std=conv_std)
        self.image_size, self.in_channels, self.conv_std = (height, width), in_channels, conv_std
        self.hidden_channels, self.latent_channels = tuple(hidden_channels), latent_channels
        self.sizes = [(height, width)]
        for _ in widths[1:]:
            self.sizes.append(tuple(-(-side // 2) for side in self.sizes[-1]))  # type: ignore[arg-type]
        self.encoder_convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2) for a, b in pairwise(widths))
        self.decoder_convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 3, 2) for a, b in pairwise(widths[::-1]))
        self.latent_dim = latent_channels * self.sizes[-1][0] * self.sizes[-1][1]
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, self.latent_dim))
        self.classifier = nn.Linear(num_prototypes, num_classes, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions as ``conv_std`` says, prototypes and classifier from U[0, 1)."""
        for layer in (*self.encoder_convs, *self.decoder_convs):
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            if self.conv_std is None:
                layer.reset_parameters()
            else:
                nn.init.normal_(layer.weight, std=self.conv_std)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.prototypes)
        nn.init.uniform_(self.classifier.weight)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"image_size={self.image_size}, prototypes={tuple(self.prototypes.shape)}, conv_std={self.conv_std}"

    def encode(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "N D"]:
        """Latent vectors."""
        needed = (self.in_channels, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != needed:
            raise ValueError(f"images: found shape {tuple(images.shape)}, needed [N, {', '.join(map(str, needed))}]")
        features = images.to(self.prototypes.dtype)  # pixel values come in float32, whatever the network's precision
        for layer, size in zip(self.encoder_convs, self.sizes):
            top, left = (_padding(side) for side in size)
            features = layer(F.pad(features, (*left, *top))).relu()
        return features.flatten(1)

    def decode(self, latents: Float[Tensor, "N D"]) -> Float[Tensor, "N channels H W"]:
        """Images of latent vectors."""
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"latents: found shape {tuple(latents.shape)}, needed [N, {self.latent_dim}]")
        features = latents.unflatten(1, (self.latent_channels, *self.sizes[-1]))
        *inner, last = self.decoder_convs
        sizes = self.sizes[-2::-1]
        for layer, size in zip(inner, sizes):
            features = _cropped(layer(features), size).relu()
        return full_precision(_cropped(last(features), sizes[-1])).sigmoid()

    def prototype_images(self) -> Float[Tensor, "m channels H W"]:
        """What the prototypes look like: decoded."""
        return self.decode(self.prototypes)

    def forward(self, images: Float[Tensor, "N channels H W"]) -> PrototypeAutoencoderOutput:
        """Logits and what the loss needs."""
        latents = self.encode(images)
        distances = sq_euclidean(latents, self.prototypes)
        with no_autocast(distances):
            logits = distances @ self.classifier.weight.to(distances.dtype).T
        return PrototypeAutoencoderOutput(logits, self.decode(latents), latents, distances)


def _padding(size: int) -> tuple[int, int]:
    """Zeros before and after n pixels so that kernel 3 and stride 2 give ``ceil(n / 2)``."""
    total = max(2 * (-(-size // 2) - 1) + 3 - size, 0)
    return total // 2, total - total // 2


def _cropped(full: Float[Tensor, "N channels h w"], size: tuple[int, int]) -> Float[Tensor, "N channels H W"]:
    """The part of a full transposed convolution that belongs to pixels, not to padding."""
    (top, _), (left, _) = (_padding(side) for side in size)
    return full[:, :, top : top + size[0], left : left + size[1]]


class CaseBasedLoss(nn.Module):
    """``L = lambda_class E + lambda_reconstruction R + lambda_prototype R1 + lambda_feature R2``.

    With the squared distances ``d_ij`` of sample i to prototype j: E the mean cross-entropy;
    ``R = mean_i |x_i - decode(z_i)|^2`` (a sum over pixels); ``R1 = mean_j min_i d_ij`` (every prototype near a sample
    of the batch); ``R2 = mean_i min_j d_ij`` (every sample near a prototype). A batch of one is valid: R1 then pulls
    every prototype to it. Pixels outside [0, 1] are valid too, but the network's sigmoid cannot reach them.

    Args:
        lambda_class: weight of E.
        lambda_reconstruction: weight of R.
        lambda_prototype: weight of R1 (the authors' lambda_1).
        lambda_feature: weight of R2 (the authors' lambda_2).
        gather_distributed: take R1 over the joint batch of all ranks.

    Shapes:
        logits ``[N, C]``, targets ``[N]``, reconstruction and inputs ``[N, ...]``, distances ``[N, m]`` -> scalar; 0
        for an empty batch.

    Raises:
        ValueError: a negative weight; targets outside 0..C-1; a reconstruction of another shape than the inputs;
            other numbers of rows.

    Source:
        arXiv 1710.04806, section 3.2.

    Example:
        >>> import torch
        >>> from proto_vision.case_based import CaseBasedLoss
        >>> distances = torch.tensor([[1.0, 4.0], [2.0, 9.0]])
        >>> terms = CaseBasedLoss().terms(
        ...     torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), distances
        ... )
        >>> {name: round(float(value), 2) for name, value in terms.items()}
        {'class': 1.1, 'reconstruction': 16.0, 'prototype': 2.5, 'feature': 1.5}
    """

    def __init__(
        self,
        lambda_class: float = 20.0,
        lambda_reconstruction: float = 1.0,
        lambda_prototype: float = 1.0,
        lambda_feature: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed
        self.weights = {
            "class": lambda_class,
            "reconstruction": lambda_reconstruction,
            "prototype": lambda_prototype,
            "feature": lambda_feature,
        }
        for name, value in self.weights.items():
            if not value >= 0:
                raise ValueError(f"lambda_{name}: found {value}, needed at least 0")

    def extra_repr(self) -> str:
        """Weights."""
        return ", ".join(f"lambda_{name}={value}" for name, value in self.weights.items())

    def terms(
        self,
        logits: Float[Tensor, "N C"],
        targets: Int[Tensor, "N"],
        reconstruction: Shaped[Tensor, "N *pixels"],
        inputs: Shaped[Tensor, "N *pixels"],
        distances: Float[Tensor, "N m"],
    ) -> dict[str, Tensor]:
        """The four terms without their weights: ``class``, ``reconstruction``, ``prototype``, ``feature``."""
        check_class_targets(logits, targets, empty=True)
        if reconstruction.shape != inputs.shape:
            shapes = f"{tuple(reconstruction.shape)} and {tuple(inputs.shape)}"
            raise ValueError(f"reconstruction, inputs: found shapes {shapes}, needed the same")
        count = len(targets)
        if distances.ndim != 2 or len(distances) != count or distances.shape[1] == 0 or len(inputs) != count:
            shapes = f"{tuple(distances.shape)} and {tuple(inputs.shape)}"
            raise ValueError(
                f"distances, inputs: found shapes {shapes}, needed {count} rows and [{count}, m] with m at least 1"
            )
        distances = full_precision(distances)
        joint = gather_with_grad(distances) if self.gather_distributed else distances
        error = (full_precision(reconstruction) - full_precision(inputs)).square()
        own = F.cross_entropy(full_precision(logits), targets.long(), reduction="sum")
        return {
            "class": own / max(count, 1),
            "reconstruction": error.sum() / max(count, 1),
            "prototype": joint.amin(0).mean() if len(joint) else joint.sum(),
            "feature": distances.amin(1).sum() / max(count, 1),
        }

    def forward(
        self,
        logits: Float[Tensor, "N C"],
        targets: Int[Tensor, "N"],
        reconstruction: Shaped[Tensor, "N *pixels"],
        inputs: Shaped[Tensor, "N *pixels"],
        distances: Float[Tensor, "N m"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch."""
        terms = self.terms(logits, targets, reconstruction, inputs, distances)
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
