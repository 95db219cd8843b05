"""Orthogonal Projection Loss (ICCV 2021, arXiv 2103.14021): one direction per class, right angles between classes.

An auxiliary loss on the features before the last linear layer, added to cross entropy: cosines within a class go to 1,
cosines between classes to 0. The authors' code averages ``|cosine|`` over negatives, the paper takes the absolute value
of the average: both are here (``negative``). Also from their repository: the form with learned class centres, and
distillation of cosines. Unlike there, gamma is an argument everywhere and a zero vector has no gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_chunk_size, check_class_targets, check_embeddings, check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import same_label, sum_over_rows
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.systems import Paper

__all__ = ["OPLDistillationLoss", "OrthogonalProjectionLoss", "PerpetualOrthogonalProjectionLoss"]


class OrthogonalProjectionLoss(nn.Module):
    """``(1 - s) + gamma d``: s the mean cosine of pairs of one class, d the mean ``|cosine|`` of pairs of two.

    Pairs are ordered and never of a sample with itself; ``s = sum / (number of pairs + eps)``, likewise d, so that
    both are 0 without any pair. In [0, 2 + gamma] with normalisation.

    Args:
        gamma: weight of the pairs of two classes.
        normalize: divide embeddings by their norm; otherwise the products are those of the raw rows.
        attention: mix the batch first, ``softmax(X X^T) X`` (off in all published runs).
        negative: ``"mean_abs"`` (authors' code) or ``"abs_mean"`` (the paper's formula).
        eps: added to the numbers of pairs.
        gather_distributed: pairs of the joint batch of all ranks.
        chunk_size: rows of the N x N matrix at once; ``None``: as many as fit the cache.

    Raises:
        ValueError: negative gamma, unknown ``negative``, eps not positive; shapes or types that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import OrthogonalProjectionLoss
        >>> OrthogonalProjectionLoss()(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])).round(decimals=4)
        tensor(0.)
    """

    paper: ClassVar[Paper] = Paper(
        title="Orthogonal Projection Loss",
        year=2021,
        arxiv="2103.14021",
        code="kahnchana/opl@1db31de",
        evidence="code",
        summary="auxiliary loss: cosine 1 within a class, 0 between classes",
        claim="beside cross entropy it makes classes orthogonal without loss of accuracy",
    )

    def __init__(
        self,
        gamma: float = 0.5,
        normalize: bool = True,
        attention: bool = False,
        negative: str = "mean_abs",
        eps: float = 1e-6,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma: found {gamma}, needed at least 0")
        check_positive(eps=eps)
        self.gamma = gamma
        self.normalize = normalize
        self.attention = attention
        self.negative = check_option("negative", negative, "mean_abs", "abs_mean")
        self.eps = eps
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"gamma={self.gamma}, normalize={self.normalize}, attention={self.attention}, "
            f"negative={self.negative!r}, eps={self.eps}"
        )

    def forward(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Loss of a batch; labels are any integers, only equality counts."""
        x, labels = self._joint(embeddings, labels)
        with no_autocast(x):
            if self.negative == "abs_mean":
                within, between = self._means(x, labels, signed=True)
                return (1 - within) + self.gamma * between.abs()
            x = self._vectors(x)
            positives, negatives = self._counts(x, labels)
            pull, push = -1 / positives, self.gamma / negatives

            def block(rows: slice, x: Tensor) -> Tensor:
                products = _products(rows, x)
                same = same_label(labels[rows], labels)
                return torch.where(same, pull * products, push * products.abs()).sum()

            return 1 + sum_over_rows(block, (x,), rows=len(x), columns=len(x), chunk_size=self.chunk_size)

    def components(
        self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """``(s, d)``, both differentiable; watch these in training, not their sum."""
        x, labels = self._joint(embeddings, labels)
        with no_autocast(x):
            within, between = self._means(x, labels, signed=self.negative == "abs_mean")
        return within, between.abs()

    def _joint(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        check_embeddings(embeddings, labels)
        x = full_precision(embeddings)
        return (gather_with_grad(x), gather_with_grad(labels)) if self.gather_distributed else (x, labels)

    def _vectors(self, x: Tensor) -> Tensor:
        if self.attention:
            heads = x[None, None]
            x = F.scaled_dot_product_attention(heads, heads, heads, scale=1.0)[0, 0]
        return unit_vectors(x) if self.normalize else x

    def _counts(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of ordered pairs of one class and of two, each with eps added."""
        ordered = labels.sort().values
        of_label = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        positives = (of_label - 1).to(x).sum()
        return positives + self.eps, len(labels) * (len(labels) - 1) - positives + self.eps

    def _means(self, x: Tensor, labels: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """Mean product of pairs of one class, and mean (absolute) product of pairs of two."""
        x = self._vectors(x)
        positives, negatives = self._counts(x, labels)

        def within(rows: slice, x: Tensor) -> Tensor:
            return torch.where(same_label(labels[rows], labels), _products(rows, x), 0).sum()

        def between(rows: slice, x: Tensor) -> Tensor:
            products = _products(rows, x)
            return torch.where(same_label(labels[rows], labels), 0, products if signed else products.abs()).sum()

        sums = [
            sum_over_rows(term, (x,), rows=len(x), columns=len(x), chunk_size=self.chunk_size)
            for term in (within, between)
        ]
        return sums[0] / positives, sums[1] / negatives


def _products(rows: slice, x: Tensor) -> Tensor:
    """Products of some rows with all, 0 for a row with itself."""
    products = x[rows] @ x.T
    products.diagonal(offset=rows.start).zero_()
    return products


class PerpetualOrthogonalProjectionLoss(nn.Module):
    """``0.5 (1 - s) + |d|`` against learned class centres: s, d the mean cosines to the own centre and to the others.

    From the authors' repository, not in the paper's main text. They train the centres with an effective rate of 0.5:
    give ``centers`` a parameter group of that rate, divided by the weight of this loss.

    Args:
        num_classes: C.
        embedding_dim: D.
        normalize: divide embeddings by their norm (centres always are).

    Raises:
        ValueError: fewer than one class or dimension; shapes that do not fit, labels outside 0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.losses import PerpetualOrthogonalProjectionLoss
        >>> loss = PerpetualOrthogonalProjectionLoss(2, 2)
        >>> _ = loss.centers.data.copy_(torch.eye(2))
        >>> loss(torch.eye(2), torch.tensor([0, 1])).detach().round(decimals=4)
        tensor(0.)
    """

    eps = 1e-6

    def __init__(self, num_classes: int, embedding_dim: int, normalize: bool = True) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, embedding_dim=embedding_dim)
        self.normalize = normalize
        self.centers = nn.Parameter(torch.empty(num_classes, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centres from N(0, 1)."""
        nn.init.normal_(self.centers)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        classes, dim = self.centers.shape
        return f"num_classes={classes}, embedding_dim={dim}, normalize={self.normalize}"

    def forward(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Loss of a batch."""
        check_class_targets(embeddings, labels, "embeddings", classes=len(self.centers))
        if embeddings.shape[1] != self.centers.shape[1]:
            raise ValueError(f"embeddings: found {embeddings.shape[1]} features, needed {self.centers.shape[1]}")
        x = unit_vectors(embeddings) if self.normalize else full_precision(embeddings)
        with no_autocast(x):
            cosines = x @ unit_vectors(self.centers).T
        own = F.one_hot(labels.long(), len(self.centers)).to(cosines)
        within = (own * cosines).sum() / (own.sum() + self.eps)
        between = ((1 - own) * cosines).sum() / ((1 - own).sum() + self.eps)
        return 0.5 * (1 - within) + between.abs()


class OPLDistillationLoss(nn.Module):
    """``mean over all pairs of exp(G_t) (G_t - G_s)``, G the cosines within the batch of teacher and student.

    From the authors' repository. The teacher gets no gradient.

    Example:
        >>> import torch
        >>> from proto_core.losses import OPLDistillationLoss
        >>> features = torch.eye(3)
        >>> OPLDistillationLoss()(features, features)
        tensor(0.)
    """

    def forward(self, student: Float[Tensor, "N D"], teacher: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
        """Loss of a batch; the two may differ in width.

        Raises:
            ValueError: not two matrices of the same number of rows, at least one.
        """
        if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) == 0:
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"student, teacher: found shapes {shapes}, needed [N, D] and [N, E] with N at least 1")
        own, other = unit_vectors(student), unit_vectors(teacher.detach())
        with no_autocast(own):
            target = other @ other.T
            return (target.exp() * (target - own @ own.T)).mean()
