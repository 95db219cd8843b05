"""Multi-Similarity Loss (CVPR 2019, arXiv 1904.06627) and the general pair weighting (GPW) it belongs to.

A loss over pairs is known by the weights ``w_ij = |dL / dS_ij|`` that it gives to pairs: :func:`pair_weights` has them
for six losses. Differences to the authors' code: a sample is left out of its own positives by place, not by a
similarity of 1 (duplicates still are by value); an anchor without a positive or a negative is skipped, where theirs
crashes; an inactive batch keeps its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_chunk_size, check_embeddings, check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import same_label, sum_over_rows
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.systems import Paper

__all__ = ["MultiSimilarityLoss", "gpw_surrogate", "multi_similarity_mining", "pair_weights"]


class MultiSimilarityLoss(nn.Module):
    """Soft hinges on the pairs that mining keeps, weighted by self- and relative similarity.

    With S the similarities and P, N the kept positives and negatives of an anchor, the mean over ALL anchors of
    ``1/alpha log(1 + sum_P exp(-alpha (S - base))) + 1/beta log(1 + sum_N exp(beta (S - base)))`` (equation 15).
    Mining keeps a negative that is more similar than the least similar positive minus ``margin``, and a positive less
    similar than the most similar negative plus ``margin``; an anchor that keeps none of one kind adds 0.

    Args:
        alpha: sharpness for positives.
        beta: sharpness for negatives (paper: 50).
        base: similarity in the middle of both hinges (paper: 1.0).
        margin: margin of the mining.
        mining: whether to mine; without, all pairs count.
        normalize: divide embeddings by their norm first.
        duplicate_eps: positives at least ``1 - duplicate_eps`` similar are taken for duplicates and left out;
            ``None`` keeps them.
        gather_distributed: pairs of the joint batch of all ranks.
        chunk_size: rows of the N x N matrix at once; ``None``: as many as fit the cache.

    Raises:
        ValueError: alpha or beta not positive, a negative margin; shapes or types that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import MultiSimilarityLoss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
        >>> MultiSimilarityLoss()(x, torch.tensor([0, 1, 0, 1]))  # far apart: nothing to mine
        tensor(0.)
        >>> MultiSimilarityLoss()(x, torch.tensor([0, 0, 1, 1])) > 1
        tensor(True)
    """

    paper: ClassVar[Paper] = Paper(
        title="Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
        year=2019,
        arxiv="1904.06627",
        code="MalongTech/research-ms-loss@8db6c9c",
        evidence="code",
        summary="metric learning: mined pairs weighted by self- and relative similarity",
        claim="retrieval of unseen classes is better than from raw input and than with the contrastive loss",
    )

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 40.0,
        base: float = 0.5,
        margin: float = 0.1,
        mining: bool = True,
        normalize: bool = True,
        duplicate_eps: float | None = 1e-5,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(alpha=alpha, beta=beta)
        if margin < 0:
            raise ValueError(f"margin: found {margin}, needed at least 0")
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.margin = margin
        self.mining = mining
        self.normalize = normalize
        self.duplicate_eps = duplicate_eps
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"alpha={self.alpha}, beta={self.beta}, base={self.base}, margin={self.margin}, mining={self.mining}, "
            f"normalize={self.normalize}, duplicate_eps={self.duplicate_eps}"
        )

    def forward(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Loss of a batch; labels are any integers, only equality counts."""
        check_embeddings(embeddings, labels)
        x = full_precision(embeddings)
        if self.gather_distributed:
            x, labels = gather_with_grad(x), gather_with_grad(labels)

        def block(rows: slice, x: Tensor) -> Tensor:
            similarity = x[rows] @ x.T
            positive, negative = _pairs(similarity.detach(), labels, rows, self.duplicate_eps)
            if self.mining:
                positive, negative = _mined(similarity.detach(), positive, negative, self.margin)
            pull = _soft_sum(-self.alpha * (similarity - self.base), positive) / self.alpha
            push = _soft_sum(self.beta * (similarity - self.base), negative) / self.beta
            return (pull + push).sum()

        with no_autocast(x):
            x = unit_vectors(x) if self.normalize else x
            return sum_over_rows(block, (x,), rows=len(x), columns=len(x), chunk_size=self.chunk_size) / len(x)


def multi_similarity_mining(
    similarity: Float[Tensor, "N N"],
    labels: Int[Tensor, "N"],
    margin: float = 0.1,
    duplicate_eps: float | None = 1e-5,
) -> tuple[Bool[Tensor, "N N"], Bool[Tensor, "N N"]]:
    """Pairs that tell something: negatives about as similar as the worst positive, and the reverse (equations 11, 12).

    Args:
        similarity: row i is anchor i.
        labels: any integers.
        margin: how much a pair may miss the border.
        duplicate_eps: see :class:`MultiSimilarityLoss`.

    Returns:
        Masks of kept positives and negatives; both rows are empty where either would be.

    Raises:
        ValueError: a similarity that is not ``[N, N]`` with one label per row, a negative margin.

    Example:
        >>> import torch
        >>> from proto_core.losses import multi_similarity_mining
        >>> similarity = torch.tensor([[1.0, 0.2, 0.5], [0.2, 1.0, 0.1], [0.5, 0.1, 1.0]])
        >>> multi_similarity_mining(similarity, torch.tensor([0, 0, 1]))[1].tolist()
        [[False, False, True], [False, False, False], [False, False, False]]
    """
    _check_similarity(similarity, labels)
    if margin < 0:
        raise ValueError(f"margin: found {margin}, needed at least 0")
    similarity = full_precision(similarity.detach())
    positive, negative = _pairs(similarity, labels, slice(0, len(labels)), duplicate_eps)
    return _mined(similarity, positive, negative, margin)


def pair_weights(
    similarity: Float[Tensor, "N N"], labels: Int[Tensor, "N"], loss: str, **hyper: float
) -> Float[Tensor, "N N"]:
    """Weights ``w_ij = |dL / dS_ij|`` of a loss in the GPW frame (section 3 of the paper); L sums over anchors.

    ``S_ij`` and ``S_ji`` are variables of their own, so that w is not symmetric. Positives are all other samples of the
    anchor's label; nothing is mined.

    Args:
        similarity: row i is anchor i.
        labels: any integers.
        loss: ``"contrastive"`` (lam 0.5), ``"triplet"`` (lam 0.1), ``"lifted_structure"`` (lam 1),
            ``"binomial_deviance"`` (alpha 2, beta 50, lam 0.5), ``"n_pair"`` or ``"multi_similarity"`` (alpha 2,
            beta 40, lam 0.5).
        hyper: the loss's numbers, by name.

    Returns:
        Detached, at least 0, zero on the diagonal.

    Raises:
        ValueError: an unknown loss or number, alpha or beta not positive; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import pair_weights
        >>> similarity = torch.tensor([[1.0, 0.2, 0.6], [0.2, 1.0, 0.1], [0.6, 0.1, 1.0]])
        >>> pair_weights(similarity, torch.tensor([0, 0, 1]), "contrastive").tolist()
        [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    check_option("loss", loss, *_WEIGHTS)
    weigh, defaults = _WEIGHTS[loss]
    if unknown := sorted(set(hyper) - set(defaults)):
        raise ValueError(f"{unknown[0]}: found for {loss!r}, which takes {', '.join(defaults) or 'no number'}")
    _check_similarity(similarity, labels)
    settings = defaults | hyper
    check_positive(**{name: settings[name] for name in ("alpha", "beta") if name in settings})
    with torch.no_grad():
        similarity = full_precision(similarity.detach())
        positive, negative = _pairs(similarity, labels, slice(0, len(labels)), None)
        on_positive, on_negative = weigh(similarity, positive, negative, **settings)
        return torch.where(positive, on_positive, torch.where(negative, on_negative, 0))


def gpw_surrogate(
    similarity: Float[Tensor, "N N"], labels: Int[Tensor, "N"], weights: Float[Tensor, "N N"]
) -> Float[Tensor, ""]:
    """``sum over negatives of w S minus sum over positives of w S``: the gradient of the loss that w came from.

    Args:
        similarity: row i is anchor i.
        labels: any integers.
        weights: of :func:`pair_weights`; get no gradient.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import gpw_surrogate
        >>> similarity = torch.tensor([[1.0, 0.2, 0.6], [0.2, 1.0, 0.1], [0.6, 0.1, 1.0]])
        >>> gpw_surrogate(similarity, torch.tensor([0, 0, 1]), torch.ones(3, 3) - torch.eye(3)).round(decimals=4)
        tensor(1.)
    """
    _check_similarity(similarity, labels)
    if weights.shape != similarity.shape:
        raise ValueError(f"weights: found shape {tuple(weights.shape)}, needed {tuple(similarity.shape)}")
    similarity = full_precision(similarity)
    sign = torch.where(same_label(labels, labels), -1.0, 1.0).to(similarity)
    return (sign * weights.detach().to(similarity) * similarity).fill_diagonal_(0).sum()


def _check_similarity(similarity: Tensor, labels: Tensor) -> None:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: found shape {tuple(similarity.shape)}, needed [N, N]")
    check_embeddings(similarity, labels, "similarity")


def _pairs(similarity: Tensor, labels: Tensor, rows: slice, duplicate_eps: float | None) -> tuple[Tensor, Tensor]:
    """Masks of positives and negatives of a block of anchors; an anchor is left out by its place."""
    same = same_label(labels[rows], labels)
    negative = ~same
    same.diagonal(offset=rows.start).fill_(False)
    return (same if duplicate_eps is None else same & (similarity < 1 - duplicate_eps)), negative


def _mined(similarity: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    worst = torch.where(positive, similarity, torch.inf).amin(dim=1, keepdim=True)
    best = torch.where(negative, similarity, -torch.inf).amax(dim=1, keepdim=True)
    # infinite where there is none: then nothing of the other kind is kept
    hard_negative = negative & (similarity + margin > worst)
    hard_positive = positive & (similarity - margin < best)
    active = hard_negative.any(dim=1, keepdim=True) & hard_positive.any(dim=1, keepdim=True)
    return hard_positive & active, hard_negative & active


def _soft_sum(logits: Tensor, mask: Tensor) -> Tensor:
    """``log(1 + sum of exp(logits) on the mask)`` by row; 0 without gradient for an empty row."""
    nothing = torch.finfo(logits.dtype).min / 4
    return F.softplus(torch.where(mask, logits, nothing).logsumexp(dim=1))


# -- weights: (on positives, on negatives), each [N, N]; entries off the masks are never read

_Weights = tuple[Tensor, Tensor]


def _contrastive(s: Tensor, positive: Tensor, negative: Tensor, lam: float) -> _Weights:
    return torch.ones_like(s), (s > lam).to(s)


def _triplet(s: Tensor, positive: Tensor, negative: Tensor, lam: float) -> _Weights:
    """How many of the other kind make a triplet with this one: by place among the sorted others."""
    negatives = torch.where(negative, s, -torch.inf).sort(dim=1).values
    positives = torch.where(positive, s, torch.inf).sort(dim=1).values
    violating = s.shape[1] - torch.searchsorted(negatives + lam, s.contiguous(), right=True)
    violated = torch.searchsorted(positives, (s + lam).contiguous())
    return violating.to(s), violated.to(s)


def _lifted_structure(s: Tensor, positive: Tensor, negative: Tensor, lam: float) -> _Weights:
    towards = torch.where(positive, lam - s, -torch.inf)
    away = torch.where(negative, s, -torch.inf)
    active = towards.logsumexp(dim=1, keepdim=True) + away.logsumexp(dim=1, keepdim=True) > 0
    return tuple(torch.where(active, x.softmax(dim=1), 0) for x in (towards, away))  # type: ignore[return-value]


def _binomial_deviance(
    s: Tensor, positive: Tensor, negative: Tensor, alpha: float, beta: float, lam: float
) -> _Weights:
    counts = [mask.sum(dim=1, keepdim=True).clamp_min(1) for mask in (positive, negative)]
    return alpha * (alpha * (lam - s)).sigmoid() / counts[0], beta * (beta * (s - lam)).sigmoid() / counts[1]


def _n_pair(s: Tensor, positive: Tensor, negative: Tensor) -> _Weights:
    against = torch.where(negative, s, -torch.inf).logsumexp(dim=1, keepdim=True)
    on_positive = (against - s).sigmoid()
    # sum over p of e^(s_n - s_p) / (1 + e^(against - s_p)) = e^s_n sum over p of 1 / (e^s_p + e^against)
    share = torch.where(positive, -torch.logaddexp(s, against), -torch.inf).logsumexp(dim=1, keepdim=True)
    return on_positive, (s + share).exp()


def _multi_similarity(s: Tensor, positive: Tensor, negative: Tensor, alpha: float, beta: float, lam: float) -> _Weights:
    def share(logits: Tensor, mask: Tensor) -> Tensor:
        return (logits - F.softplus(torch.where(mask, logits, -torch.inf).logsumexp(dim=1, keepdim=True))).exp()

    return share(-alpha * (s - lam), positive), share(beta * (s - lam), negative)


_WEIGHTS: dict[str, tuple[Callable[..., _Weights], dict[str, Any]]] = {
    "contrastive": (_contrastive, {"lam": 0.5}),
    "triplet": (_triplet, {"lam": 0.1}),
    "lifted_structure": (_lifted_structure, {"lam": 1.0}),
    "binomial_deviance": (_binomial_deviance, {"alpha": 2.0, "beta": 50.0, "lam": 0.5}),
    "n_pair": (_n_pair, {}),
    "multi_similarity": (_multi_similarity, {"alpha": 2.0, "beta": 40.0, "lam": 0.5}),
}
