"""One of CPC's two networks: an encoder, whose features the cleaner looks at, and a linear layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from proto_vision.encoders import create_encoder

__all__ = ["CPCNetwork"]


class CPCNetwork(nn.Module):
    """Classifier that also gives the input of its last layer.

    Args:
        backbone: name, see :func:`proto_vision.encoders.create_encoder`.
        num_classes: K.
        in_channels: of the images.
        image_size: height and width, in pixels.
        pretrained: weights for the backbone (a download).

    Attributes:
        dim: D.

    Shapes:
        ``[N, channels, S, S]`` -> logits ``[N, K]``, features ``[N, D]``.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import CPCNetwork
        >>> logits, features = CPCNetwork("conv3", 4, in_channels=1, image_size=8)(torch.zeros(2, 1, 8, 8))
        >>> logits.shape, features.shape
        (torch.Size([2, 4]), torch.Size([2, 128]))
    """

    def __init__(
        self, backbone: str, num_classes: int, *, in_channels: int = 3, image_size: int = 32, pretrained: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.dim = create_encoder(
            backbone, in_channels=in_channels, image_size=image_size, pretrained=pretrained
        )
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, images: Float[Tensor, "N channels S S"]) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N D"]]:
        """Logits and features."""
        features = self.encoder(images)
        return self.head(features), features
