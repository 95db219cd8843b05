"""The prototype cleaner: one binary classifier per class, "is this given label right?", along the class's prototype.

RECONSTRUCTION. The paper (CPC, arXiv 2212.10766, withdrawn from ICLR 2023) and its code could not be had; its abstract
states a class-aware partition of clean and noisy labels that uses the distribution of losses and the consistency within
each class of features together. This is our concrete form of that: loss, temperatures and rates are not the paper's.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_positive
from proto_core.precision import full_precision, unit_vectors
from proto_vision.cpc.dividemix import check_share

__all__ = ["ClassPrototypeCleaner"]


class ClassPrototypeCleaner(nn.Module):
    """Probability that a given label is right, from where the feature lies relative to the label's prototype.

    ``a_i = <z_i / |z_i|, c_y / |c_y|> / temperature + b_y``, ``p_i = sigmoid(a_i)``: each class has its own direction
    ``c_y`` and threshold ``b_y``, so that easy and hard classes have boundaries of their own. A zero feature has
    ``a_i = b_y``.

    Args:
        dim: length D of a feature.
        num_classes: K.
        temperature: of the cosine.
        threshold: probability above which a label counts as clean.
        balanced: whether the loss is a mean within each class of the batch, then over these classes, or over rows.

    Attributes:
        prototypes: ``[K, D]``, normal with deviation ``1 / sqrt(D)`` at first.
        bias: ``[K]``, 0 at first.

    Shapes:
        ``[N, D]``, ``[N]`` -> ``[N]``.

    Raises:
        ValueError: settings out of range; when called: shapes that do not fit, labels outside 0..K-1.

    Source:
        A reconstruction from the abstract of arXiv 2212.10766.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import ClassPrototypeCleaner
        >>> cleaner = ClassPrototypeCleaner(2, 2)
        >>> with torch.no_grad():
        ...     _ = cleaner.prototypes.copy_(torch.eye(2))
        >>> cleaner(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1])).detach()
        tensor([10.,  0.])
    """

    def __init__(
        self, dim: int, num_classes: int, *, temperature: float = 0.1, threshold: float = 0.5, balanced: bool = True
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_classes=num_classes, temperature=temperature)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: found {threshold}, needed 0 to 1")
        self.temperature, self.threshold, self.balanced = temperature, threshold, balanced
        self.prototypes = nn.Parameter(torch.empty(num_classes, dim))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random prototypes, no bias."""
        nn.init.normal_(self.prototypes, std=1 / math.sqrt(self.prototypes.shape[1]))
        nn.init.zeros_(self.bias)

    def forward(self, features: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Logits ``a`` of "the given label is right"."""
        check_class_targets(features, labels, what="features", classes=len(self.bias), empty=True)
        if features.shape[1] != self.prototypes.shape[1]:
            raise ValueError(f"features: found {features.shape[1]} columns, needed {self.prototypes.shape[1]}")
        labels = labels.long()
        own = unit_vectors(self.prototypes)[labels]
        return (unit_vectors(features) * own).sum(1) / self.temperature + full_precision(self.bias)[labels]

    def clean_probability(self, features: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Probability p that the given label is right."""
        return self(features, labels).sigmoid()

    def partition(self, features: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Which labels count as clean: ``p > threshold``."""
        return self.clean_probability(features, labels) > self.threshold

    def loss(
        self, features: Float[Tensor, "N D"], labels: Int[Tensor, "N"], targets: Float[Tensor, "N"]
    ) -> Float[Tensor, ""]:
        """Binary cross-entropy of p against soft targets (the mixture's posterior); 0 without rows.

        The gradient reaches prototypes, biases and features: a likely clean sample is drawn to the prototype of its
        label, a likely wrong one is pushed away from it.

        Args:
            features: z.
            labels: given labels y.
            targets: w, in [0, 1]; detached.

        Raises:
            ValueError: shapes that do not fit, labels outside 0..K-1, targets outside [0, 1].
        """
        logits = self(features, labels)
        if targets.shape != labels.shape:
            raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed {tuple(labels.shape)}")
        check_share("targets", targets)
        losses = F.binary_cross_entropy_with_logits(logits, targets.detach().to(logits.dtype), reduction="none")
        if not self.balanced:
            return losses.sum() / max(len(losses), 1)
        labels, none = labels.long(), torch.zeros_like(self.bias, dtype=losses.dtype)
        count, total = none.index_add(0, labels, torch.ones_like(losses)), none.index_add(0, labels, losses)
        return (total / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)

    @torch.enable_grad()
    def fit(
        self,
        features: Float[Tensor, "N D"],
        labels: Int[Tensor, "N"],
        targets: Float[Tensor, "N"],
        *,
        epochs: int = 5,
        batch_size: int = 256,
        lr: float = 1e-2,
        generator: torch.Generator | None = None,
    ) -> None:
        """Train prototypes and biases with Adam on fixed features.

        Args:
            features: z, detached.
            labels: given labels.
            targets: w, in [0, 1].
            epochs: passes.
            batch_size: rows of a step.
            lr: of Adam.
            generator: of the order (on the CPU).
        """
        features = features.detach()
        optimizer = torch.optim.Adam([self.prototypes, self.bias], lr=lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).to(labels.device).split(batch_size):
                optimizer.zero_grad()
                self.loss(features[rows], labels[rows], targets[rows]).backward()
                optimizer.step()
        optimizer.zero_grad()

    def extra_repr(self) -> str:
        """The settings."""
        classes, dim = self.prototypes.shape
        settings = f"temperature={self.temperature}, threshold={self.threshold}, balanced={self.balanced}"
        return f"{dim}, {classes}, {settings}"
