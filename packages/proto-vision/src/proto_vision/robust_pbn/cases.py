"""Which training image shows each component of a deep network best, and where."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proto_core.prototypes import PrototypeLayer

__all__ = ["ComponentCases"]


class ComponentCases(PrototypeLayer):
    """The cases of K components that are channels of a map and have no vector of their own.

    Its features are component maps: a component matches a place as much as it is detected there. Any image can be a
    case, of whatever class.

    Args:
        num_components: K.
        num_classes: C.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import project_layer
        >>> from proto_vision.robust_pbn.cases import ComponentCases
        >>> maps = torch.tensor([[[[0.2, 0.9]]], [[[0.6, 0.1]]]])
        >>> found = project_layer(ComponentCases(1, 2), [(maps, torch.eye(2))])
        >>> found.sample_index, found.position
        (tensor([0]), tensor([1]))
    """

    def __init__(self, num_components: int, num_classes: int) -> None:
        super().__init__((1,), torch.ones(num_components, num_classes))
        del self.prototypes
        self.register_buffer("prototypes", torch.zeros(num_components, 1), persistent=False)

    def match(self, features: Float[Tensor, "n K h w"], active: Int[Tensor, " A"]) -> Float[Tensor, "n A places"]:
        """See :class:`~proto_core.prototypes.PrototypeLayer`; positions are places of the map, row by row."""
        return features[:, active].flatten(2)

    def take(self, features: Tensor, rows: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, "B 1"]:
        """See :class:`~proto_core.prototypes.PrototypeLayer`; there is nothing to take."""
        return features.new_zeros(len(rows), 1)
