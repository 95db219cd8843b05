"""Layers that hold prototypes: what all kinds share, and the kind that is one point of the embedding space.

A layer answers similarities, knows its classes (``class_identity [P, C]``) and, after projection, its cases: which
training sample each prototype is, and where in it. Cases travel in the ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from proto_core.checks import check_option
from proto_core.distances import METRICS, cosine_similarity
from proto_core.prototypes.classes import check_class_identity

__all__ = ["PointPrototypes", "PrototypeLayer", "global_cosine_similarity"]


class PrototypeLayer(nn.Module):
    """What every prototype layer has: vectors, classes, cases.

    Args:
        shape: shape of one prototype.
        class_identity: ``[P, C]``, 1 where prototype p stands for class c.

    Attributes:
        prototypes: Parameter ``[P, *shape]``, from N(0, 1).
        class_identity: buffer ``[P, C]`` float.
        case_index: buffer ``[P]`` int64, training sample behind each prototype; -1 before projection.
        case_position: buffer ``[P]`` int64, flat position in that sample's feature map; -1 before projection.
        case_ids: ids of these samples (``""`` before projection).
        case_labels: label names of these samples.

    Raises:
        ValueError: a class identity that is not ``[P, C]`` or has a row without a class.
    """

    class_identity: Tensor
    case_index: Tensor
    case_position: Tensor

    def __init__(self, shape: Sequence[int], class_identity: Shaped[Tensor, "P C"]) -> None:
        super().__init__()
        check_class_identity(class_identity)
        count = len(class_identity)
        self.prototypes = nn.Parameter(torch.empty(count, *shape))
        self.register_buffer("class_identity", class_identity.float().clone())
        self.register_buffer("case_index", torch.full((count,), -1, dtype=torch.long))
        self.register_buffer("case_position", torch.full((count,), -1, dtype=torch.long))
        self.case_ids: list[str] = [""] * count
        self.case_labels: list[list[str]] = [[] for _ in range(count)]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prototypes from N(0, 1) and forget the cases."""
        nn.init.normal_(self.prototypes)
        self.case_index.fill_(-1)
        self.case_position.fill_(-1)
        self.case_ids = [""] * len(self.prototypes)
        self.case_labels = [[] for _ in range(len(self.prototypes))]

    @property
    def num_prototypes(self) -> int:
        """P."""
        return len(self.prototypes)

    @property
    def projected(self) -> bool:
        """Whether at least one prototype has a case."""
        return any(self.case_ids)

    def match(self, features: Tensor, active: Int[Tensor, " A"]) -> Float[Tensor, "n A K"]:
        """Similarity of samples to the prototypes ``active`` at each of the K positions of a sample."""
        raise TypeError(f"{type(self).__name__} does not say how features match its prototypes")

    def take(self, features: Tensor, rows: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Tensor:
        """The features ``[B, *shape]`` at the given samples and positions."""
        raise TypeError(f"{type(self).__name__} does not say how a feature becomes a prototype")

    @torch.no_grad()
    def assign_cases(
        self,
        vectors: Tensor,
        sample_index: Int[Tensor, " P"],
        position: Int[Tensor, " P"],
        describe: Callable[[int], tuple[str, Sequence[str]]],
    ) -> None:
        """Become the cases found by a projection.

        Args:
            vectors: ``[P, *shape]``.
            sample_index: training sample of each prototype, -1 for a prototype that keeps its vector.
            position: flat position in the sample's feature map.
            describe: ``sample index -> (sample id, label names)``.
        """
        self.prototypes.copy_(vectors)
        self.case_index.copy_(sample_index)
        self.case_position.copy_(position)
        found = [describe(index) if index >= 0 else ("", ()) for index in sample_index.tolist()]
        self.case_ids = [name for name, _ in found]
        self.case_labels = [list(labels) for _, labels in found]

    def get_extra_state(self) -> dict[str, Any]:
        """Ids and labels of the cases, as plain lists (readable with ``weights_only``)."""
        return {"case_ids": list(self.case_ids), "case_labels": [list(labels) for labels in self.case_labels]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over ids and labels of the cases.

        Raises:
            ValueError: the state speaks of another number of prototypes.
        """
        ids, labels = list(state["case_ids"]), [list(names) for names in state["case_labels"]]
        if len(ids) != self.num_prototypes or len(labels) != self.num_prototypes:
            raise ValueError(f"case table: found {len(ids)} cases for {self.num_prototypes} prototypes")
        self.case_ids, self.case_labels = ids, labels

    def extra_repr(self) -> str:
        """Sizes, classes and how many prototypes are real cases."""
        cases = sum(bool(name) for name in self.case_ids)
        return f"prototypes={tuple(self.prototypes.shape)}, classes={self.class_identity.shape[1]}, cases={cases}"


class PointPrototypes(PrototypeLayer):
    """Prototypes that are points of the embedding space, compared by cosine or by any distance.

    ``s_np = <f_n / max(|f_n|, 1e-12), p / max(|p|, 1e-12)>``, in [-1, 1]; a zero vector has similarity 0. With a
    distance d of :mod:`proto_core.distances` the similarity is ``-d(f_n, p)``.

    Args:
        dim: embedding dimension D.
        class_identity: ``[P, C]``.
        distance: name of a distance; ``None``: the cosine similarity.

    Raises:
        ValueError: an unknown distance; features of another width.

    Shapes:
        features ``[N, D]`` -> similarities ``[N, P]``.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import PointPrototypes, prototype_class_matrix
        >>> layer = PointPrototypes(8, prototype_class_matrix(3, 2))
        >>> layer(torch.randn(5, 8)).shape
        torch.Size([5, 6])
    """

    def __init__(self, dim: int, class_identity: Shaped[Tensor, "P C"], *, distance: str | None = None) -> None:
        super().__init__((dim,), class_identity)
        self.distance = distance if distance is None else check_option("distance", distance, *METRICS)

    def forward(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N P"]:
        """Similarity of every sample to every prototype."""
        return self._similarity(features, self.prototypes)

    def _similarity(self, features: Tensor, prototypes: Tensor) -> Tensor:
        if self.distance is None:
            return global_cosine_similarity(features, prototypes)
        options = {"precision": torch.ones_like(prototypes[0])} if self.distance == "mahalanobis" else {}
        return -METRICS[self.distance](features, prototypes, **options)

    def match(self, features: Tensor, active: Int[Tensor, " A"]) -> Float[Tensor, "n A 1"]:
        """See :class:`PrototypeLayer`; a point has one position."""
        return self._similarity(features, self.prototypes[active]).unsqueeze(-1)

    def extra_repr(self) -> str:
        """Sizes, the distance and how many prototypes are real cases."""
        return super().extra_repr() + (f", distance={self.distance!r}" if self.distance else "")

    def take(self, features: Tensor, rows: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Tensor:
        """See :class:`PrototypeLayer`."""
        return features[rows]


def global_cosine_similarity(features: Float[Tensor, "N D"], prototypes: Float[Tensor, "P D"]) -> Float[Tensor, "N P"]:
    """Cosine of every feature vector to every prototype; 0 with finite gradients for a zero vector.

    Computed in float32 at least, also under autocast.

    Raises:
        ValueError: the last axes differ or an argument is not a matrix.
    """
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"needed features [N, D] and prototypes [P, D], found {tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    return cosine_similarity(features, prototypes)
