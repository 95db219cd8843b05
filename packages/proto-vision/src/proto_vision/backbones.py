"""Backbones by name: timm's, torchvision's, and a small one of plain convolutions. All give feature maps.

Source: timm (``features_only``), torchvision (the graph up to the last map). Weights are random unless asked for:
nothing is downloaded by default.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ConvBackbone", "FeatureMap", "create_backbone"]


class ConvBackbone(nn.Module):
    """3 x 3 convolutions with ReLU: for small images and quick experiments.

    Args:
        in_channels: of the image.
        widths: channels after each convolution.
        strides: of each; by default 1, then 2.
        norm: batch norm before each ReLU.

    Attributes:
        out_channels: channels of the last map.

    Shapes:
        ``[N, in_channels, S, S]`` -> ``[N, widths[-1], h, w]``; ``stages`` gives every map.

    Raises:
        ValueError: no width, or another number of strides.

    Example:
        >>> import torch
        >>> from proto_vision.backbones import ConvBackbone
        >>> ConvBackbone(1, (8, 16))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: tuple[int, ...] = (32, 64),
        strides: tuple[int, ...] | None = None,
        *,
        norm: bool = False,
    ) -> None:
        super().__init__()
        strides = (1, *[2] * (len(widths) - 1)) if strides is None else strides
        if not widths or len(strides) != len(widths):
            raise ValueError(f"widths, strides: found {widths} and {strides}, needed as many of each, one at least")
        self.layers = nn.ModuleList()
        for inputs, outputs, stride in zip((in_channels, *widths), widths, strides):
            steps: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)]
            self.layers.append(nn.Sequential(*steps, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()))
        self.widths, self.out_channels = tuple(widths), widths[-1]

    def forward(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N B h w"]:
        """The last map."""
        return self.stages(images)[-1]

    def stages(self, images: Float[Tensor, "N channels S S"]) -> list[Tensor]:
        """Every map, in order."""
        maps = [images]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps[1:]


class FeatureMap(nn.Module):
    """One or more maps of a network that gives several.

    Args:
        network: image -> list of maps.
        which: the maps that are wanted, as indices; one index gives a tensor, several a tuple.
    """

    def __init__(self, network: nn.Module, which: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.which = network, which

    def forward(self, images: Float[Tensor, "N channels S S"]) -> Any:
        """The wanted maps."""
        maps = self.network(images)
        return maps[self.which[0]] if len(self.which) == 1 else tuple(maps[i] for i in self.which)


SMALL = {
    "conv2": {"widths": (32, 64)},
    "conv3": {"widths": (32, 64, 128)},
    "conv4": {"widths": (32, 64, 64, 64), "strides": (1, 2, 2, 2), "norm": True},
}
"""Plain convolutions by name: two or three of them, or four with batch norm."""

_TORCHVISION_NODES = ("layer1", "layer2", "layer3", "layer4", "inception3b", "inception4e", "inception5b", "features")

_FEW_SHOT: dict[str, tuple[str, dict[str, Any]]] = {
    "convnet4": ("ConvNet4", {}),
    "resnet12": ("ResNet12", {}),
    "resnet12_640": ("ResNet12", {"widths": (64, 160, 320, 640)}),
}


def create_backbone(
    name: str,
    *,
    in_channels: int = 3,
    pretrained: bool = False,
    stage: int = -1,
    shallow: bool = False,
    image_size: int = 224,
) -> tuple[nn.Module, tuple[int, ...]]:
    """A backbone that turns images into feature maps.

    Args:
        name: a model of timm (``"resnet34"``, ``"vgg19_bn"``, ``"convnext_tiny"``), one of torchvision
            (``"torchvision/resnet34"``), ``"conv2"``, ``"conv3"``, ``"conv4"``, or for images of about 32 pixels
            ``"cifar_resnet18"``, ``"cifar_resnet34"`` (``"cifar_resnet18_w16"`` with 16 channels at first, not 64),
            ``"cifar_resnet20"`` to ``"cifar_resnet110"``; ``"convnet4"``, ``"resnet12"`` and
            ``"resnet12_640"`` (RFS: features of 640 channels) of few-shot learning.
        in_channels: of the images.
        pretrained: ImageNet weights; downloads them where they are not at hand.
        stage: which of the model's maps is the deep one; -2 leaves out a VGG's last pooling.
        shallow: also the map at a quarter of the image's size (the first stage's), as ``(shallow, deep)``.
        image_size: for transformers, whose weights depend on it.

    Returns:
        The module and the channels of its map, or of both.

    Raises:
        ValueError: an unknown name, or a model without feature maps.

    Example:
        >>> import torch
        >>> from proto_vision.backbones import create_backbone
        >>> network, channels = create_backbone("resnet18")
        >>> network(torch.zeros(1, 3, 64, 64)).shape, channels
        (torch.Size([1, 512, 2, 2]), (512,))
    """
    if pretrained and (name in SMALL or name in _FEW_SHOT or name.startswith("cifar_resnet")):
        raise ValueError(f"pretrained: there are no weights for {name!r}")
    if name in SMALL:
        small = ConvBackbone(in_channels, **SMALL[name])  # type: ignore[arg-type]
        which = _which(len(small.widths), stage, 0 if shallow else None)
        return FeatureMap(_Stages(small), which), tuple(small.widths[i] for i in which)
    if name in _FEW_SHOT or name.startswith("cifar_resnet"):
        network = _small_resnet(name, in_channels)
        which = _which(len(network.widths), stage, 0 if shallow else None)
        return FeatureMap(network, which), tuple(network.widths[i] for i in which)
    if name.startswith("torchvision/"):
        return _torchvision(name.removeprefix("torchvision/"), in_channels, pretrained, stage, shallow)
    return _timm(name, in_channels, pretrained, stage, shallow, image_size)


def _small_resnet(name: str, in_channels: int) -> Any:
    from proto_vision import few_shot_backbones
    from proto_vision.cifar_resnet import CIFARResNet

    if name in _FEW_SHOT:
        network, options = _FEW_SHOT[name]
        return getattr(few_shot_backbones, network)(in_channels, **options)
    return CIFARResNet.by_name(name, in_channels)


def _which(count: int, stage: int, first: int | None) -> tuple[int, ...]:
    """Indices of the wanted maps."""
    if not -count <= stage < count:
        raise ValueError(f"stage: found {stage}, needed one of the backbone's {count} maps")
    return (stage % count,) if first is None else (first, stage % count)


class _Stages(nn.Module):
    """All maps of a small backbone."""

    def __init__(self, network: ConvBackbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network.stages(images)


def _timm(
    name: str, in_channels: int, pretrained: bool, stage: int, shallow: bool, image_size: int
) -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        known = [*SMALL, "torchvision/NAME"]
        raise ValueError(f"backbone: timm has no model {name!r} (near: {near}); there are also {known}")
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_channels, "features_only": True}
    try:
        network: Any = timm.create_model(name, **options)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"backbone: {name!r} gives no feature maps ({str(error).splitlines()[0]})") from error
    if not network.feature_info.channels():
        raise ValueError(f"backbone: {name!r} gives no feature maps")
    fixed = getattr(network, "model", network)
    if hasattr(fixed, "set_input_size"):
        fixed.set_input_size(img_size=image_size)
    reduction, channels = network.feature_info.reduction(), network.feature_info.channels()
    first = next((i for i, r in enumerate(reduction) if r >= 4), 0) if shallow else None
    which = _which(len(channels), stage, first)
    return FeatureMap(network, which), tuple(channels[i] for i in which)


def _torchvision(
    name: str, in_channels: int, pretrained: bool, stage: int, shallow: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    if in_channels != 3:
        raise ValueError(f"in_channels: torchvision's models take 3, found {in_channels}")
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except ValueError as error:
        raise ValueError(f"backbone: torchvision has no model {name!r}") from error
    nodes = [n for n in _TORCHVISION_NODES if hasattr(network, n)]
    if not nodes:
        raise ValueError(f"backbone: {name!r} of torchvision gives no feature maps known here; timm may have it")
    which = _which(len(nodes), stage, 0 if shallow else None)
    if shallow and which[0] == which[1]:
        raise ValueError(f"backbone: {name!r} of torchvision has no first stage known here; take timm's")
    extractor = create_feature_extractor(network, {nodes[i]: str(i) for i in which})
    with torch.no_grad():
        maps = extractor.eval()(torch.zeros(1, 3, 224, 224))
    sizes = tuple(int(maps[str(i)].shape[1]) for i in which)
    return FeatureMap(_Listed(extractor.train()), tuple(range(len(which)))), sizes


class _Listed(nn.Module):
    """The maps of a dict as a list."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images).values())
