"""ResNets for 12-lead ECGs: over time (1D), and over leads x time with a stem that collapses the leads (2D).

Source: ProtoECGNet (arXiv 2504.08713), section on the branches; He et al. 2016 for the residual block.
Differences from the authors' code: after the stem the 2D map is one row high, so a 3x3 convolution with padding 1 sees
zeros above and below; kernels here have only the middle row, which gives the same values with a third of the weights
(3x3 kernels are cut when they are loaded). Pretrained stem weights are the RGB mean of the 7x7 kernel resampled to
12x7, not a mean of random weights.
"""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, ResNet34_Weights, resnet18, resnet34

__all__ = ["BACKBONES_1D", "BACKBONES_2D", "ResNet1d", "ResNet2d", "feature_length"]

BACKBONES_1D: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "resnet1d10_narrow": (16, (1, 1, 1, 1)),
    "resnet1d18": (64, (2, 2, 2, 2)),
    "resnet1d34": (64, (3, 4, 6, 3)),
}
"""1D backbones: width of the first stage, blocks per stage."""

BACKBONES_2D: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "resnet10_narrow": (16, (1, 1, 1, 1)),
    "resnet18": (64, (2, 2, 2, 2)),
    "resnet34": (64, (3, 4, 6, 3)),
}
"""2D backbones; those of width 64 are torchvision's, and take its weights when ``pretrained``."""

_HALVINGS = 5


def feature_length(num_samples: int) -> int:
    """Steps of the feature sequence that both backbones make of ``num_samples`` (1000 -> 32, 5000 -> 157).

    Raises:
        ValueError: fewer than 1 sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: found {num_samples}, needed at least 1")
    for _ in range(_HALVINGS):
        num_samples = (num_samples - 1) // 2 + 1
    return num_samples


class _Block1d(nn.Module):
    """Two 3-wide convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet1d(nn.Module):
    """Residual network over time, pooled to one vector.

    Args:
        name: a key of :data:`BACKBONES_1D`.
        in_channels: number of leads.
        dropout: before the last stage.

    Shapes:
        ``[N, in_channels, L]`` -> ``[N, out_channels]``.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str = "resnet1d18", in_channels: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        if name not in BACKBONES_1D:
            raise ValueError(f"backbone: found {name!r}, needed one of {sorted(BACKBONES_1D)}")
        width, blocks = BACKBONES_1D[name]
        self.out_channels = 8 * width
        self.stem = nn.Sequential(
            nn.Conv1d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(3, 2, 1)
        )
        self.stages = nn.ModuleList()
        inputs = width
        for stage, count in enumerate(blocks):
            outputs, stride = width * 2**stage, 1 if stage == 0 else 2
            layers = [_Block1d(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(count)]
            self.stages.append(nn.Sequential(*layers))
            inputs = outputs
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "N leads L"]) -> Float[Tensor, "N D"]:
        """Features of whole records."""
        x = self.stem(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        return self.stages[-1](self.dropout(x)).mean(-1)


class _RowConv2d(nn.Conv2d):
    """The middle row of a 3x3 convolution, all that meets data on a map one row high; takes 3x3 weights too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, (1, 3), (1, stride), (0, 1), bias=False)

    def reset_parameters(self) -> None:
        """As the rows of 3x3 kernels are drawn (He, fan out)."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / (9 * self.out_channels)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape[2:] == (3, 3):
            state_dict[prefix + "weight"] = weight[:, :, 1:2]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Block2d(nn.Module):
    """torchvision's basic block with the same parameter names, at any width."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _RowConv2d(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _RowConv2d(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, (1, stride), bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class ResNet2d(nn.Module):
    """Residual network over leads x time whose stem collapses the leads; keeps the time axis.

    Parameter names are torchvision's, so its weights load (of each 3x3 kernel the middle row).

    Args:
        name: a key of :data:`BACKBONES_2D`.
        leads: height of the stem's kernel.
        dropout: before the last stage (the authors' default configuration uses 0.35).
        pretrained: start from torchvision's ImageNet weights (downloads them).

    Shapes:
        ``[N, 1, leads, L]`` -> ``[N, out_channels, 1, T]``, ``T = feature_length(L)``.

    Raises:
        ValueError: unknown name, ``pretrained`` for a backbone without published weights, or another number of leads.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self, name: str = "resnet18", leads: int = 12, dropout: float = 0.0, *, pretrained: bool = False
    ) -> None:
        super().__init__()
        if name not in BACKBONES_2D:
            raise ValueError(f"backbone: found {name!r}, needed one of {sorted(BACKBONES_2D)}")
        width, blocks = BACKBONES_2D[name]
        self.out_channels = 8 * width
        self.conv1 = nn.Conv2d(1, width, (leads, 7), (1, 2), (0, 3), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d((1, 3), (1, 2), (0, 1))
        inputs = width
        for stage, count in enumerate(blocks):
            outputs, stride = width * 2**stage, 1 if stage == 0 else 2
            layers = [_Block2d(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(count)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            inputs = outputs
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not isinstance(module, _RowConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if pretrained:
            self._load_imagenet(name, leads)

    def _load_imagenet(self, name: str, leads: int) -> None:
        sources = {"resnet18": (resnet18, ResNet18_Weights), "resnet34": (resnet34, ResNet34_Weights)}
        if name not in sources:
            raise ValueError(f"pretrained: no published weights for {name!r}, needed one of {sorted(sources)}")
        build, weights = sources[name]
        state = build(weights=weights.DEFAULT).state_dict()
        kernel = state["conv1.weight"].mean(dim=1, keepdim=True)
        state["conv1.weight"] = F.interpolate(kernel, (leads, 7), mode="bilinear") * (7 / leads)
        self.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})

    def forward(self, x: Float[Tensor, "N 1 leads L"]) -> Float[Tensor, "N D 1 T"]:
        """Feature sequence of each record."""
        if x.shape[2] != self.conv1.kernel_size[0]:
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [N, 1, {self.conv1.kernel_size[0]}, L]")
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.layer4(self.dropout(x))
