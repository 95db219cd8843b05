"""ResNets for images of about 32 pixels: a 3 x 3 convolution of stride 1 comes first, and no pooling follows it.

Source: "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, with the stem that contrastive
learning on CIFAR uses. The blocks are torchvision's; the width of the first stage is free.
"""

from __future__ import annotations

import re

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

__all__ = ["CIFARResNet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)} | {6 * n + 2: (n, n, n) for n in (3, 5, 7, 9, 18)}
"""Depth -> blocks of each stage."""


class CIFARResNet(nn.Module):
    """Stages of basic blocks over a stem that keeps the image's size; all stages but the first halve it.

    Args:
        depth: 18 or 34 (four stages), or 20, 32, 44, 56 or 110 (three stages, the ResNets of CIFAR).
        in_channels: of the image.
        width: channels of the first stage; each further stage has twice as many. ``None``: 64 with four stages, 16
            with three.

    Attributes:
        widths: channels of the maps.

    Shapes:
        ``[N, in_channels, S, S]`` -> list of four maps, of S to S / 8 places a side, or of three, down to S / 4.

    Raises:
        ValueError: another depth, a size below 1, a name that is none of these.

    Example:
        >>> import torch
        >>> from proto_vision.cifar_resnet import CIFARResNet
        >>> [tuple(m.shape[1:]) for m in CIFARResNet(18, width=8)(torch.zeros(1, 3, 32, 32))]
        [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    """

    def __init__(self, depth: int, in_channels: int = 3, width: int | None = None) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth: found {depth}, needed one of {tuple(BLOCKS)}")
        width = (16 if len(BLOCKS[depth]) == 3 else 64) if width is None else width
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels, width: found {in_channels} and {width}, needed 1 or more")
        self.widths = tuple(width * 2**stage for stage in range(len(BLOCKS[depth])))
        self.stem = nn.Sequential(_convolution(in_channels, width, 3, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.ModuleList()
        inputs = width
        for stage, (outputs, count) in enumerate(zip(self.widths, BLOCKS[depth])):
            stride = 1 if stage == 0 else 2
            shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            first = BasicBlock(inputs, outputs, stride, shortcut if stage else None)
            self.stages.append(nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(count - 1))))
            inputs = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @classmethod
    def by_name(cls, name: str, in_channels: int = 3) -> CIFARResNet:
        """``"cifar_resnet18"`` and so on, or with a width of its own as ``"cifar_resnet18_w16"``."""
        parts = re.fullmatch(r"cifar_resnet(\d+)(?:_w(\d+))?", name)
        if parts is None:
            raise ValueError(f"backbone: found {name!r}, needed cifar_resnetDEPTH, perhaps with _wWIDTH")
        return cls(int(parts[1]), in_channels, None if parts[2] is None else int(parts[2]))

    def forward(self, images: Float[Tensor, "N channels S S"]) -> list[Tensor]:
        """Every map, in order."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
