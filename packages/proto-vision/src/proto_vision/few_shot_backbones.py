"""The two backbones of few-shot learning: four convolutions (ConvNet-4) and a ResNet of twelve layers (ResNet-12).

Source: Prototypical Networks (arXiv 1703.05175), the ResNet-12 of few-shot learning as in SuSana Distancia (arXiv
2305.09062), widths 64 to 512, and the wider one of RFS (arXiv 2003.11539), widths 64 to 640. Difference from RFS: no
drop block.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ConvNet4", "ResNet12"]


class _Blocks(nn.Module):
    """Blocks one after the other, which give every map."""

    def __init__(self, blocks: list[nn.Module], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages, self.widths = nn.ModuleList(blocks), widths

    def forward(self, images: Float[Tensor, "N channels S S"]) -> list[Tensor]:
        """Every map, in order."""
        maps = [images]
        for block in self.stages:
            maps.append(block(maps[-1]))
        return maps[1:]


class ConvNet4(_Blocks):
    """Four times a 3 x 3 convolution of 64 channels, batch norm, ReLU and maximum pooling.

    Args:
        in_channels: of the image.
        width: channels of each block.

    Attributes:
        widths: channels of the four maps.

    Shapes:
        ``[N, in_channels, S, S]``, S at least 16 -> list of four maps, the last of S / 16 places a side.

    Example:
        >>> import torch
        >>> from proto_vision.few_shot_backbones import ConvNet4
        >>> [tuple(m.shape[1:]) for m in ConvNet4(1)(torch.zeros(2, 1, 28, 28))]
        [(64, 14, 14), (64, 7, 7), (64, 3, 3), (64, 1, 1)]
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        def block(inputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
            )

        super().__init__([block(inputs) for inputs in (in_channels, width, width, width)], (width,) * 4)


class _ResidualBlock(nn.Module):
    """Three 3 x 3 convolutions with batch norm beside one of 1 x 1; leaky ReLU of slope 0.1; maximum pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()

        def step(channels: int, size: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)]

        self.body = nn.Sequential(
            *step(inputs, 3), nn.LeakyReLU(0.1), *step(outputs, 3), nn.LeakyReLU(0.1), *step(outputs, 3)
        )
        self.shortcut = nn.Sequential(*step(inputs, 1))
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N outputs h w"]:
        return self.end(self.body(x) + self.shortcut(x))


class ResNet12(_Blocks):
    """Four residual blocks, each with maximum pooling; no drop block.

    Args:
        in_channels: of the image.
        widths: channels of each block: 64, 128, 256, 512 or, in RFS, 64, 160, 320, 640.

    Attributes:
        widths: channels of the four maps.

    Shapes:
        ``[N, in_channels, S, S]``, S at least 16 -> list of four maps, the last of S / 16 places a side.

    Example:
        >>> import torch
        >>> from proto_vision.few_shot_backbones import ResNet12
        >>> [tuple(m.shape[1:]) for m in ResNet12()(torch.zeros(1, 3, 84, 84))]
        [(64, 42, 42), (128, 21, 21), (256, 10, 10), (512, 5, 5)]
    """

    def __init__(self, in_channels: int = 3, widths: tuple[int, ...] = (64, 128, 256, 512)) -> None:
        super().__init__(
            [_ResidualBlock(inputs, outputs) for inputs, outputs in zip((in_channels, *widths), widths)], widths
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
