"""Soft-InfoNCE (EMNLP 2023, arXiv 2310.08069): negatives weighted by how relevant they may be to the query.

In code search, and wherever a batch holds near duplicates, some negatives are none. Their weight in the denominator
falls with an estimate of their similarity. The paper's four alternatives are here too, as ``variant``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_option, check_positive, readable
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import masked_logsumexp
from proto_core.precision import full_precision, no_autocast
from proto_core.systems import Paper

__all__ = ["SoftInfoNCELoss", "soft_infonce_weights"]


class SoftInfoNCELoss(nn.Module):
    """``mean_i [logsumexp_j(S_ij + log w_ij) - S_ii]`` with ``S = score_scale Q C^T``; code i is query i's positive.

    ``w`` are the :func:`soft_infonce_weights` of ``similarity``. With ``p_ij`` its softmax over the negatives and P the
    softmax of S over all codes, the variants are: ``"infonce"`` (w = 1); ``"weighted"``
    (``mean_i sum_j u_ij (-log(P_ij + 1e-15))``, u = 1 for the positive, p for negatives); ``"bce"`` (binary cross
    entropy of P against u, mean over all pairs); ``"kl"`` (``beta InfoNCE + alpha KL(p | softmax of S over the
    negatives)``); ``"cancel"`` (InfoNCE without each query's ``top_k`` most similar negatives, lowest index first on
    ties).

    Args:
        alpha: how much similarity counts.
        beta: base weight.
        temperature: of the similarity's softmax.
        min_weight: smallest weight.
        score_scale: factor on the products; nothing is normalised here.
        variant: ``"soft"``, ``"infonce"``, ``"weighted"``, ``"bce"``, ``"kl"`` or ``"cancel"``.
        top_k: negatives that ``"cancel"`` drops.
        gather_distributed: queries and codes of the joint batch of all ranks; ``similarity`` is then that of the joint
            batch.

    Raises:
        ValueError: temperature or score_scale not positive, negative min_weight, an unknown variant; shapes that do
            not fit, NaN or infinite similarities, ``beta - alpha / K <= 0``, ``top_k`` of all negatives or more.

    Example:
        >>> import torch
        >>> from proto_core.losses import SoftInfoNCELoss
        >>> q, similarity = torch.eye(3), torch.zeros(3, 3)
        >>> loss = SoftInfoNCELoss(beta=2.0)(q, q, similarity)  # all alike: every weight is 1
        >>> torch.isclose(loss, SoftInfoNCELoss(variant="infonce")(q, q))
        tensor(True)
    """

    paper: ClassVar[Paper] = Paper(
        title="Rethinking Negative Pairs in Code Search",
        year=2023,
        arxiv="2310.08069",
        code="Alex-HaochenLi/Soft-InfoNCE@5b7496b",
        evidence="code",
        summary="InfoNCE whose negatives are weighted by an estimate of their relevance",
        claim="with near duplicates among the negatives, retrieval and relevance are not worse than with InfoNCE",
    )

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        min_weight: float = 0.1,
        score_scale: float = 1.0,
        variant: str = "soft",
        top_k: int = 1,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, score_scale=score_scale, top_k=top_k)
        if not min_weight >= 0:
            raise ValueError(f"min_weight: found {min_weight}, needed at least 0")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.min_weight = min_weight
        self.score_scale = score_scale
        self.variant = check_option("variant", variant, "soft", "infonce", "weighted", "bce", "kl", "cancel")
        self.top_k = top_k
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, min_weight={self.min_weight}, "
            f"score_scale={self.score_scale}, variant={self.variant!r}, top_k={self.top_k}"
        )

    def forward(
        self,
        queries: Float[Tensor, "N D"],
        codes: Float[Tensor, "N D"],
        similarity: Float[Tensor, "N N"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of a batch; ``similarity`` (row i: of query i to each code) may be left out for ``"infonce"``."""
        if queries.ndim != 2 or queries.shape != codes.shape or len(queries) == 0:
            shapes = f"{tuple(queries.shape)} and {tuple(codes.shape)}"
            raise ValueError(f"queries, codes: found shapes {shapes}, needed [N, D] both with N at least 1")
        q, c = full_precision(queries), full_precision(codes)
        if self.gather_distributed:
            q, c = gather_with_grad(q), gather_with_grad(c)
        with no_autocast(q):
            scores = self.score_scale * (q @ c.T)
            own = scores.diagonal()
            if self.variant == "infonce":
                return (scores.logsumexp(dim=1) - own).mean()
            if similarity is None:
                raise ValueError(f"similarity: found None, needed [N, N] for variant {self.variant!r}")
            similarity = _checked(similarity, len(q)).to(scores)
            if self.variant == "soft":
                weights = soft_infonce_weights(similarity, self.alpha, self.beta, self.temperature, self.min_weight)
                return (masked_logsumexp(scores, torch.ones_like(scores, dtype=torch.bool), weights) - own).mean()
            if self.variant == "cancel":
                return (masked_logsumexp(scores, self._kept(similarity)) - own).mean()
            share = _negative_share(similarity, self.temperature)
            if self.variant == "kl":
                nce = (scores.logsumexp(dim=1) - own).mean()
                return self.beta * nce + self.alpha * _divergence(share, scores) / len(scores)
            target = share.fill_diagonal_(1)
            probability = scores.softmax(dim=1)
            if self.variant == "bce":
                return F.binary_cross_entropy(probability, target)
            return -(target * (probability + 1e-15).log()).sum(dim=1).mean()

    def _kept(self, similarity: Tensor) -> Tensor:
        """All but the most similar negatives of each query."""
        count = len(similarity)
        kept = torch.ones_like(similarity, dtype=torch.bool)
        if count == 1:
            return kept
        if self.top_k >= count - 1:
            raise ValueError(f"top_k: found {self.top_k} of {count - 1} negatives, needed fewer")
        negatives = similarity.masked_fill(_diagonal(similarity), -torch.inf)
        dropped = negatives.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        return kept.scatter_(1, dropped, False)


@torch.no_grad()
def soft_infonce_weights(
    similarity: Float[Tensor, "N N"], alpha: float, beta: float, temperature: float, min_weight: float = 0.1
) -> Float[Tensor, "N N"]:
    """``max(min_weight, (beta - alpha p_ij) / (beta - alpha / K))``, diagonal 1, no gradient.

    p is the softmax of ``similarity / temperature`` over the K = N - 1 negatives of a row. Before the clip the weights
    of a row have mean 1; the more similar, the smaller.

    Raises:
        ValueError: not ``[N, N]``, NaN or infinite entries, temperature not positive, ``beta - alpha / K <= 0``.

    Example:
        >>> import torch
        >>> from proto_core.losses import soft_infonce_weights
        >>> soft_infonce_weights(torch.eye(3), alpha=1.0, beta=1.0, temperature=1.0)
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]])
    """
    check_positive(temperature=temperature)
    similarity = _checked(similarity, len(similarity))
    count = len(similarity)
    if count == 1:
        return torch.ones_like(similarity)
    base = beta - alpha / (count - 1)
    if not base > 0:
        raise ValueError(f"beta: found {beta} with alpha {alpha} and {count - 1} negatives, needed beta > alpha / K")
    weights = ((beta - alpha * _negative_share(similarity, temperature)) / base).clamp_min(min_weight)
    return weights.fill_diagonal_(1)


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)


def _checked(similarity: Tensor, count: int) -> Tensor:
    if similarity.ndim != 2 or tuple(similarity.shape) != (count, count):
        raise ValueError(f"similarity: found shape {tuple(similarity.shape)}, needed [{count}, {count}]")
    if readable(similarity) and not bool(similarity.isfinite().all()):
        raise ValueError("similarity: found NaN or infinite entries, needed numbers")
    return full_precision(similarity.detach())


def _negative_share(similarity: Tensor, temperature: float) -> Tensor:
    """Softmax over the negatives of each row; 0 on the diagonal."""
    if len(similarity) == 1:
        return torch.zeros_like(similarity)
    return (similarity / temperature).masked_fill(_diagonal(similarity), -torch.inf).softmax(dim=1)


def _divergence(share: Tensor, scores: Tensor) -> Tensor:
    """Sum over rows of KL(share | softmax of the scores over the negatives)."""
    if len(scores) == 1:
        return scores.sum() * 0
    nothing = torch.finfo(scores.dtype).min / 4
    log_q = torch.where(_diagonal(scores), nothing, scores).log_softmax(dim=1)
    return (torch.special.xlogy(share, share) - torch.where(share > 0, share * log_q, 0)).sum()
