"""The network of EvalProtoPNet, its alignment of deep with shallow features, and its head of positive weights.

Source: "Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype Networks", ICCV 2023,
arXiv 2212.05946. Difference from the authors' code: a location with a zero feature vector has similarity 0 instead of
NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets
from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes import PartPrototypes

__all__ = ["EvalProtoPNet", "EvalProtoPNetOutput", "SDFALoss", "ScoreAggregation"]


class SDFALoss(nn.Module):
    """Shallow-deep feature alignment: where a prototype fires, deep similarities are to follow the shallow ones.

    ``mean over n, k, q of relu(|S_d[l_nk, q] - S_s[l_nk, q]| - threshold)``: ``S_d`` and ``S_s`` are the cosine
    similarities between the places of the deep map, and of the shallow map folded to the same grid; ``l_nk`` is the
    place where prototype k of the image's own class is most similar (the first in row-major order). No gradient flows
    into the shallow map or through the choice of the place.

    Args:
        prototypes_per_class: K.
        threshold: differences below it are free.
        eps: a feature vector up to this norm has similarity 0 and no gradient.

    Shapes:
        maps ``[N, P, h, w]``, shallow ``[N, Cs, s h, s w]``, deep ``[N, Cd, h, w]``, targets ``[N]`` -> scalar.

    Raises:
        ValueError: K below 1, a negative threshold; maps of other than four axes; P not a multiple of K; a shallow map
            that is no whole multiple of the deep one, the same in both directions; maps of another size or number of
            images than the deep ones; targets outside 0..P/K-1.

    Source:
        arXiv 2212.05946, section 5 (SDFA module).

    Example:
        >>> import torch
        >>> from proto_vision.evalprotopnet import SDFALoss
        >>> maps, shallow, deep = torch.rand(2, 6, 3, 3), torch.rand(2, 4, 6, 6), torch.rand(2, 8, 3, 3)
        >>> SDFALoss(2)(maps, shallow, deep, torch.tensor([0, 2])).shape
        torch.Size([])
    """

    def __init__(self, prototypes_per_class: int, *, threshold: float = 0.1, eps: float = 1e-12) -> None:
        super().__init__()
        if prototypes_per_class < 1:
            raise ValueError(f"prototypes_per_class: found {prototypes_per_class}, needed 1 or more")
        if not threshold >= 0:
            raise ValueError(f"threshold: found {threshold}, needed at least 0")
        self.prototypes_per_class, self.threshold, self.eps = prototypes_per_class, threshold, eps

    def extra_repr(self) -> str:
        """Settings."""
        return f"prototypes_per_class={self.prototypes_per_class}, threshold={self.threshold}, eps={self.eps}"

    def forward(
        self,
        maps: Float[Tensor, "N P h w"],
        shallow: Float[Tensor, "N Cs Hs Ws"],
        deep: Float[Tensor, "N Cd h w"],
        targets: Int[Tensor, "N"],
    ) -> Float[Tensor, ""]:
        """Loss of a batch; 0 for an empty one."""
        if not maps.ndim == shallow.ndim == deep.ndim == 4:
            shapes = ", ".join(str(tuple(x.shape)) for x in (maps, shallow, deep))
            raise ValueError(f"maps, shallow, deep: found {shapes}, needed four axes each, [N, P, h, w] in maps")
        count, per_class = maps.shape[1], self.prototypes_per_class
        if count % per_class:
            raise ValueError(f"maps: found {count} prototypes, needed a multiple of {per_class}")
        classes = count // per_class
        check_class_targets(maps.flatten(1), targets, "maps", classes=classes, empty=True)
        step = self._stride(shallow, deep)
        sizes = [(len(x), *x.shape[2:]) for x in (maps, deep)]
        if sizes[0] != sizes[1] or len(shallow) != len(deep):
            shapes = ", ".join(str(tuple(x.shape)) for x in (maps, shallow, deep))
            raise ValueError(
                f"maps, shallow, deep: found {shapes}, needed N images each, and maps of the deep ones' size"
            )
        rows = targets.long()[:, None] * per_class + torch.arange(per_class, device=maps.device)
        own = maps.detach().flatten(2).gather(1, rows[:, :, None].expand(-1, -1, maps.shape[2] * maps.shape[3]))
        places = own.argmax(2)
        found = self._rows(deep, places)
        with torch.no_grad():
            wanted = self._rows(_folded(shallow.detach(), step), places)
        return (found - wanted).abs().sub(self.threshold).relu().sum() / max(found.numel(), 1)

    def _stride(self, shallow: Tensor, deep: Tensor) -> int:
        (tall, wide), (h, w) = shallow.shape[2:], deep.shape[2:]
        if h == 0 or w == 0 or tall % h or wide % w or tall // h != wide // w or tall < h:
            found = f"{tuple(shallow.shape)} and {tuple(deep.shape)}"
            raise ValueError(f"shallow, deep: found {found}, needed a shallow map s times as high and as wide, s whole")
        return tall // h

    def _rows(self, features: Tensor, places: Int[Tensor, "N K"]) -> Float[Tensor, "N K L"]:
        """Cosine similarity of each chosen place to all places."""
        vectors = full_precision(features).flatten(2).transpose(1, 2)
        norm = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
        seen = norm > self.eps
        unit = vectors * torch.where(seen, 1 / torch.where(seen, norm, 1), 0)
        chosen = unit.gather(1, places[:, :, None].expand(-1, -1, unit.shape[2]))
        with no_autocast(unit):
            return chosen @ unit.transpose(1, 2)


def _folded(shallow: Float[Tensor, "N Cs Hs Ws"], step: int) -> Float[Tensor, "N folded h w"]:
    """Space to depth: each block of step x step places becomes one place; an empty batch stays one."""
    blocks = shallow.unflatten(3, (-1, step)).unflatten(2, (-1, step))
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class ScoreAggregation(nn.Module):
    """Logits as weighted sums of the own prototypes alone: ``logit_c = sum_k omega_ck a_ck``, no other class speaks.

    ``omega_c`` is K times the softmax over the class's K weights; at the start all are 1.

    Args:
        num_classes: C.
        prototypes_per_class: K.

    Attributes:
        weight: Parameter ``[C K]``, ones.

    Raises:
        ValueError: a size below 1, activations of another width.

    Source:
        arXiv 2212.05946, section 5 (SA module).

    Example:
        >>> import torch
        >>> from proto_vision.evalprotopnet import ScoreAggregation
        >>> ScoreAggregation(2, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[3., 7.]], grad_fn=<SumBackward1>)
    """

    def __init__(self, num_classes: int, prototypes_per_class: int) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("prototypes_per_class", prototypes_per_class)):
            if value < 1:
                raise ValueError(f"{name}: found {value}, needed 1 or more")
        self.num_classes, self.prototypes_per_class = num_classes, prototypes_per_class
        self.weight = nn.Parameter(torch.ones(num_classes * prototypes_per_class))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_classes={self.num_classes}, prototypes_per_class={self.prototypes_per_class}"

    def shares(self) -> Float[Tensor, "C K"]:
        """``omega``: positive, K in sum for each class."""
        return self.weight.unflatten(0, (self.num_classes, -1)).softmax(1) * self.prototypes_per_class

    def forward(self, activations: Float[Tensor, "N P"]) -> Float[Tensor, "N C"]:
        """Logits."""
        if activations.ndim != 2 or activations.shape[1] != len(self.weight):
            raise ValueError(f"activations: found shape {tuple(activations.shape)}, needed [N, {len(self.weight)}]")
        return (activations.unflatten(1, (self.num_classes, -1)) * self.shares()).sum(2)


class EvalProtoPNetOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, C]``.
        max_cosine: ``[N, P]`` highest cosine similarities, for the losses.
        maps: ``[N, P, h, w]`` similarities whose maxima the logits are sums of.
        shallow: ``[N, Cs, Hs, Ws]`` of the backbone.
        deep: ``[N, Cd, h, w]`` of the backbone, before the add-on.
    """

    logits: Tensor
    max_cosine: Tensor
    maps: Tensor
    shallow: Tensor
    deep: Tensor


class EvalProtoPNet(nn.Module):
    """Part prototypes over a backbone that also gives a shallow map; the head is :class:`ScoreAggregation`.

    Args:
        backbone: image -> ``(shallow, deep)``.
        deep_channels: channels of the deep map.
        num_classes: C.
        prototypes_per_class: K; P = C K.
        prototype_channels: D.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import torch
        >>> from proto_vision.backbones import create_backbone
        >>> from proto_vision.evalprotopnet import EvalProtoPNet
        >>> backbone, channels = create_backbone("conv3", shallow=True)
        >>> EvalProtoPNet(backbone, channels[1], 5)(torch.rand(2, 3, 16, 16)).maps.shape
        torch.Size([2, 50, 4, 4])
    """

    def __init__(
        self,
        backbone: nn.Module,
        deep_channels: int,
        num_classes: int,
        *,
        prototypes_per_class: int = 10,
        prototype_channels: int = 64,
    ) -> None:
        super().__init__()
        if deep_channels < 1:
            raise ValueError(f"deep_channels: found {deep_channels}, needed 1 or more")
        self.num_classes, self.prototypes_per_class = num_classes, prototypes_per_class
        self.backbone = backbone
        self.prototypes = PartPrototypes(num_classes, prototypes_per_class, prototype_channels, similarity="projection")
        convolution = nn.Conv2d(deep_channels, prototype_channels, 1)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        self.addon = nn.Sequential(convolution, nn.Sigmoid())
        self.aggregation = ScoreAggregation(num_classes, prototypes_per_class)

    def forward(self, images: Float[Tensor, "N channels S S"]) -> EvalProtoPNetOutput:
        """Logits and what the losses need."""
        shallow, deep = self.backbone(images)
        features = self.addon(deep)
        activations, maps = self.prototypes(features)
        cosines = self.prototypes.similarity_maps(features, "cosine").amax(dim=(2, 3))
        return EvalProtoPNetOutput(self.aggregation(activations), cosines, maps, shallow, deep)
