"""Prototypes that are parts: small patches of a feature map, compared with every place of a map.

ProtoPNet's own layer of distances (as arXiv 2011.02863 explains it), and those of its descendants: TesNet's projection
and the cosine, as ST-ProtoPNet (ICCV 2023, arXiv 2301.04011) and EvalProtoPNet (ICCV 2023, arXiv 2212.05946) use them.
Unlike in ST-ProtoPNet's repository, a class without an image keeps its prototypes when they are pushed onto cases,
and a tie that is only rounding goes to the first image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, check_positive
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.prototypes.classes import prototype_class_matrix
from proto_core.prototypes.layers import PrototypeLayer
from proto_core.prototypes.projection import project_layer

__all__ = ["PartPrototypes", "PushResult", "push_part_prototypes"]

_SIMILARITIES = ("cosine", "projection", "l2_log")


class PartPrototypes(PrototypeLayer):
    """Patches of a feature map, ``prototypes_per_class`` for each class, class-major.

    With ``norm`` the division by the Euclidean norm over the channels (a zero vector stays zero), the map of
    similarities is ``conv2d(norm(Z), norm(P))`` for ``similarity="cosine"`` and ``conv2d(Z, norm(P))`` for
    ``"projection"``. ``"l2_log"`` is ProtoPNet's: ``log((d + 1) / (d + epsilon))`` of the squared distance d between
    prototype and patch, above 0 and at most ``log(1 / epsilon)``. The map is pooled by its maximum.

    Args:
        num_classes: C.
        prototypes_per_class: K; the layer holds P = C K prototypes.
        channels: D.
        patch_size: height and width of a patch, in places of the map.
        similarity: ``"cosine"``, ``"projection"`` or ``"l2_log"``.
        rectify: ReLU on the map before it is pooled.
        epsilon: of ``"l2_log"``.

    Attributes:
        prototypes: Parameter ``[P, D, h, w]``, from U[0, 1).
        class_identity: buffer ``[P, C]``.

    Raises:
        ValueError: a size below 1, an unknown similarity, an epsilon that is not positive; features that are not
            ``[N, D, H, W]`` with room for a patch.

    Shapes:
        features ``[N, D, H, W]`` -> pooled ``[N, P]``, maps ``[N, P, H - h + 1, W - w + 1]``.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import PartPrototypes
        >>> pooled, maps = PartPrototypes(3, 2, 8)(torch.randn(4, 8, 7, 7))
        >>> pooled.shape, maps.shape
        (torch.Size([4, 6]), torch.Size([4, 6, 7, 7]))
    """

    def __init__(
        self,
        num_classes: int,
        prototypes_per_class: int,
        channels: int,
        *,
        patch_size: int = 1,
        similarity: str = "cosine",
        rectify: bool = False,
        epsilon: float = 1e-4,
    ) -> None:
        sizes = {"num_classes": num_classes, "prototypes_per_class": prototypes_per_class}
        for name, value in {**sizes, "channels": channels, "patch_size": patch_size}.items():
            if value < 1:
                raise ValueError(f"{name}: found {value}, needed at least 1")
        check_positive(epsilon=epsilon)
        super().__init__((channels, patch_size, patch_size), prototype_class_matrix(num_classes, prototypes_per_class))
        self.num_classes = num_classes
        self.prototypes_per_class = prototypes_per_class
        self.similarity = check_option("similarity", similarity, *_SIMILARITIES)
        self.rectify, self.epsilon = rectify, epsilon

    def reset_parameters(self) -> None:
        """Draw the prototypes from U[0, 1) and forget the cases."""
        super().reset_parameters()
        nn.init.uniform_(self.prototypes)

    def forward(self, features: Float[Tensor, "N D H W"]) -> tuple[Float[Tensor, "N P"], Float[Tensor, "N P h w"]]:
        """Highest similarity to every prototype, and the map it is the maximum of."""
        maps = self.similarity_maps(features)
        maps = maps.relu() if self.rectify else maps
        return maps.amax(dim=(2, 3)), maps

    def similarity_maps(
        self, features: Float[Tensor, "N D H W"], similarity: str | None = None
    ) -> Float[Tensor, "N P h w"]:
        """Similarities at every place, before any ReLU; ``similarity`` asks for another kind than the layer's own."""
        kind = self.similarity if similarity is None else check_option("similarity", similarity, *_SIMILARITIES)
        return self._maps(features, self.prototypes, kind)

    def distance_maps(self, features: Float[Tensor, "N D H W"]) -> Float[Tensor, "N P h w"]:
        """Squared distances ``relu(|Z|^2 - 2 <Z, P> + |P|^2)`` of every patch, whatever the layer's similarity."""
        return _squared_distances(self._checked(features), self.prototypes)

    def _checked(self, features: Tensor) -> Tensor:
        _, channels, height, width = self.prototypes.shape
        fits = features.ndim == 4 and features.shape[1] == channels
        if not fits or features.shape[2] < height or features.shape[3] < width:
            needed = f"[N, {channels}, H, W] with H at least {height} and W at least {width}"
            raise ValueError(f"features: found shape {tuple(features.shape)}, needed {needed}")
        return features

    def _maps(self, features: Tensor, prototypes: Tensor, kind: str) -> Tensor:
        features = self._checked(features)
        if kind == "l2_log":
            distances = _squared_distances(features, prototypes)
            return ((distances + 1) / (distances + self.epsilon)).log()
        features = unit_channels(features) if kind == "cosine" else full_precision(features)
        with no_autocast(features):
            return F.conv2d(features, unit_channels(prototypes))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Rescale every prototype to unit norm over the channels, in place."""
        self.prototypes.copy_(unit_channels(self.prototypes))

    def match(self, features: Tensor, active: Int[Tensor, " A"]) -> Float[Tensor, "n A K"]:
        """See :class:`PrototypeLayer`; positions are places of the map, row by row, and there is no ReLU."""
        return self._maps(features, self.prototypes[active], self.similarity).flatten(2)

    def take(self, features: Tensor, rows: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Tensor:
        """See :class:`PrototypeLayer`; the patch at a place, of unit norm over the channels unless distances count."""
        height, width = self.prototypes.shape[2:]
        columns = features.shape[3] - width + 1
        down = (positions // columns).unsqueeze(1) + torch.arange(height, device=positions.device)
        across = (positions % columns).unsqueeze(1) + torch.arange(width, device=positions.device)
        patches = features[rows[:, None, None], :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
        return patches if self.similarity == "l2_log" else unit_channels(patches)

    def extra_repr(self) -> str:
        """Sizes, settings and how many prototypes are real cases."""
        return f"{super().extra_repr()}, similarity={self.similarity!r}, rectify={self.rectify}"


class PushResult(NamedTuple):
    """Where each part prototype found its case.

    Attributes:
        image_index: ``[P]`` image in the order they came, -1 for a class without an image.
        row: ``[P]`` upper end of the patch in the map, -1 without an image.
        col: ``[P]`` left end of the patch in the map, -1 without an image.
        similarity: ``[P]`` similarity before the push, ``-inf`` without an image.
    """

    image_index: Tensor
    row: Tensor
    col: Tensor
    similarity: Tensor


@torch.no_grad()
def push_part_prototypes(layer: PartPrototypes, batches: Iterable[tuple[Tensor, Tensor]]) -> PushResult:
    """Replace every prototype by the most similar patch among the images of its class, scaled to unit norm (as it is
    for ``"l2_log"``).

    Similarity is the layer's own, without the ReLU; the first image, then the first place row by row, wins a tie. A
    class without an image keeps its prototypes. One pass, one batch in memory. :func:`~proto_core.prototypes.
    project_prototypes` does the same for a whole module on several processes, and remembers the names of the cases.

    Args:
        layer: its ``prototypes`` are overwritten.
        batches: features ``[n, D, H, W]`` and class indices ``[n]`` of the training images, un-augmented, network in
            evaluation mode; maps of one size.

    Raises:
        ValueError: features that do not fit the layer, maps of two sizes, targets outside 0..C-1.

    Source:
        ST-ProtoPNet (arXiv 2301.04011), push stage.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import PartPrototypes, push_part_prototypes
        >>> layer = PartPrototypes(2, 1, 2)
        >>> features = torch.tensor([[3.0, 0.0], [0.0, 2.0]])[:, :, None, None]
        >>> push_part_prototypes(layer, [(features, torch.tensor([0, 1]))]).image_index
        tensor([0, 1])
        >>> layer.prototypes.data.flatten(1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    sizes: list[tuple[int, int]] = []

    def labelled() -> Iterable[tuple[Tensor, Tensor]]:
        for features, targets in batches:
            check_class_targets(features.flatten(1), targets, "features", classes=layer.num_classes, empty=True)
            sizes.append((features.shape[-2], features.shape[-1]))
            if sizes[-1] != sizes[0]:
                raise ValueError(f"features: found maps of {sizes[0]} and of {sizes[-1]}, needed one size")
            yield features, F.one_hot(targets.long(), layer.num_classes)

    found = project_layer(layer, labelled())
    columns = sizes[0][1] - layer.prototypes.shape[3] + 1 if sizes else 1
    missing = found.sample_index < 0
    row, col = found.position // columns, found.position % columns
    return PushResult(found.sample_index, row.masked_fill(missing, -1), col.masked_fill(missing, -1), found.similarity)


def _squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    features, prototypes = full_precision(features), full_precision(prototypes)
    with no_autocast(features):
        lengths = F.conv2d(features.square().sum(1, keepdim=True), torch.ones_like(prototypes[:1, :1]))
        products = F.conv2d(features, prototypes)
    return (lengths - 2 * products + prototypes.square().sum(dim=(1, 2, 3))[:, None, None]).relu()


def unit_channels(x: Float[Tensor, "N D H W"]) -> Float[Tensor, "N D H W"]:
    """Every place's vector divided by its norm over the channels; zero stays zero, with a zero gradient."""
    return unit_vectors(x.movedim(1, -1)).movedim(-1, 1)
