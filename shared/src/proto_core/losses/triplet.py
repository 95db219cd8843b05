"""SuSana Distancia (2023, arXiv 2305.09062): two losses for few-shot learning, on prototypes and on neighbourhoods.

Formulas are those of the authors' code. Distances are ``sqrt(|a - b|^2 + 1e-6)`` everywhere, so that a query on its
prototype has a finite gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_chunk_size, check_embeddings, readable
from proto_core.distances import sq_euclidean
from proto_core.distributed import gather_with_grad
from proto_core.metrics.neighbourhood import icnn_score
from proto_core.precision import full_precision
from proto_core.systems import Paper

__all__ = ["ICNNLoss", "ProtoTripletLoss"]

EPS = 1e-6


class ProtoTripletLoss(nn.Module):
    """``mean_i max(0, d(q_i, own prototype) - min d(q_i, another prototype) + margin)``.

    Args:
        margin: in units of the distance.

    Raises:
        ValueError: a negative margin; shapes or types that do not fit, fewer than two prototypes, a query whose label
            has no prototype or more than one.

    Example:
        >>> import torch
        >>> from proto_core.losses import ProtoTripletLoss
        >>> prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> ProtoTripletLoss(margin=6.0)(prototypes[:1], torch.tensor([0]), prototypes).round(decimals=3)
        tensor(1.0010)
    """

    paper: ClassVar[Paper] = Paper(
        title="SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel "
        "distance-based loss functions for few-shot image classification",
        year=2023,
        arxiv="2305.09062",
        code="maumruiz/FSL-Loss@249405f",
        evidence="code",
        summary="few-shot learning: a triplet loss on prototypes, and a score of class neighbourhoods as a loss",
        claim="episodes trained with the two losses are as accurate as with a prototypical network",
    )

    def __init__(self, margin: float = 0.5) -> None:
        super().__init__()
        if not margin >= 0:
            raise ValueError(f"margin: found {margin}, needed at least 0")
        self.margin = margin

    def extra_repr(self) -> str:
        """Settings."""
        return f"margin={self.margin}"

    def forward(
        self,
        queries: Float[Tensor, "Q D"],
        query_labels: Int[Tensor, "Q"],
        prototypes: Float[Tensor, "W D"],
        prototype_labels: Int[Tensor, "W"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of an episode; without labels, prototype w is of class w."""
        check_embeddings(queries, query_labels, "queries")
        if prototypes.ndim != 2 or prototypes.shape[1] != queries.shape[1] or len(prototypes) < 2:
            found = tuple(prototypes.shape)
            raise ValueError(f"prototypes: found shape {found}, needed [W, {queries.shape[1]}] with at least 2")
        if prototype_labels is None:
            prototype_labels = torch.arange(len(prototypes), device=queries.device)
        elif prototype_labels.shape != prototypes.shape[:1]:
            raise ValueError(f"prototype_labels: found shape {tuple(prototype_labels.shape)}, needed [W]")
        own = query_labels.unsqueeze(1) == prototype_labels
        if readable(own) and not bool((own.sum(dim=1) == 1).all()):
            wrong = int((own.sum(dim=1) != 1).nonzero()[0])
            count = int(own[wrong].sum())
            label = int(query_labels[wrong])
            raise ValueError(f"query_labels: found label {label} with {count} prototypes, needed one")
        with torch.no_grad():
            other = torch.where(own, torch.inf, sq_euclidean(queries, prototypes)).argmin(dim=1)
        # by differences: the rounding of a product would hide the 1e-6 where a query is on its prototype
        x, p = full_precision(queries), full_precision(prototypes)
        near, far = (((x - p[index]).square().sum(dim=1) + EPS).sqrt() for index in (own.long().argmax(dim=1), other))
        return (near - far + self.margin).relu().mean()


class ICNNLoss(nn.Module):
    """``-log`` of the ICNN score: neighbours shall be of the own class, near, and others far.

    The score of :func:`proto_core.metrics.icnn_score`, variant ``"modified"``, clamped at 1e-12.

    Args:
        k: neighbours that count.
        gather_distributed: anchors and targets of the joint batch of all ranks.
        chunk_size: anchors whose distances to all targets are held at once; ``None``: as many as fit the cache.

    Raises:
        ValueError: k below 1; shapes or types that do not fit, fewer than 3 targets, a number of instances outside k to
            M - 1.

    Example:
        >>> import torch
        >>> from proto_core.losses import ICNNLoss
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
        >>> ICNNLoss(k=2)(x, torch.tensor([0, 0, 0, 1, 1, 1])) < ICNNLoss(k=2)(x, torch.tensor([0, 1, 0, 1, 0, 1]))
        tensor(True)
    """

    def __init__(self, k: int = 4, *, gather_distributed: bool = False, chunk_size: int | None = None) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k: found {k}, needed at least 1")
        self.k = k
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return f"k={self.k}"

    def forward(
        self,
        embeddings: Float[Tensor, "N D"],
        labels: Int[Tensor, "N"],
        targets: Float[Tensor, "M D"] | None = None,
        target_labels: Int[Tensor, "M"] | None = None,
        instances_per_class: int | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of a batch; without targets its own samples are the neighbours."""
        check_embeddings(embeddings, labels)
        x = full_precision(embeddings)
        if self.gather_distributed:
            x, labels = gather_with_grad(x), gather_with_grad(labels)
            if targets is not None and target_labels is not None:
                targets, target_labels = gather_with_grad(full_precision(targets)), gather_with_grad(target_labels)
        score = icnn_score(
            x,
            labels,
            targets,
            target_labels,
            k=self.k,
            instances_per_class=instances_per_class,
            chunk_size=self.chunk_size,
        )
        return -score.clamp_min(1e-12).log()
