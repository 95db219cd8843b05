"""Mixture prototypes: several unit vectors per class that follow the data by soft assignment and a moving average.

PALM (ICLR 2024, arXiv 2402.02653), steps 1 to 3. Assignments come from Sinkhorn's iteration over ALL prototypes of all
classes, classes only enter afterwards. Unlike the authors' code the largest score is subtracted first, so that nothing
overflows.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.precision import full_precision, no_autocast

__all__ = ["MixturePrototypes"]

_FLOOR = 1e-12
"""Smallest sum that a row or column is divided by."""


class MixturePrototypes(nn.Module):
    """Unit vectors, several per class, moved by :meth:`update` and :meth:`set_`, not by an optimiser.

    Row p stands for class ``p % num_classes``: ask ``class_identity`` or ``labels``, not the order.

    Args:
        num_classes: C.
        embedding_dim: D.
        prototypes_per_class: K.
        momentum: share of the old prototype in an update.
        epsilon: temperature of the assignment.
        sinkhorn_iterations: of the assignment.
        top_k: prototypes of its class that a sample moves, at most; 0: all.

    Attributes:
        prototypes: buffer ``[P, D]``, P = C K, rows of norm 1; they start in the positive orthant.
        class_identity: buffer ``[P, C]`` float.

    Raises:
        ValueError: fewer than 2 classes, a size below 1, epsilon not positive, momentum outside [0, 1].

    Shapes:
        embeddings ``[N, D]`` -> similarities ``[N, P]``.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import MixturePrototypes
        >>> layer = MixturePrototypes(num_classes=3, embedding_dim=8, prototypes_per_class=2)
        >>> embeddings = torch.nn.functional.normalize(torch.randn(5, 8))
        >>> layer(embeddings).shape, layer.labels.tolist()
        (torch.Size([5, 6]), [0, 1, 2, 0, 1, 2])
    """

    prototypes: Tensor
    class_identity: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 128,
        prototypes_per_class: int = 6,
        momentum: float = 0.999,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        top_k: int = 5,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, needed at least 2")
        check_positive(
            embedding_dim=embedding_dim,
            prototypes_per_class=prototypes_per_class,
            epsilon=epsilon,
            sinkhorn_iterations=sinkhorn_iterations,
        )
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: found {momentum}, needed a number in [0, 1]")
        if top_k < 0:
            raise ValueError(f"top_k: found {top_k}, needed at least 0")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.prototypes_per_class = prototypes_per_class
        self.momentum = momentum
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.top_k = min(top_k, prototypes_per_class)
        self.register_buffer("prototypes", torch.empty(num_classes * prototypes_per_class, embedding_dim))
        self.register_buffer("class_identity", torch.eye(num_classes).repeat(prototypes_per_class, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw entries from U[0, 1), then divide rows by their norm."""
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(torch.rand_like(self.prototypes)))

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, "
            f"prototypes_per_class={self.prototypes_per_class}, momentum={self.momentum}, epsilon={self.epsilon}, "
            f"sinkhorn_iterations={self.sinkhorn_iterations}, top_k={self.top_k}"
        )

    @property
    def labels(self) -> Int[Tensor, "P"]:
        """Class of each prototype."""
        return torch.arange(len(self.prototypes), device=self.prototypes.device) % self.num_classes

    def forward(self, embeddings: Float[Tensor, "N D"]) -> Float[Tensor, "N P"]:
        """Products with the prototypes: cosines, for embeddings of norm 1."""
        z = self._checked(embeddings)
        with no_autocast(z):
            return z @ self.prototypes.to(z).T

    @torch.no_grad()
    def assign(
        self, embeddings: Float[Tensor, "N D"], prototypes: Float[Tensor, "P D"] | None = None
    ) -> Float[Tensor, "N P"]:
        """Share of each sample in each prototype by Sinkhorn's iteration; rows have sum 1, no gradient.

        Args:
            embeddings: of norm 1.
            prototypes: other vectors than the buffer.

        Raises:
            ValueError: shapes that do not fit, no sample.
        """
        z = self._checked(embeddings).detach()
        p = (self.prototypes if prototypes is None else prototypes.detach()).to(z)
        if p.shape != self.prototypes.shape:
            raise ValueError(f"prototypes: found shape {tuple(p.shape)}, needed {tuple(self.prototypes.shape)}")
        with no_autocast(z):
            scores = z @ p.T / self.epsilon
        share = scores.sub_(scores.max()).exp_()
        share /= share.sum()
        samples, count = share.shape
        # the formula divides by the sizes as well: they cancel, but for the next floor
        floor = _FLOOR
        for _ in range(self.sinkhorn_iterations):
            for dim, size in ((0, count), (1, samples)):
                share /= share.sum(dim, keepdim=True).clamp_min_(floor)
                floor = _FLOOR * size
        return share

    def update(
        self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, "P D"], Bool[Tensor, "N P"]]:
        """Prototypes after this batch, with gradient to the embeddings; the buffer stays as it is.

        With W the assignment restricted to a sample's class and its ``top_k`` largest entries, rows and then columns
        divided by their sums: ``normalise(momentum p + (1 - momentum) W^T z)``. A prototype without any sample is
        copied.

        Under data parallel training hand over the joint batch (:meth:`joint`), so that all ranks move alike.

        Args:
            embeddings: of norm 1.
            labels: classes.

        Returns:
            New prototypes, and the entries of the assignment that were kept.

        Raises:
            ValueError: shapes or types that do not fit, no sample, a class outside 0..C-1.
        """
        z = self._checked(embeddings)
        check_class_targets(z, labels, "embeddings", classes=self.num_classes)
        old = self.prototypes.to(z)
        own = self.class_identity.T.index_select(0, labels.long()) > 0
        weight = self.assign(z)
        selected = own
        if self.top_k:
            best = torch.where(own, weight, -1).topk(self.top_k, dim=1).indices
            selected = torch.zeros_like(own).scatter_(1, best, True)
        weight = torch.where(selected, weight, 0)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(_FLOOR)
        taken = weight.sum(0)
        with no_autocast(z):
            shares = (weight / taken.clamp_min(_FLOOR)).T
            moved = torch.addmm(old, shares, z, beta=self.momentum, alpha=1 - self.momentum)
        return torch.where((taken > 0).unsqueeze(1), F.normalize(moved), old), selected

    @staticmethod
    def joint(
        embeddings: Float[Tensor, "n D"], labels: Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, "N"]]:
        """The joint batch of all ranks, with gradient; the arguments themselves without a process group."""
        return gather_with_grad(embeddings), gather_with_grad(labels)

    @torch.no_grad()
    def set_(self, prototypes: Float[Tensor, "P D"]) -> None:
        """Become these vectors.

        Raises:
            ValueError: another shape.
        """
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"prototypes: found shape {tuple(prototypes.shape)}, needed {tuple(self.prototypes.shape)}"
            )
        self.prototypes.copy_(prototypes.detach())

    def _checked(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or len(embeddings) == 0:
            raise ValueError(
                f"embeddings: found shape {tuple(embeddings.shape)}, needed [N, {self.embedding_dim}] with N at least 1"
            )
        return full_precision(embeddings)
