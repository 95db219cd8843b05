"""Images as vectors for shallow networks: pixel values or the features of a frozen encoder, centred and scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.precision import full_precision
from proto_vision.encoders import create_encoder
from proto_vision.pixels import Pixels

__all__ = ["VectorInputs"]


class VectorInputs(nn.Module):
    """``(v - centre) / scale`` of an image's vector v: D centres and one scale, so that distances keep their meaning.

    Before :meth:`fit` the centre is 0 and the scale 1.

    Args:
        name: ``"pixels"`` (values from 0 to 1) or a name of :func:`proto_vision.encoders.create_encoder`.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
        mean: the data module's, per channel; by default what data modules have by default.
        std: likewise.
        pretrained: the encoder's weights (a download).

    Attributes:
        encoder: in evaluation mode, without gradients; ``None`` for pixels.
        dim: D.
        centre: buffer ``[D]``.
        scale: buffer, a number.
        fitted: buffer, whether :meth:`fit` was called.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn.inputs import VectorInputs
        >>> inputs = VectorInputs("pixels", 2, 1)
        >>> inputs.raw(torch.tensor([[[[-1.0, 1.0], [0.0, 0.0]]]]))
        tensor([[0.0000, 1.0000, 0.5000, 0.5000]])
    """

    centre: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(
        self,
        name: str,
        image_size: int,
        in_channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.pixels = Pixels(in_channels, mean, std)
        self.encoder: nn.Module | None = None
        self.shape = (in_channels, image_size, image_size)
        self.dim = in_channels * image_size**2
        if name != "pixels":
            self.encoder, self.dim = create_encoder(
                name, in_channels=in_channels, image_size=image_size, pretrained=pretrained
            )
            self.encoder.requires_grad_(False)
        elif pretrained:
            raise ValueError("pretrained: there are no weights for 'pixels'")
        self.register_buffer("centre", torch.zeros(self.dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("fitted", torch.tensor(False))

    def train(self, mode: bool = True) -> VectorInputs:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def raw(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Vectors as they are."""
        if self.encoder is None:
            return self.pixels(images).flatten(1)
        with torch.no_grad():
            return full_precision(self.encoder(images))

    def scaled(self, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Vectors centred and scaled."""
        return (vectors - self.centre) / self.scale

    def forward(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Vectors of images, centred and scaled."""
        return self.scaled(self.raw(images))

    @torch.no_grad()
    def fit(self, vectors: Float[Tensor, "N D"]) -> None:
        """Centre: the mean; scale: the root of the mean variance, so that a vector is about ``sqrt(D)`` long."""
        self.centre.copy_(vectors.mean(dim=0))
        spread = vectors.var(dim=0, correction=0).mean().sqrt()
        self.scale.copy_(torch.where(spread > 0, spread, 1))
        self.fitted.fill_(True)

    def drawn(self, components: Float[Tensor, "K D"]) -> Float[Tensor, "K channels S S"]:
        """Scaled vectors of pixels as images of pixel values from 0 to 1."""
        return (full_precision(components) * self.scale + self.centre).clamp(0, 1).unflatten(1, self.shape)
