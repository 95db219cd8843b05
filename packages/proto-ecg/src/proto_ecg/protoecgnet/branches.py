"""The two kinds of ProtoECGNet branches: global 1D prototypes (rhythm), windowed 2D ones (morphology, diffuse).

Source: ProtoECGNet (arXiv 2504.08713). A branch is backbone -> add-on -> prototypes -> classifier without bias.
Differences from the authors' code: sizes come from arguments (labels, leads, record length), nothing is downloaded
unless asked for, and the mean over windows is computed without the array of all windows (same values).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.prototypes import (
    PointPrototypes,
    PrototypeLayer,
    WindowPrototypes,
    init_classifier_weight,
    prototype_class_matrix,
)
from proto_core.prototypes.windows import Pooling
from proto_ecg.protoecgnet.backbones import ResNet1d, ResNet2d

__all__ = ["Branch1d", "Branch2d", "BranchOutput", "ProtoECGBranch1d", "ProtoECGBranch2d"]


class BranchOutput(NamedTuple):
    """What a branch or the whole network answers: logits ``[N, C]`` and similarities ``[N, P]``."""

    logits: Tensor
    similarities: Tensor


@dataclass(frozen=True)
class Branch1d:
    """Settings of a rhythm branch; the labels and leads come from the data.

    Args:
        prototypes_per_class: prototypes of each label.
        prototypes_per_pair: prototypes of each pair of labels (0 in the paper).
        proto_dim: dimension D of a prototype.
        backbone: a key of ``BACKBONES_1D``.
        add_on: "linear" or "identity".
        dropout: before the last stage of the backbone.
    """

    prototypes_per_class: int = 5
    prototypes_per_pair: int = 0
    proto_dim: int = 512
    backbone: str = "resnet1d18"
    add_on: str = "linear"
    dropout: float = 0.0


@dataclass(frozen=True)
class Branch2d:
    """Settings of a morphology or diffuse branch; the labels and leads come from the data.

    Args:
        prototypes_per_class: prototypes of each label.
        prototypes_per_pair: prototypes of each pair of labels (0 in the paper).
        proto_dim: channels D of a prototype.
        window: steps W of a prototype (a step is 32 samples); ``None`` takes the whole record.
        backbone: a key of ``BACKBONES_2D``.
        add_on: "linear" or "identity".
        dropout: before the last stage of the backbone.
        pooling: "mean", "max" or "topk" over windows.
        pretrained: start the backbone from ImageNet weights (downloads them).
    """

    prototypes_per_class: int = 18
    prototypes_per_pair: int = 0
    proto_dim: int = 512
    window: int | None = 3
    backbone: str = "resnet18"
    add_on: str = "linear"
    dropout: float = 0.0
    pooling: Pooling = "mean"
    pretrained: bool = False


def _add_on(kind: str, inputs: int, outputs: int, *, over_time: bool) -> nn.Module:
    """Two linear maps with ReLU between and a sigmoid at the end, or nothing."""
    if kind == "identity":
        if inputs != outputs:
            raise ValueError(f"add_on 'identity' needs proto_dim equal to the backbone's {inputs}, found {outputs}")
        return nn.Identity()
    if kind != "linear":
        raise ValueError(f"add_on: found {kind!r}, needed 'linear' or 'identity'")
    if not over_time:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs), nn.Sigmoid())
    layers = _AtEachStep(nn.Conv2d(inputs, outputs, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 1), nn.Sigmoid())
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(torch.as_tensor(layer.bias))
    return layers


class _AtEachStep(nn.Sequential):
    """Layers that look at one step at a time, given the steps of all records as one long row.

    One product with the weights instead of one for each record.
    """

    def forward(self, x: Float[Tensor, "N F 1 T"]) -> Float[Tensor, "N D 1 T"]:
        if x.shape[0] == 0:  # a row without a step is refused; len() would fix the batch of an exported graph
            return super().forward(x)
        row = super().forward(x.transpose(0, 1).reshape(1, x.shape[1], 1, -1))
        return row.view(row.shape[1], x.shape[0], 1, x.shape[3]).transpose(0, 1)


class _Branch(nn.Module):
    """What both kinds share: similarity to prototypes, and a classifier without bias that starts at +1 / -0.5."""

    backbone: nn.Module
    add_on: nn.Module
    layer: PrototypeLayer
    config: Branch1d | Branch2d

    def _finish(self, class_identity: Tensor) -> None:
        count, classes = class_identity.shape
        self.num_classes = classes
        self.classifier = nn.Linear(count, classes, bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(init_classifier_weight(class_identity))

    @property
    def prototypes(self) -> nn.Parameter:
        """The prototypes, Parameter ``[P, D]`` or ``[P, D, 1, W]``."""
        return self.layer.prototypes

    @property
    def class_identity(self) -> Tensor:
        """Buffer ``[P, C]``, 1 where prototype p stands for class c."""
        return self.layer.class_identity

    def features(self, x: Tensor) -> Tensor:
        """What is compared to the prototypes: ``[N, D]`` (1D) or ``[N, D, 1, T]`` (2D)."""
        return self.add_on(self.backbone(x))

    def similarities(self, x: Tensor) -> Float[Tensor, "N P"]:
        """Similarity of every record to every prototype, windows pooled."""
        return self.layer(self.features(x))

    def forward(self, x: Tensor) -> BranchOutput:
        """Logits and similarities."""
        similarities = self.similarities(x)
        return BranchOutput(self.classifier(similarities.to(self.classifier.weight.dtype)), similarities)

    def off_class_l1(self) -> Float[Tensor, ""]:
        """Sum of the absolute classifier weights from prototypes to classes that they do not stand for."""
        return (self.classifier.weight.abs() * (self.class_identity.T == 0)).sum()

    def settings(self) -> dict[str, Any]:
        """Plain settings that rebuild this branch."""
        return asdict(self.config)


class ProtoECGBranch1d(_Branch):
    """Branch with global prototypes over time, for findings of the whole record (rhythm).

    Args:
        num_classes: number of labels C.
        prototypes_per_class: prototypes of each label.
        proto_dim: dimension D of a prototype.
        backbone: a key of ``BACKBONES_1D``.
        add_on: "linear" (Linear, ReLU, Linear, Sigmoid) or "identity".
        in_channels: number of leads.
        prototypes_per_pair: prototypes of each pair of labels.
        dropout: before the last stage of the backbone.

    Shapes:
        ``[N, in_channels, L]`` -> logits ``[N, C]``, similarities ``[N, P]``.

    Raises:
        ValueError: unknown backbone or add-on, no prototype.

    Example:
        >>> import torch
        >>> from proto_ecg.protoecgnet import ProtoECGBranch1d
        >>> branch = ProtoECGBranch1d(4, 2, proto_dim=32, backbone="resnet1d10_narrow")
        >>> branch(torch.randn(3, 12, 1000)).logits.shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        num_classes: int,
        prototypes_per_class: int = 5,
        proto_dim: int = 512,
        backbone: str = "resnet1d18",
        add_on: str = "linear",
        in_channels: int = 12,
        *,
        prototypes_per_pair: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = Branch1d(prototypes_per_class, prototypes_per_pair, proto_dim, backbone, add_on, dropout)
        identity = prototype_class_matrix(num_classes, prototypes_per_class, prototypes_per_pair)
        network = ResNet1d(backbone, in_channels, dropout)
        self.backbone = network
        self.add_on = _add_on(add_on, network.out_channels, proto_dim, over_time=False)
        self.layer = PointPrototypes(proto_dim, identity)
        self._finish(identity)


class ProtoECGBranch2d(_Branch):
    """Branch with prototypes that are windows of the record (morphology), or the whole of it (diffuse).

    Args:
        num_classes: number of labels C.
        prototypes_per_class: prototypes of each label.
        proto_dim: channels D of a prototype.
        window: steps W of a prototype; 32 is the whole of a record of 1000 samples.
        backbone: a key of ``BACKBONES_2D``.
        add_on: "linear" (1x1 convolution, ReLU, 1x1 convolution, Sigmoid) or "identity".
        dropout: before the last stage of the backbone.
        pooling: "mean", "max" or "topk" over windows.
        pretrained: start the backbone from ImageNet weights (downloads them).
        leads: number of leads.
        prototypes_per_pair: prototypes of each pair of labels.

    Shapes:
        ``[N, 1, leads, L]`` -> logits ``[N, C]``, similarities ``[N, P]``.

    Raises:
        ValueError: unknown backbone, add-on or pooling, no prototype; in ``forward`` a window longer than the record.

    Example:
        >>> import torch
        >>> from proto_ecg.protoecgnet import ProtoECGBranch2d
        >>> branch = ProtoECGBranch2d(4, 2, proto_dim=32, backbone="resnet10_narrow")
        >>> branch.features(torch.randn(3, 1, 12, 1000)).shape
        torch.Size([3, 32, 1, 32])
    """

    layer: WindowPrototypes

    def __init__(
        self,
        num_classes: int,
        prototypes_per_class: int,
        proto_dim: int = 512,
        window: int = 3,
        backbone: str = "resnet18",
        add_on: str = "linear",
        dropout: float = 0.0,
        pooling: Pooling = "mean",
        pretrained: bool = False,
        *,
        leads: int = 12,
        prototypes_per_pair: int = 0,
    ) -> None:
        super().__init__()
        self.config = Branch2d(
            prototypes_per_class, prototypes_per_pair, proto_dim, window, backbone, add_on, dropout, pooling, pretrained
        )
        identity = prototype_class_matrix(num_classes, prototypes_per_class, prototypes_per_pair)
        network = ResNet2d(backbone, leads, dropout, pretrained=pretrained)
        self.backbone = network
        self.add_on = _add_on(add_on, network.out_channels, proto_dim, over_time=True)
        self.layer = WindowPrototypes(proto_dim, window, identity, pooling=pooling)
        self._finish(identity)
