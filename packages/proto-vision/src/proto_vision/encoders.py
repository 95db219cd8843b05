"""Networks by name that turn an image into one feature vector, and which of their parameters a part of them is.

Source: timm (its pooled features: the class token of a ViT of DINO), and the maps of :mod:`proto_vision.backbones`,
averaged over their places. Weights are random unless asked for: nothing is downloaded by default.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from proto_vision.backbones import SMALL, create_backbone

__all__ = ["Trained", "create_encoder", "last_block", "trained_patterns"]

Trained = Literal["all", "last", "none"]

_MLP = (256, 64)


def create_encoder(
    name: str, *, in_channels: int = 3, image_size: int = 224, pretrained: bool = False
) -> tuple[nn.Module, int]:
    """A network by name: images ``[N, channels, S, S]`` -> features ``[N, D]``.

    Args:
        name: a model of timm (``"vit_base_patch16_224.dino"``, ``"resnet50"``), one of torchvision
            (``"torchvision/resnet34"``), ``"conv2"``, ``"conv3"``, ``"conv4"``, ``"cifar_resnet18"``, or ``"mlp"``
            (pixels, 256 hidden units, 64 features: for images of a few pixels).
        in_channels: of the images.
        image_size: height and width, which transformers and ``"mlp"`` depend on.
        pretrained: the model's weights; downloads them where they are not at hand.

    Returns:
        The module and D.

    Raises:
        ValueError: an unknown name, or weights that there are not.

    Example:
        >>> import torch
        >>> from proto_vision.encoders import create_encoder
        >>> network, dim = create_encoder("conv3", in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape, dim
        (torch.Size([2, 128]), 128)
    """
    if name == "mlp":
        if pretrained:
            raise ValueError("pretrained: there are no weights for 'mlp'")
        inputs = in_channels * image_size**2
        steps = nn.Linear(inputs, _MLP[0]), nn.GELU(), nn.Linear(*_MLP)
        return nn.Sequential(nn.Flatten(), *steps), _MLP[1]
    if name in SMALL or name.startswith(("torchvision/", "cifar_resnet")):
        maps, channels = create_backbone(name, in_channels=in_channels, pretrained=pretrained, image_size=image_size)
        return nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels[0]
    import timm

    if not timm.is_model(name):
        near, known = timm.list_models(f"*{name}*")[:5], [*SMALL, "mlp", "torchvision/NAME"]
        raise ValueError(f"backbone: timm has no model {name!r} (near: {near}); there are also {known}")
    network: Any = timm.create_model(name, pretrained=pretrained, in_chans=in_channels, num_classes=0)
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=image_size)
    return network, int(getattr(network, "head_hidden_size", None) or network.num_features)


def last_block(network: nn.Module) -> str:
    """Name of a network's last block: of a transformer's ``blocks``, of ``stages`` or ``layers``, or ``layer4``.

    Raises:
        ValueError: the network has none of these.

    Example:
        >>> from proto_vision.encoders import create_encoder, last_block
        >>> last_block(create_encoder("resnet18")[0])
        'layer4'
    """
    rows = [
        (name, module)
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in ("blocks", "stages", "layers") and len(list(module.children())) > 0
    ]
    if rows:
        name, module = min(rows, key=lambda row: row[0].count("."))
        return f"{name}.{list(module.named_children())[-1][0]}"
    if hasattr(network, "layer4"):
        return "layer4"
    raise ValueError(f"trained: found 'last', but {type(network).__name__} has no blocks; needed 'all' or 'none'")


def trained_patterns(network: nn.Module, trained: Trained) -> tuple[str, ...]:
    """Patterns of the names of a network's parameters that are to train, for a :class:`~proto_core.training.Stage`.

    Args:
        network: of :func:`create_encoder`.
        trained: ``"all"``, ``"last"`` (its last block alone, without the norm behind it) or ``"none"``.

    Raises:
        ValueError: another word, or ``"last"`` of a network without blocks.

    Example:
        >>> from proto_vision.encoders import create_encoder, trained_patterns
        >>> trained_patterns(create_encoder("conv2")[0], "last")
        ('0.network.network.layers.1.*',)
    """
    if trained not in ("all", "last", "none"):
        raise ValueError(f"trained: found {trained!r}, needed 'all', 'last' or 'none'")
    if trained == "last":
        return (f"{last_block(network)}.*",)
    return ("*",) if trained == "all" else ()
