"""InfoNCE and two losses that show how it works (CVPR 2021, arXiv 2012.09740).

The gradient of InfoNCE on negative k is a share ``exp(s_k / tau) / sum`` of the pull on the positive: a small
temperature punishes only the nearest negatives. Doing that explicitly, by keeping the hardest negatives alone, gives
the hard contrastive loss; without any hardness-awareness there is the simple contrastive loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_chunk_size, check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import sum_over_rows
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.systems import Paper

__all__ = ["HardContrastiveLoss", "InfoNCELoss", "SimpleContrastiveLoss"]


class InfoNCELoss(nn.Module):
    """``-log [ e^(s_ii / tau) / (e^(s_ii / tau) + sum over negatives of e^(s_ik / tau)) ]``, mean over anchors.

    Without ``negatives``, those of an anchor are the positives of the others; with them (a memory bank), all of their
    rows and no others.

    Args:
        temperature: tau.
        normalize: divide rows by their norm first.
        symmetric: mean of both directions, anchors to positives and back; without ``negatives`` only.
        reduction: ``"mean"`` or ``"none"`` (one loss per anchor).
        gather_distributed: anchors and positives of the joint batch of all ranks; ``negatives`` are taken as they are.
        chunk_size: rows at once; ``None``: as many as fit the cache. Has no effect on ``reduction="none"``.

    Raises:
        ValueError: temperature not positive, an unknown reduction, ``symmetric`` together with negatives; shapes that
            do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import InfoNCELoss
        >>> InfoNCELoss(temperature=1.0)(torch.eye(2), torch.eye(2)).round(decimals=4)
        tensor(0.3133)
    """

    paper: ClassVar[Paper] = Paper(
        title="Understanding the Behaviour of Contrastive Loss",
        year=2021,
        arxiv="2012.09740",
        code=None,
        evidence="formulas",
        summary="InfoNCE, hard and simple contrastive loss, and how temperature rules them",
        claim="uniformity and tolerance both rise with temperature; hard negatives make up for a large one",
    )

    def __init__(
        self,
        temperature: float = 0.07,
        normalize: bool = True,
        symmetric: bool = False,
        reduction: str = "mean",
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.normalize = normalize
        self.symmetric = symmetric
        self.reduction = check_option("reduction", reduction, "mean", "none")
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, symmetric={self.symmetric}, "
            f"reduction={self.reduction!r}"
        )

    def forward(
        self,
        anchors: Float[Tensor, "N D"],
        positives: Float[Tensor, "N D"],
        negatives: Float[Tensor, "K D"] | None = None,
    ) -> Float[Tensor, "..."]:
        """Loss of N pairs; 0 without any negative."""
        if self.symmetric and negatives is not None:
            raise ValueError("symmetric: found True together with negatives, needed negatives=None")
        f, others = _rows(anchors, positives, negatives, self.normalize, self.gather_distributed)
        with no_autocast(f):
            loss = self._one_way(f, others)
            return (loss + self._one_way(others[0], (f,))) / 2 if self.symmetric else loss

    def _one_way(self, f: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        def terms(rows: slice, f: Tensor, others: tuple[Tensor, ...]) -> Tensor:
            return _infonce(rows, f, others, self.temperature, None)

        if self.reduction == "none":
            return terms(slice(0, len(f)), f, others)
        return _mean_of_rows(terms, f, others, self.chunk_size)


class HardContrastiveLoss(nn.Module):
    """InfoNCE whose denominator keeps, beside the positive, only the share ``alpha`` of most similar negatives.

    With K negatives the ``m = max(1, ceil(alpha K))`` most similar stay, and whatever ties with the last of them. The
    choice gets no gradient. ``alpha = 1`` is InfoNCE.

    Args:
        temperature: tau.
        alpha: share of the negatives, in (0, 1].
        normalize: divide rows by their norm first.
        gather_distributed: see :class:`InfoNCELoss`.
        chunk_size: see :class:`InfoNCELoss`.

    Raises:
        ValueError: temperature not positive, alpha outside (0, 1]; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import HardContrastiveLoss
        >>> negatives = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> HardContrastiveLoss(alpha=0.5)(torch.eye(2)[:1], torch.eye(2)[:1], negatives).round(decimals=4)
        tensor(0.6931)
    """

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 0.1,
        normalize: bool = True,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.alpha = _share(alpha)
        self.normalize = normalize
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return f"temperature={self.temperature}, alpha={self.alpha}, normalize={self.normalize}"

    def forward(
        self,
        anchors: Float[Tensor, "N D"],
        positives: Float[Tensor, "N D"],
        negatives: Float[Tensor, "K D"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of N pairs; 0 without any negative."""
        f, others = _rows(anchors, positives, negatives, self.normalize, self.gather_distributed)

        def terms(rows: slice, f: Tensor, others: tuple[Tensor, ...]) -> Tensor:
            return _infonce(rows, f, others, self.temperature, self.alpha)

        with no_autocast(f):
            return _mean_of_rows(terms, f, others, self.chunk_size)


class SimpleContrastiveLoss(nn.Module):
    """``-s_ii + weight * sum over negatives of s_ik``, mean over anchors: no temperature, no hardness.

    Args:
        weight: of the SUM over negatives.
        alpha: keep only that share of most similar negatives, as in :class:`HardContrastiveLoss`; ``None``: all.
        normalize: divide rows by their norm first.
        gather_distributed: see :class:`InfoNCELoss`.
        chunk_size: see :class:`InfoNCELoss`; without ``alpha`` no N x N array is needed at all.

    Raises:
        ValueError: alpha outside (0, 1]; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import SimpleContrastiveLoss
        >>> SimpleContrastiveLoss()(torch.eye(2), torch.ones(2, 2)).round(decimals=4)
        tensor(0.)
    """

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float | None = None,
        normalize: bool = True,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.alpha = None if alpha is None else _share(alpha)
        self.normalize = normalize
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return f"weight={self.weight}, alpha={self.alpha}, normalize={self.normalize}"

    def forward(
        self,
        anchors: Float[Tensor, "N D"],
        positives: Float[Tensor, "N D"],
        negatives: Float[Tensor, "K D"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of N pairs; the mean of ``-s_ii`` without any negative."""
        f, others = _rows(anchors, positives, negatives, self.normalize, self.gather_distributed)
        with no_autocast(f):
            own = (f * others[0]).sum(dim=1)
            if self.alpha is None:
                pushed = f @ others[-1].sum(dim=0) - (own if len(others) == 1 else 0)
                return (self.weight * pushed - own).mean()
            alpha = self.alpha

            def terms(rows: slice, f: Tensor, others: tuple[Tensor, ...]) -> Tensor:
                similarity, kept = _similarities(rows, f, others, alpha)
                return torch.where(kept, similarity, 0).sum(dim=1)

            return self.weight * _mean_of_rows(terms, f, others, self.chunk_size) - own.mean()


def _share(alpha: float) -> float:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: found {alpha}, needed a share in (0, 1]")
    return alpha


def _rows(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, normalize: bool, gather: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Anchors, and positives (and negatives): checked, in one full precision, normalised and gathered as asked."""
    if anchors.ndim != 2 or anchors.shape != positives.shape or len(anchors) == 0:
        shapes = f"{tuple(anchors.shape)} and {tuple(positives.shape)}"
        raise ValueError(f"anchors, positives: found shapes {shapes}, needed [N, D] both with N at least 1")
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != anchors.shape[1]):
        raise ValueError(f"negatives: found shape {tuple(negatives.shape)}, needed [K, {anchors.shape[1]}]")
    for name, rows in {"anchors": anchors, "positives": positives, "negatives": negatives}.items():
        if rows is not None and not rows.is_floating_point():
            raise ValueError(f"{name}: found {rows.dtype}, needed floating-point numbers")
    ready = unit_vectors if normalize else full_precision
    f, g = ready(anchors), ready(positives)
    if gather:
        f, g = gather_with_grad(f), gather_with_grad(g)
    return f, (g,) if negatives is None else (g, ready(negatives).to(g))


def _similarities(
    rows: slice, f: Tensor, others: tuple[Tensor, ...], alpha: float | None
) -> tuple[Float[Tensor, "R K"], Bool[Tensor, "R K"]]:
    """Similarities of some anchors to all candidates, and which of these are negatives that stay.

    ``others`` are the positives, whose row i is no negative of anchor i, or the positives and a bank. With ``alpha``
    only negatives stay that are at least as similar as the last of that share of a row's negatives.
    """
    in_batch = len(others) == 1
    similarity = f[rows] @ others[-1].T
    negative = torch.ones_like(similarity, dtype=torch.bool)
    if in_batch:
        negative.diagonal(offset=rows.start).fill_(False)
    count = similarity.shape[1] - in_batch
    if alpha is None or alpha == 1 or count == 0:
        return similarity, negative
    number = max(1, math.ceil(alpha * count - 1e-9))
    with torch.no_grad():
        border = torch.where(negative, similarity, -torch.inf).topk(number, dim=1).values[:, -1:]
        # products with equal rows may be rounded apart: they tie all the same
        lengths = (torch.linalg.vector_norm(x, dim=1) for x in (f[rows], others[-1]))
        raised = torch.addr(similarity, *lengths, alpha=4 * torch.finfo(f.dtype).eps)
        return similarity, negative & (raised >= border)


def _infonce(rows: slice, f: Tensor, others: tuple[Tensor, ...], temperature: float, alpha: float | None) -> Tensor:
    """One loss per anchor of a block; the positive's logit is that of the candidates where it is among them."""
    similarity, kept = _similarities(rows, f, others, alpha)
    if len(others) == 1:
        own = similarity.diagonal(offset=rows.start)
        kept.diagonal(offset=rows.start).fill_(True)
        logits = torch.where(kept, similarity / temperature, -torch.inf)
        return logits.logsumexp(dim=1) - own / temperature
    own = (f[rows] * others[0][rows]).sum(dim=1) / temperature
    if similarity.shape[1] == 0:
        return own * 0
    logits = torch.where(kept, similarity / temperature, -torch.inf)
    return F.softplus(logits.logsumexp(dim=1) - own)


def _mean_of_rows(
    terms: Callable[..., Tensor], f: Tensor, others: tuple[Tensor, ...], chunk_size: int | None
) -> Float[Tensor, ""]:
    def block(rows: slice, f: Tensor, *others: Tensor) -> Tensor:
        return terms(rows, f, others).sum()

    total = sum_over_rows(block, (f, *others), rows=len(f), columns=len(others[-1]), chunk_size=chunk_size)
    return total / len(f)
