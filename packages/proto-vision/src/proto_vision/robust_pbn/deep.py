"""Deep prototype-based network: every channel of a backbone's map is a component, detected where it is strongest.

Source: "A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations", AAAI 2025, arXiv 2412.15499.
Differences from the authors' code: any backbone may take the place of the two; thresholds apply to both heads alike.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.checks import check_option, check_positive
from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes import ClassificationByComponents

__all__ = [
    "DeepPBN",
    "alignment_loss",
    "component_map",
    "pool_detections",
    "rbf_head_output",
    "tanh_uniformity_loss",
]

_ABSENT = 0.1


def component_map(features: Float[Tensor, "N K h w"]) -> Float[Tensor, "N K h w"]:
    """Softmax over the channels at every place: which component is there.

    Raises:
        ValueError: features that are not ``[N, K, h, w]``.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn import component_map
        >>> component_map(torch.zeros(1, 4, 1, 1)).flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if features.ndim != 4:
        raise ValueError(f"features: found shape {tuple(features.shape)}, needed [N, K, h, w]")
    return full_precision(features).softmax(dim=1)


def pool_detections(map: Float[Tensor, "N K h w"]) -> Float[Tensor, "N K"]:
    """The strongest value of every component.

    Raises:
        ValueError: a map that is not ``[N, K, h, w]``.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn import pool_detections
        >>> pool_detections(torch.tensor([[[[0.25, 0.75]]]]))
        tensor([[0.7500]])
    """
    if map.ndim != 4:
        raise ValueError(f"map: found shape {tuple(map.shape)}, needed [N, K, h, w]")
    return map.amax(dim=(2, 3))


def alignment_loss(map_a: Float[Tensor, "N K h w"], map_b: Float[Tensor, "N K h w"]) -> Float[Tensor, ""]:
    """``-log(<a, b> + 1e-12)``, mean over images and places: two views show the same component at the same place.

    The second map is held fixed, and the mean over both orders taken.

    Args:
        map_a: component maps of one view.
        map_b: of the other.

    Returns:
        Scalar; 0 without an image.

    Raises:
        ValueError: maps of different shape.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn import alignment_loss
        >>> one = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
        >>> alignment_loss(one, one).abs(), alignment_loss(one, torch.full((1, 2, 1, 1), 0.5))
        (tensor(0.), tensor(0.6931))
    """
    if map_a.ndim != 4 or map_a.shape != map_b.shape:
        shapes = f"{tuple(map_a.shape)} and {tuple(map_b.shape)}"
        raise ValueError(f"map_a, map_b: found shapes {shapes}, needed the same [N, K, h, w]")
    a, b = full_precision(map_a), full_precision(map_b)

    def one_way(moving: Tensor, fixed: Tensor) -> Tensor:
        agreement = (moving * fixed.detach()).sum(dim=1)
        return -(agreement + 1e-12).log().sum() / max(agreement.numel(), 1)

    return (one_way(a, b) + one_way(b, a)) / 2


def tanh_uniformity_loss(
    detections_a: Float[Tensor, "N K"], detections_b: Float[Tensor, "N K"], eps: float = 1e-8
) -> Float[Tensor, ""]:
    """``-mean_k log(tanh(sum_n d_nk) + eps)``, mean of two views: every component is somewhere in the batch.

    Args:
        detections_a: of one view.
        detections_b: of the other.
        eps: added inside the logarithm.

    Raises:
        ValueError: detections of different shape, eps not positive.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn import tanh_uniformity_loss
        >>> seen, unseen = torch.ones(1, 1), torch.zeros(1, 1)
        >>> tanh_uniformity_loss(seen, seen), tanh_uniformity_loss(unseen, unseen)
        (tensor(0.2723), tensor(18.4207))
    """
    if detections_a.ndim != 2 or detections_a.shape != detections_b.shape:
        shapes = f"{tuple(detections_a.shape)} and {tuple(detections_b.shape)}"
        raise ValueError(f"detections_a, detections_b: found shapes {shapes}, needed the same [N, K]")
    check_positive(eps=eps)
    sums = torch.stack([full_precision(part).sum(dim=0) for part in (detections_a, detections_b)])
    return -(sums.tanh() + eps).log().mean()


def rbf_head_output(detections: Float[Tensor, "N K"], weight: Float[Tensor, "C K"]) -> Float[Tensor, "N C"]:
    """``detections @ softmax(weight, 1)^T``: an RBF network whose weights are positive and add up to 1 in each class.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn import rbf_head_output
        >>> rbf_head_output(torch.tensor([[0.5, 1.0]]), torch.zeros(3, 2))
        tensor([[0.7500, 0.7500, 0.7500]])
    """
    if detections.ndim != 2 or weight.ndim != 2 or detections.shape[1] != weight.shape[1]:
        shapes = f"{tuple(detections.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"detections, weight: found shapes {shapes}, needed [N, K] and [C, K]")
    shares = full_precision(weight).softmax(dim=1)
    detections = full_precision(detections)
    dtype = torch.promote_types(detections.dtype, shares.dtype)
    with no_autocast(detections):
        return detections.to(dtype) @ shares.to(dtype).T


class DeepPBN(nn.Module):
    """Component map (softmax over channels), detections (its maxima), and class probabilities from them.

    Args:
        num_classes: C, at least 2.
        backbone: ``"convnext_tiny"`` or ``"resnet50"`` (torchvision, with strides taken out so that 224 pixels give
            maps of 26 or 28), or a module that gives ``[N, K, h, w]``, K being the channels of its last convolution.
        num_components: ``None``: every channel of the backbone is a component; otherwise a 1x1 convolution makes this
            many.
        head: ``"cbc"``, or ``"rbf"`` (the baseline: positive reasoning alone).
        pretrained: ImageNet weights of a named backbone (a download).

    Attributes:
        backbone: images -> map.
        add_on: 1x1 convolution (Xavier-uniform) or Identity.
        head: :class:`~proto_core.prototypes.ClassificationByComponents`; ``None`` with ``"rbf"``.
        rbf_weight: with ``"rbf"``, Parameter ``[C, K]`` from N(1, 0.1).

    Shapes:
        images -> component map ``[N, K, h, w]``, detections ``[N, K]``, probabilities ``[N, C]``.

    Raises:
        ValueError: fewer than two classes, a size below 1, an unknown head or backbone, a module without a
            convolution; a map of other channels than expected.

    Source:
        arXiv 2412.15499, section 4.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from proto_vision.robust_pbn import DeepPBN
        >>> net = DeepPBN(3, nn.Conv2d(1, 8, 3), num_components=5)
        >>> [tuple(part.shape) for part in net(torch.rand(2, 1, 6, 6))]
        [(2, 5, 4, 4), (2, 5), (2, 3)]
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module = "convnext_tiny",
        num_components: int | None = None,
        head: str = "cbc",
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, needed at least 2")
        self.head_kind = check_option("head", head, "cbc", "rbf")
        self.backbone_name = backbone if isinstance(backbone, str) else None
        self.backbone = _named(backbone, pretrained) if isinstance(backbone, str) else backbone
        channels = _channels(self.backbone)
        self.num_classes, self.num_components = num_classes, channels
        self.add_on: nn.Module = nn.Identity()
        if num_components is not None:
            check_positive(num_components=num_components)
            self.num_components = num_components
            self.add_on = nn.Conv2d(channels, num_components, 1)
            nn.init.xavier_uniform_(self.add_on.weight)
        if head == "cbc":
            self.head = ClassificationByComponents(self.num_components, num_classes)
        else:
            self.rbf_weight = nn.Parameter(1 + 0.1 * torch.randn(num_classes, self.num_components))

    def extra_repr(self) -> str:
        """Sizes and the head."""
        return f"num_classes={self.num_classes}, num_components={self.num_components}, head={self.head_kind!r}"

    def trained_backbone(self) -> tuple[str, ...]:
        """Patterns of the names of the backbone's parameters that are ever trained."""
        parts = _TRAINED.get(self.backbone_name or "", ("*",))
        return tuple(f"backbone.{part}" for part in parts)

    def forward(
        self, x: Float[Tensor, "N channels H W"], inference: bool = False
    ) -> tuple[Float[Tensor, "N K h w"], Float[Tensor, "N K"], Float[Tensor, "N C"]]:
        """Component map, detections and probabilities; in inference detections below 0.1 become 0."""
        features = self.add_on(self.backbone(x))
        if features.ndim != 4 or features.shape[1] != self.num_components:
            needed = f"[N, {self.num_components}, h, w]"
            raise ValueError(f"backbone: found a map of shape {tuple(features.shape)}, needed {needed}")
        maps = component_map(features)
        detections = pool_detections(maps)
        if inference:
            detections = torch.where(detections < _ABSENT, 0, detections)
        if self.head_kind == "cbc":
            return maps, detections, self.head(detections)
        return maps, detections, rbf_head_output(detections, self.rbf_weight)

    def evidence_weights(self) -> tuple[Float[Tensor, "C K"], Float[Tensor, " C"]]:
        """What a class's probability is made of: a weight for every detection, and what it has without any."""
        if self.head_kind == "rbf":
            shares = full_precision(self.rbf_weight).softmax(dim=1)
            return shares, shares.new_zeros(len(shares))
        positive, negative = self.head.reasoning
        return (positive - negative).T, negative.sum(dim=0)

    @torch.no_grad()
    def shrink_(self, step: float = 1e-3) -> None:
        """Lower the weights of the RBF head, not below 0, in place; does nothing to the other head."""
        if self.head_kind == "rbf":
            self.rbf_weight.sub_(step).clamp_(min=0)


_TRAINED = {"convnext_tiny": ("6.*", "7.*"), "resnet50": ("layer3.*", "layer4.*")}


def _channels(backbone: nn.Module) -> int:
    """Channels of the last convolution."""
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"backbone: found no Conv2d in {type(backbone).__name__}, needed one that names the channels")
    return convolutions[-1].out_channels


def _named(name: str, pretrained: bool) -> nn.Module:
    """A backbone of torchvision up to its last map, in which two strides of 2 are taken out."""
    from torchvision import models

    check_option("backbone", name, "convnext_tiny", "resnet50")
    network: Any = models.get_model(name, weights="DEFAULT" if pretrained else None)
    if name == "convnext_tiny":
        for place in (4, 6):
            network.features[place][1].stride = (1, 1)
        return network.features
    for layer in (network.layer3, network.layer4):
        layer[0].conv2.stride = (1, 1)
        layer[0].downsample[0].stride = (1, 1)
    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return nn.Sequential(OrderedDict((part, getattr(network, part)) for part in parts))
