"""The network of ProtoGCD: a backbone's feature, prototypes on it, and a projection beside it.

Source: "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery", TPAMI 2025, arXiv
2504.03755. Difference from the authors' code: a zero feature has logits 0 and no gradient.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.precision import full_precision, no_autocast, unit_vectors

__all__ = ["HeadOutput", "ProtoGCD", "ProtoGCDHead"]

_WEIGHT_STD = 0.02


class HeadOutput(NamedTuple):
    """What the head says about a batch.

    Attributes:
        projections: ``[N, P]`` for the contrastive losses, of free length.
        logits: ``[N, K]`` cosine similarities to the prototypes, without temperature.
        prototypes: ``[K, D]`` of length 1.
    """

    projections: Tensor
    logits: Tensor
    prototypes: Tensor


class ProtoGCDHead(nn.Module):
    """K prototypes on the feature itself, and a projection for contrast: ``l_nk = <z_n / |z_n|, v_k / |v_k|>``.

    Args:
        in_dim: D of the features.
        num_classes: K, old and new.
        hidden_dim: of the projection.
        bottleneck_dim: P of the projection.
        num_layers: linear layers of the projection; 1 is a single one from D to P.

    Attributes:
        mlp: the projection, ``nn.Sequential`` of linear layers with GELU between them.
        prototypes: Parameter v ``[K, D]``; its length has no effect.

    Raises:
        ValueError: a size below 1; features of another width.

    Source:
        arXiv 2504.03755, section 4.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import ProtoGCDHead
        >>> out = ProtoGCDHead(8, 5, hidden_dim=16, bottleneck_dim=4)(torch.randn(3, 8))
        >>> out.projections.shape, out.logits.shape, out.prototypes.shape
        (torch.Size([3, 4]), torch.Size([3, 5]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "num_classes": num_classes, "hidden_dim": hidden_dim}
        for name, value in (sizes | {"bottleneck_dim": bottleneck_dim, "num_layers": num_layers}).items():
            if value < 1:
                raise ValueError(f"{name}: found {value}, needed 1 or more")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        steps: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            steps += [nn.Linear(inputs, outputs), nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1])
        self.prototypes = nn.Parameter(torch.empty(num_classes, in_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of the projection, biases 0, prototypes uniform as a linear layer's weights."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=_WEIGHT_STD)
                nn.init.zeros_(layer.bias)
        bound = self.prototypes.shape[1] ** -0.5
        nn.init.uniform_(self.prototypes, -bound, bound)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_classes={self.prototypes.shape[0]}, in_dim={self.prototypes.shape[1]}"

    def forward(self, features: Float[Tensor, "N D"]) -> HeadOutput:
        """Projections, logits and unit prototypes."""
        if features.ndim != 2 or features.shape[1] != self.prototypes.shape[1]:
            found = tuple(features.shape)
            raise ValueError(f"features: found shape {found}, needed [N, {self.prototypes.shape[1]}]")
        prototypes = unit_vectors(self.prototypes)
        with no_autocast(features):
            unit = unit_vectors(features)
            dtype = torch.promote_types(unit.dtype, prototypes.dtype)
            logits = unit.to(dtype) @ prototypes.to(dtype).T
        projections = self.mlp(features.to(self.prototypes.dtype))
        return HeadOutput(full_precision(projections), logits, prototypes)


class ProtoGCD(nn.Module):
    """A backbone and the head on its features.

    Args:
        backbone: images -> features ``[N, D]``.
        head: of the same D.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import ProtoGCD, ProtoGCDHead
        >>> net = ProtoGCD(torch.nn.Flatten(), ProtoGCDHead(64, 10, hidden_dim=32, bottleneck_dim=8))
        >>> net(torch.rand(2, 1, 8, 8)).logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, backbone: nn.Module, head: ProtoGCDHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Float[Tensor, "N ..."]) -> HeadOutput:
        """Projections, logits and unit prototypes."""
        return self.head(self.backbone(images))
