"""iResNet: the residual network of face recognition, which keeps an image's resolution in its first convolution.

Source: ArcFace's variant of ResNet, as UNPG (2022, arXiv 2203.11593) trains it. Sizes of images other than 112 are
allowed; ``iresnet_small`` is ours, for small images and quick experiments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from proto_core.checks import check_positive

__all__ = ["IRESNETS", "IResNet", "IResNetBlock"]


class _Size(NamedTuple):
    blocks: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)


IRESNETS = {
    "iresnet_small": _Size((1, 1, 1, 1), (16, 32, 64, 128)),
    "iresnet34": _Size((3, 4, 6, 3)),
    "iresnet50": _Size((3, 4, 14, 3)),
    "iresnet100": _Size((3, 13, 30, 3)),
}
"""Blocks and widths of the four stages, by name."""


class IResNetBlock(nn.Module):
    """BN, 3 x 3, BN, PReLU, 3 x 3 with the stride, BN; beside it the input, or its 1 x 1 convolution and BN.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the second convolution and of the shortcut.

    Shapes:
        ``[N, inputs, h, w]`` -> ``[N, outputs, h / stride, w / stride]``, rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Float[Tensor, "N A h w"]) -> Float[Tensor, "N B h2 w2"]:
        """Body and shortcut, added; no activation behind the sum."""
        return self.body(x) + self.shortcut(x)


class IResNet(nn.Module):
    """Image -> embedding: a 3 x 3 convolution of stride 1, four stages that halve the map, and a linear layer.

    Behind the last stage: BN, the whole map as one vector, dropout, linear, BN. Convolutions start as Kaiming normal
    (fan out).

    Args:
        name: one of :data:`IRESNETS`.
        embedding_dim: D.
        in_channels: of the image.
        image_size: height and width of the image; the linear layer depends on it.
        dropout: before the linear layer.

    Shapes:
        ``[N, in_channels, S, S]`` -> ``[N, D]``.

    Raises:
        ValueError: an unknown name, a size below 1, dropout outside [0, 1).

    Source:
        arXiv 2203.11593, section 4.

    Example:
        >>> import torch
        >>> from proto_vision.unpg import IResNet
        >>> IResNet("iresnet_small", 64, in_channels=1, image_size=32)(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        name: str = "iresnet100",
        embedding_dim: int = 512,
        *,
        in_channels: int = 3,
        image_size: int = 112,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        if name not in IRESNETS:
            raise ValueError(f"backbone: found {name!r}, needed one of {tuple(IRESNETS)}")
        check_positive(embedding_dim=embedding_dim, in_channels=in_channels, image_size=image_size)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: found {dropout}, needed a share in [0, 1)")
        blocks, widths = IRESNETS[name]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        self.stages = nn.Sequential(
            *(_stage(inputs, outputs, count) for inputs, outputs, count in zip((widths[0], *widths), widths, blocks))
        )
        side = -(-image_size // 2 ** len(widths))
        self.head = nn.Sequential(
            nn.BatchNorm2d(widths[-1]),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(widths[-1] * side * side, embedding_dim),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Embeddings, not normalised."""
        return self.head(self.stages(self.stem(images)))


def _stage(inputs: int, outputs: int, count: int) -> nn.Sequential:
    """Blocks of one width, the first with stride 2."""
    first: Sequence[IResNetBlock] = [IResNetBlock(inputs, outputs, 2)]
    return nn.Sequential(*first, *(IResNetBlock(outputs, outputs) for _ in range(count - 1)))
