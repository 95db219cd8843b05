"""UNPG (2022, arXiv 2203.11593): margin softmax whose rows also see hard negative pairs of the batch.

Cross entropy over class weights knows no negatives as near as two samples of two identities. UNPG adds the similarities
of such pairs, cleaned by a box-and-whisker filter, as further negatives to every row. All rows see the same ones, so
that they are one more logit, the log-sum-exp of them all. With ``negatives="class"`` what is left is ArcFace, CosFace
or MagFace. Unlike the authors' code: no pair in a batch is no error, a sample on its class weight has finite gradients,
and MagFace can be combined with UNPG.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_chunk_size, check_class_targets, check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import same_label, sum_over_rows
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.systems import Paper

__all__ = ["UNPGLoss", "box_whisker_filter"]

AT_ONCE = 2048
"""Samples up to which all pairs are held at once."""
BINS = 2**16


class UNPGLoss(nn.Module):
    """Margin softmax with unified negatives: ``mean CE([s c'_1 ... s c'_C, logsumexp(s S')], y)`` (section 3).

    ``c'`` are the cosines to the class weights with a margin on the target: CosFace ``c - m``; ArcFace
    ``cos(arccos c + m)``; MagFace ``cos(arccos c + m_i)`` where c > 0, with a margin ``m_i`` that grows with the norm
    of the embedding and a term ``lambda_g mean(a / u_a^2 + 1 / a)``. ``S'`` are the similarities of the batch's pairs
    of two labels, each once, that pass :func:`box_whisker_filter`; the gradient reaches both samples.

    Args:
        embedding_dim: D.
        num_classes: C.
        margin: ``"arcface"``, ``"cosface"`` or ``"magface"``.
        s: scale of the cosines.
        m: margin of ArcFace (radians) and CosFace.
        whisker: width of the filter in interquartile ranges; ``None``: keep all pairs.
        negatives: ``"unified"``, or ``"class"`` for class weights alone.
        l_margin: MagFace's margin at norm ``l_a``.
        u_margin: MagFace's margin at norm ``u_a``.
        l_a: smallest norm that MagFace tells apart.
        u_a: largest norm.
        lambda_g: weight of MagFace's norm term.
        gather_distributed: the joint batch of all ranks; without, pairs are of the local batch.
        chunk_size: rows of the N x N matrix at once; ``None``: all up to 2,048 samples, then what fits the cache.

    Attributes:
        weight: Parameter ``[C, D]``, one row per class.

    Raises:
        ValueError: s not positive, a negative whisker, an unknown margin or kind of negatives, bounds in the wrong
            order; shapes that do not fit, a label outside 0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.losses import UNPGLoss
        >>> loss = UNPGLoss(8, num_classes=4, margin="cosface", m=0.35)
        >>> loss(torch.randn(16, 8), torch.arange(16) % 4).shape
        torch.Size([])
    """

    paper: ClassVar[Paper] = Paper(
        title="Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition",
        year=2022,
        arxiv="2203.11593",
        code="Jung-Jun-Uk/UNPG@a6f9c17",
        evidence="code",
        summary="margin softmax (ArcFace, CosFace, MagFace) that also sees the batch's hard negative pairs",
        claim="verification of unseen identities at low false accept rates is better than with ArcFace",
    )

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: str = "arcface",
        s: float = 64.0,
        m: float = 0.5,
        whisker: float | None = 1.5,
        negatives: str = "unified",
        l_margin: float = 0.45,
        u_margin: float = 0.8,
        l_a: float = 10.0,
        u_a: float = 110.0,
        lambda_g: float = 35.0,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(embedding_dim=embedding_dim, num_classes=num_classes, s=s, l_a=l_a)
        _check_whisker(whisker)
        if not u_a > l_a:
            raise ValueError(f"u_a: found {u_a}, needed more than l_a = {l_a}")
        self.margin = check_option("margin", margin, "arcface", "cosface", "magface")
        self.negatives = check_option("negatives", negatives, "unified", "class")
        self.s = s
        self.m = m
        self.whisker = whisker
        self.l_margin = l_margin
        self.u_margin = u_margin
        self.l_a = l_a
        self.u_a = u_a
        self.lambda_g = lambda_g
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform; for MagFace uniform in (-1, 1) with rows of norm 1."""
        if self.margin == "magface":
            nn.init.uniform_(self.weight, -1, 1)
            with torch.no_grad():
                self.weight.copy_(unit_vectors(self.weight))
        else:
            nn.init.xavier_uniform_(self.weight)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        classes, dim = self.weight.shape
        size = f"m={self.m}" if self.margin != "magface" else f"margins=({self.l_margin}, {self.u_margin})"
        return (
            f"{dim}, {classes}, margin={self.margin!r}, s={self.s}, {size}, whisker={self.whisker}, "
            f"negatives={self.negatives!r}"
        )

    def forward(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Loss of a batch of raw embeddings."""
        self._check(embeddings, labels)
        x, labels = full_precision(embeddings), labels.long()
        if self.gather_distributed:
            x, labels = gather_with_grad(x), gather_with_grad(labels)
        with no_autocast(x):
            logits = self.s * self._margin_cosine(x, labels)
            if self.negatives == "unified":
                further = self._pairs(unit_vectors(x), labels)
                logits = torch.cat([logits, further.expand(len(x), 1)], dim=1)
            loss = nn.functional.cross_entropy(logits, labels)
        if self.margin == "magface":
            size = self._size(x)
            loss = loss + self.lambda_g * (size / self.u_a**2 + 1 / size).mean()
        return loss

    def cosine(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> Float[Tensor, "N C"]:
        """Cosines to the class weights with the margin on the target, before the scale."""
        self._check(embeddings, labels)
        x = full_precision(embeddings)
        with no_autocast(x):
            return self._margin_cosine(x, labels.long())

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        check_class_targets(embeddings, labels, "embeddings", classes=len(self.weight))
        if embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(f"embeddings: found {embeddings.shape[1]} features, needed {self.weight.shape[1]}")

    def _size(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=1).clamp(self.l_a, self.u_a)

    def _margin_cosine(self, x: Tensor, labels: Tensor) -> Tensor:
        cosines = unit_vectors(x) @ unit_vectors(self.weight).to(x).T
        column = labels.unsqueeze(1)
        own = cosines.gather(1, column)
        if self.margin == "cosface":
            return cosines.scatter(1, column, own - self.m)
        # on its class weight (or opposite) the root has no derivative: stay off it, without a gradient
        border = 1 - (1e-7 if own.dtype == torch.float32 else 1e-14)
        inside = own.clamp(-border, border)
        root = (1 - inside * inside).sqrt()
        if self.margin == "arcface":
            return cosines.scatter(1, column, inside * math.cos(self.m) - root * math.sin(self.m))
        slope = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        m = (slope * (self._size(x) - self.l_a) + self.l_margin).unsqueeze(1)
        return cosines.scatter(1, column, torch.where(own > 0, inside * m.cos() - root * m.sin(), own))

    def _pairs(self, unit: Tensor, labels: Tensor) -> Tensor:
        """Log-sum-exp of the scaled similarities that pass the filter; very negative without any."""
        count = len(unit)
        nothing = torch.finfo(unit.dtype).min / 4
        if torch.compiler.is_compiling() or count <= (self.chunk_size or AT_ONCE):
            one, two = torch.triu_indices(count, count, 1, device=unit.device)
            similarity = (unit @ unit.T)[one, two]
            mask = labels[one] != labels[two]
            if self.whisker is not None and len(similarity):
                low, high = _fences(similarity.detach(), mask, self.whisker)
                mask = mask & (similarity.detach() >= low) & (similarity.detach() <= high)
            logits = torch.where(mask, self.s * similarity, nothing)
            return torch.cat([logits, logits.new_full((1,), nothing)]).logsumexp(dim=0)
        low, high = _streamed_fences(unit.detach(), labels, self.whisker, self.chunk_size)

        def block(rows: slice, unit: Tensor) -> Tensor:
            similarity, mask = _upper(rows, unit, labels)
            with torch.no_grad():
                kept = mask & (similarity >= low) & (similarity <= high)
            # masked before the exponential: what is beyond the fence may overflow, and its gradient would be NaN
            return torch.where(kept, self.s * (similarity - high), nothing).exp().sum()

        total = sum_over_rows(block, (unit,), rows=count, columns=count, chunk_size=self.chunk_size)
        found = total > 0
        return torch.where(found, torch.where(found, total, 1).log() + self.s * high, nothing)


def box_whisker_filter(similarities: Float[Tensor, "L"], whisker: float | None) -> Float[Tensor, "K"]:
    """Similarities within ``[q1 - r IQR, q3 + r IQR]``, in rising order.

    The quartiles are the entries at ``floor(L / 4)`` and ``floor(3 L / 4)`` of the sorted list, both fences inclusive;
    they get no gradient.

    Args:
        similarities: any number of them.
        whisker: r; ``None`` keeps all, in their own order.

    Raises:
        ValueError: a negative whisker, more than one axis, NaN.

    Example:
        >>> import torch
        >>> from proto_core.losses import box_whisker_filter
        >>> box_whisker_filter(torch.tensor([0.1, 9.0, 0.3, 0.2, 0.4]), 1.5)
        tensor([0.1000, 0.2000, 0.3000, 0.4000])
    """
    _check_whisker(whisker)
    if similarities.ndim != 1:
        raise ValueError(f"similarities: found shape {tuple(similarities.shape)}, needed [L]")
    if bool(similarities.isnan().any()):
        raise ValueError("similarities: found NaN, needed numbers")
    if whisker is None or len(similarities) == 0:
        return similarities
    ordered = similarities.sort().values
    low, high = _fences(ordered.detach(), torch.ones_like(ordered, dtype=torch.bool), whisker)
    return ordered[(ordered >= low) & (ordered <= high)]


def _check_whisker(whisker: float | None) -> None:
    if whisker is not None and not whisker >= 0:
        raise ValueError(f"whisker: found {whisker}, needed at least 0, or None")


def _fences(similarity: Tensor, mask: Tensor, whisker: float) -> tuple[Tensor, Tensor]:
    """Fences of the entries on the mask, without reading their number back."""
    ordered = torch.where(mask, similarity, torch.inf).sort().values
    count = mask.sum()
    places = torch.stack([count // 4, 3 * count // 4]).clamp_max(len(ordered) - 1)
    first, third = ordered.gather(0, places)
    return first - whisker * (third - first), third + whisker * (third - first)


def _upper(rows: slice, unit: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of some rows with all, and which of them are pairs of two labels above the diagonal."""
    similarity = unit[rows] @ unit.T
    above = (
        torch.arange(len(unit), device=unit.device) > torch.arange(rows.start, rows.stop, device=unit.device)[:, None]
    )
    return similarity, above & ~same_label(labels[rows], labels)


@torch.no_grad()
def _streamed_fences(
    unit: Tensor, labels: Tensor, whisker: float | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """The same fences without all pairs at once: a histogram, then the values of the two bins that hold the quartiles.

    Without a whisker: the smallest and the largest similarity.
    """
    count = len(unit)
    size = chunk_size or max(1, 2**20 // count)
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    histogram = torch.zeros(BINS, dtype=torch.long, device=unit.device)
    least, most = unit.new_full((), torch.inf), unit.new_full((), -torch.inf)

    def place(values: Tensor) -> Tensor:
        return ((values + 1.001) * (BINS / 2.002)).long().clamp(0, BINS - 1)

    for rows in blocks:
        similarity, mask = _upper(rows, unit, labels)
        values = similarity[mask]
        histogram += torch.bincount(place(values), minlength=BINS)
        if len(values):
            least, most = torch.minimum(least, values.min()), torch.maximum(most, values.max())
    total = int(histogram.sum())
    if total == 0 or whisker is None:
        return (least, most) if total else (unit.new_zeros(()), unit.new_zeros(()))
    upto = histogram.cumsum(0)
    ranks = torch.tensor([total // 4, 3 * total // 4], device=unit.device)
    bins = torch.searchsorted(upto, ranks, right=True)
    held: list[list[Tensor]] = [[], []]
    for rows in blocks:
        similarity, mask = _upper(rows, unit, labels)
        values = similarity[mask]
        where = place(values)
        for kept, wanted in zip(held, bins):
            kept.append(values[where == wanted])
    before = (upto - histogram)[bins]
    first, third = (torch.cat(kept).sort().values[rank - start] for kept, rank, start in zip(held, ranks, before))
    # no fence beyond what there is: the upper one is also the shift of the exponentials
    low, high = first - whisker * (third - first), third + whisker * (third - first)
    return low, torch.minimum(high, most)
