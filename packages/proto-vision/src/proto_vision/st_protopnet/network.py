"""The network of ST-ProtoPNet: one backbone, and two branches of part prototypes, trivial and support.

Source: "Learning Support and Trivial Prototypes for Interpretable Image Classification", ICCV 2023, arXiv 2301.04011.
Difference from the authors' code: the two-fold up-sampling of the cosine variant stands behind its two 1 x 1
convolutions instead of before them. Both are linear over the channels and the weights of the interpolation add up to
one, so that the order makes no difference, but a quarter of the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option
from proto_core.modes import evaluation_mode
from proto_core.precision import no_autocast
from proto_core.prototypes import PartPrototypes, PrototypeLayer, PushResult, project_prototypes

__all__ = ["BRANCHES", "STProtoPNet", "STProtoPNetOutput"]

BRANCHES = ("trivial", "support")


class STProtoPNetOutput(NamedTuple):
    """What the network says about a batch.

    Attributes:
        logits: ``[N, C]`` sum of both branches.
        logits_trivial: ``[N, C]``.
        logits_support: ``[N, C]``.
        max_trivial: ``[N, P]`` highest cosine similarities (rectified in the cosine variant), for the losses.
        max_support: ``[N, P]``.
        maps_trivial: ``[N, P, h, w]`` the similarity maps whose maxima the head sees.
        maps_support: ``[N, P, h, w]``.
    """

    logits: Tensor
    logits_trivial: Tensor
    logits_support: Tensor
    max_trivial: Tensor
    max_support: Tensor
    maps_trivial: Tensor
    maps_support: Tensor


class BranchOutput(NamedTuple):
    """What one branch says: logits ``[N, C]``, the head's input, cosines for the losses ``[N, P]``, maps."""

    logits: Tensor
    similarities: Tensor
    cosines: Tensor
    maps: Tensor


class STProtoPNet(nn.Module):
    """Two sets of part prototypes over one backbone; each has its add-on layers and its linear head.

    Trivial prototypes lie far from the other classes' prototypes, support prototypes near the border to them. The head
    gives a prototype weight 1 for its own class and ``incorrect_strength`` for the others; there is no bias.

    Args:
        backbone: image -> feature map ``[N, B, h, w]``.
        backbone_channels: B.
        num_classes: C.
        prototypes_per_class: K, in each branch; P = C K.
        prototype_channels: D.
        variant: ``"projection"``: add-ons end in tanh, the head sees ``<z, p / |p|>``, the losses cosines;
            ``"cosine"``: linear add-ons, head and losses see the rectified cosine.
        upsample: cosine variant, maps of twice the size.
        incorrect_strength: weight towards other classes.

    Raises:
        ValueError: a size below 1, an unknown variant, ``upsample`` with the projection variant.

    Source:
        arXiv 2301.04011, section 3.

    Example:
        >>> import torch
        >>> from proto_vision.backbones import ConvBackbone
        >>> from proto_vision.st_protopnet import STProtoPNet
        >>> net = STProtoPNet(ConvBackbone(1, (8, 16)), 16, 10, prototypes_per_class=2, prototype_channels=8)
        >>> out = net(torch.rand(4, 1, 8, 8))
        >>> out.logits.shape, out.maps_support.shape
        (torch.Size([4, 10]), torch.Size([4, 20, 4, 4]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        backbone_channels: int,
        num_classes: int,
        *,
        prototypes_per_class: int = 5,
        prototype_channels: int = 64,
        variant: str = "projection",
        upsample: bool = False,
        incorrect_strength: float = -0.5,
    ) -> None:
        super().__init__()
        self.variant = check_option("variant", variant, "projection", "cosine")
        if upsample and variant == "projection":
            raise ValueError("upsample: the projection variant has none, found True")
        if backbone_channels < 1:
            raise ValueError(f"backbone_channels: found {backbone_channels}, needed 1 or more")
        self.num_classes, self.prototypes_per_class = num_classes, prototypes_per_class
        self.upsample, self.incorrect_strength = upsample, incorrect_strength
        self.backbone = backbone

        def prototypes() -> PartPrototypes:
            return PartPrototypes(
                num_classes,
                prototypes_per_class,
                prototype_channels,
                similarity=variant,
                rectify=variant == "cosine",
            )

        self.prototypes_trivial, self.prototypes_support = prototypes(), prototypes()
        self.addon_trivial = self._addon(backbone_channels, prototype_channels)
        self.addon_support = self._addon(backbone_channels, prototype_channels)
        count = num_classes * prototypes_per_class
        self.head_trivial = nn.Linear(count, num_classes, bias=False)
        self.head_support = nn.Linear(count, num_classes, bias=False)
        self.reset_heads()

    def _addon(self, inputs: int, outputs: int) -> nn.Sequential:
        convolutions = [nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 1)]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        if self.variant == "projection":
            return nn.Sequential(convolutions[0], nn.Tanh(), convolutions[1], nn.Tanh())
        larger = [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)] if self.upsample else []
        return nn.Sequential(*convolutions, *larger)

    @torch.no_grad()
    def reset_heads(self) -> None:
        """Weight 1 from a prototype to its own class, ``incorrect_strength`` to the others."""
        for name in BRANCHES:
            own = self.layer(name).class_identity.T
            self.head(name).weight.copy_(own + self.incorrect_strength * (1 - own))

    def layer(self, branch: str) -> PartPrototypes:
        """The prototypes of a branch."""
        return getattr(self, f"prototypes_{branch}")

    def head(self, branch: str) -> nn.Linear:
        """The head of a branch."""
        return getattr(self, f"head_{branch}")

    def features(self, branch: str, backbone_map: Float[Tensor, "N B h w"]) -> Float[Tensor, "N D H W"]:
        """The map that a branch's prototypes are compared with."""
        return getattr(self, f"addon_{branch}")(backbone_map)

    def branch(self, name: str, backbone_map: Float[Tensor, "N B h w"]) -> BranchOutput:
        """One branch on a map of the backbone."""
        features, layer, head = self.features(name, backbone_map), self.layer(name), self.head(name)
        similarities, maps = layer(features)
        cosines = similarities
        if self.variant == "projection":
            cosines = layer.similarity_maps(features, "cosine").amax(dim=(2, 3))
        with no_autocast(similarities):  # a sum over all prototypes dwarfs what tells classes apart: bfloat16 loses it
            logits = F.linear(similarities, head.weight.to(similarities.dtype))
        return BranchOutput(logits, similarities, cosines, maps)

    def forward(self, images: Float[Tensor, "N channels S S"]) -> STProtoPNetOutput:
        """Both branches and the sum of their logits."""
        backbone_map = self.backbone(images)
        t, s = (self.branch(name, backbone_map) for name in BRANCHES)
        return STProtoPNetOutput(t.logits + s.logits, t.logits, s.logits, t.cosines, s.cosines, t.maps, s.maps)

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Bring both sets to unit length; the training does so after every step."""
        for name in BRANCHES:
            self.layer(name).normalize_()

    # -- projection (see proto_core.prototypes.projection.ProjectsPrototypes)

    def prototype_layers(self) -> dict[str, PrototypeLayer]:
        """Both sets."""
        return {name: self.layer(name) for name in BRANCHES}

    def prototype_features(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and one-hot targets of each set for ``(images, targets, index)``."""
        images, targets, _ = batch
        check_class_targets(images.flatten(1), targets, "images", classes=self.num_classes, empty=True)
        backbone_map, known = self.backbone(images), F.one_hot(targets.long(), self.num_classes)
        return {name: (self.features(name, backbone_map), known) for name in BRANCHES}

    def batch_index(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Number of each image."""
        return batch[2]

    def push(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, PushResult]:
        """Replace every prototype of both sets by the most similar place among the images of its class.

        One streaming pass in evaluation mode, without gradients. Similarity is the projection or the cosine, without
        ReLU; the first image, then the first place row by row, wins a tie; the new prototype has unit length. A class
        without an image keeps its prototypes, with image index -1.

        Args:
            batches: ``(images [n, channels, S, S], targets [n])`` of the training set, un-augmented.

        Returns:
            For each branch where its prototypes come from.

        Raises:
            ValueError: targets outside 0..C-1.
        """
        first: list[Tensor] = []

        def numbered() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
            seen = 0
            for images, targets in batches:
                if not first and len(images):
                    first.append(images[:1])
                yield images, targets, torch.arange(seen, seen + len(images), device=images.device)
                seen += len(images)

        found = project_prototypes(self, numbered(), lambda index: (f"image {index}", ()))
        width = self.map_size(first[0])[1] if first else 1
        results = {}
        for name, cases in found.items():
            missing = cases.sample_index < 0
            row, column = (x.masked_fill(missing, -1) for x in (cases.position // width, cases.position % width))
            results[name] = PushResult(cases.sample_index, row, column, cases.similarity)
        return results

    @torch.no_grad()
    def map_size(self, images: Float[Tensor, "N channels S S"]) -> tuple[int, int]:
        """Height and width of the similarity maps of such images."""
        with evaluation_mode(self):
            maps = self(images[:1]).maps_trivial
        return maps.shape[-2], maps.shape[-1]
