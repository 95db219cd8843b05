"""Classification by the distance to class means, and the confidence of a mean accuracy over episodes.

Source: Prototypical Networks (arXiv 1703.05175) as in SuSana Distancia (arXiv 2305.09062). Difference from the authors'
code: labels may be any integers in any order; the columns of the logits are the sorted labels.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_embeddings, check_positive
from proto_core.distances import sq_euclidean
from proto_core.precision import full_precision

__all__ = ["PrototypicalNetwork", "confidence_interval"]


class PrototypicalNetwork(nn.Module):
    """Logits ``-||q - p_c||^2 / T``: squared Euclidean distances to the mean embedding of each class's supports.

    Args:
        encoder: images -> embeddings ``[N, D]``, or maps ``[N, D, h, w]``, which are averaged over their places.
        temperature: T.

    Raises:
        ValueError: a temperature that is not positive; supports and labels of other lengths, no support, queries of
            another width.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from proto_vision.few_shot import PrototypicalNetwork
        >>> net = PrototypicalNetwork(nn.Identity())
        >>> support = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
        >>> net(support, torch.tensor([5, 5, 3]), torch.tensor([[0.0, 0.0]]))
        tensor([[-16.,  -1.]])
    """

    def __init__(self, encoder: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.encoder, self.temperature = encoder, temperature

    def extra_repr(self) -> str:
        """Settings."""
        return f"temperature={self.temperature}"

    def embed(self, images: Float[Tensor, "N *input"]) -> Float[Tensor, "N D"]:
        """Embeddings, not normalised."""
        features = self.encoder(images)
        return features.mean(dim=(2, 3)) if features.ndim == 4 else features

    def prototypes(
        self, support_embeddings: Float[Tensor, "S D"], support_labels: Int[Tensor, "S"]
    ) -> tuple[Float[Tensor, "W D"], Int[Tensor, "W"]]:
        """Mean embedding of each class, and the classes in rising order."""
        check_embeddings(support_embeddings, support_labels, "support_embeddings")
        labels, inverse, counts = support_labels.unique(return_inverse=True, return_counts=True)
        embeddings = full_precision(support_embeddings)
        sums = embeddings.new_zeros(len(labels), embeddings.shape[1]).index_add_(0, inverse, embeddings)
        return sums / counts[:, None], labels

    def classify(
        self, query_embeddings: Float[Tensor, "Q D"], prototypes: Float[Tensor, "W D"]
    ) -> Float[Tensor, "Q W"]:
        """Logits of queries that are embedded already."""
        return -sq_euclidean(query_embeddings, prototypes) / self.temperature

    def forward(
        self,
        support: Float[Tensor, "S *input"],
        support_labels: Int[Tensor, "S"],
        query: Float[Tensor, "Q *input"],
    ) -> Float[Tensor, "Q W"]:
        """Logits of the queries; columns are the sorted labels of the supports."""
        return self.classify(self.embed(query), self.prototypes(self.embed(support), support_labels)[0])


def confidence_interval(accuracies: Any) -> tuple[float, float]:
    """Mean accuracy over episodes, and half the width of its 95 % confidence interval: ``1.96 std / sqrt(n)``.

    Args:
        accuracies: one number for each episode; a tensor, an array or a list.

    Returns:
        Mean and half-width; the standard deviation is that of the population.

    Raises:
        ValueError: no number, or more than one dimension.

    Example:
        >>> from proto_vision.few_shot import confidence_interval
        >>> confidence_interval([0.5, 0.5, 1.0, 1.0])
        (0.75, 0.245)
    """
    values = torch.as_tensor(accuracies)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"accuracies: found shape {tuple(values.shape)}, needed one number for each episode, [n]")
    values = values.double()
    return float(values.mean()), float(1.96 * values.std(correction=0) / len(values) ** 0.5)
