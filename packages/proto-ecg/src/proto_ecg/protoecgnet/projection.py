"""ProtoECGNet's two projections, as plain functions over features; the streaming search is proto_core's."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from proto_core.prototypes import PointPrototypes, PrototypeLayer, WindowPrototypes, project_layer

__all__ = ["project_global", "project_windows"]


def _check(features: Tensor, targets: Tensor, prototypes: Tensor, prototype_class: Tensor) -> None:
    if targets.ndim != 2 or len(targets) != len(features):
        raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed [{len(features)}, C]")
    if len(prototype_class) != len(prototypes):
        raise ValueError(f"prototype_class: found {len(prototype_class)} rows for {len(prototypes)} prototypes")


def _with_vectors(layer: PrototypeLayer, prototypes: Tensor) -> PrototypeLayer:
    layer.to(prototypes)
    with torch.no_grad():
        layer.prototypes.copy_(prototypes)
    return layer


def project_global(
    features: Float[Tensor, "N D"],
    targets: Shaped[Tensor, "N C"],
    prototypes: Float[Tensor, "P D"],
    prototype_class: Shaped[Tensor, "P C"],
) -> tuple[Float[Tensor, "P D"], Int[Tensor, " P"]]:
    """Replace each prototype by the most similar feature among records with at least one of its classes.

    Args:
        features: of all training records.
        targets: multi-hot.
        prototypes: unprojected.
        prototype_class: 1 where prototype p stands for class c.

    Returns:
        Projected prototypes and the index of each one's record; a prototype whose classes never occur keeps its
        vector and has index -1. The first record wins ties.

    Raises:
        ValueError: shapes that do not fit, a prototype without a class.
    """
    _check(features, targets, prototypes, prototype_class)
    layer = _with_vectors(PointPrototypes(prototypes.shape[1], prototype_class), prototypes)
    found = project_layer(layer, [(features.detach(), targets)], overwrite=False)
    return found.vectors, found.sample_index


def project_windows(
    features: Float[Tensor, "N F 1 T"],
    targets: Shaped[Tensor, "N C"],
    prototypes: Float[Tensor, "P F 1 W"],
    prototype_class: Shaped[Tensor, "P C"],
) -> tuple[Float[Tensor, "P F 1 W"], Int[Tensor, " P"], Int[Tensor, " P"]]:
    """As :func:`project_global` for windows; also returns the index of each one's window (-1 where there is none).

    Raises:
        ValueError: shapes that do not fit, a prototype without a class, a window longer than the map.
    """
    _check(features, targets, prototypes, prototype_class)
    layer = _with_vectors(WindowPrototypes(prototypes.shape[1], prototypes.shape[3], prototype_class), prototypes)
    found = project_layer(layer, [(features.detach(), targets)], overwrite=False)
    return found.vectors, found.sample_index, found.position
