"""Contrast with a temperature for every pair, learned by a small network, in several heads.

AMCL (ECCV 2024, arXiv 2310.05615): each of C projection heads has its own similarities; the temperature of a pair is
``tau = lower + (upper - lower) sigmoid(phi([a; b]))`` and is held by ``Omega(tau) = (d / 2) log tau + 1 / tau``. The
formulas are the paper's table of losses; the published code evaluates another one, without negatives. Ours are
``negatives="logsumexp"``, the form before the relaxation to the hardest negative, and the free temperatures of the
Barlow Twins form, whose network the paper does not name.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import CACHED, check_chunk_size, check_option, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import sum_over_rows
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_core.systems import Paper

__all__ = [
    "AdaptiveMultiHeadContrastiveLoss",
    "AdaptiveTemperature",
    "BarlowTwinsLoss",
    "temperature_regularizer",
]


def temperature_regularizer(tau: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """``Omega(tau) = (dim / 2) log tau + 1 / tau``, elementwise; smallest at ``tau = 2 / dim``.

    Source:
        AMCL (arXiv 2310.05615), from a Gaussian likelihood of variance tau.

    Example:
        >>> import torch
        >>> from proto_core.losses import temperature_regularizer
        >>> temperature_regularizer(torch.tensor([1.0, 0.5]), 2).round(decimals=4)
        tensor([1.0000, 1.3069])
    """
    tau = full_precision(tau)
    return 0.5 * dim * tau.log() + tau.reciprocal()


class AdaptiveTemperature(nn.Module):
    """The temperature of a pair: ``lower + (upper - lower) sigmoid(phi([a; b]))``, phi a network of one hidden layer.

    Pairs are ordered, the anchor comes first; projections are taken as they are, not normalised.

    Args:
        embedding_dim: d.
        num_heads: C.
        hidden_dim: width of phi.
        lower: smallest temperature.
        upper: largest temperature.
        shared: one phi for all heads; otherwise each has its own.

    Attributes:
        mlps: phi, one or C of them.

    Raises:
        ValueError: sizes below 1, ``lower`` not positive, ``upper`` not above it; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import AdaptiveTemperature
        >>> temperature, z = AdaptiveTemperature(8, num_heads=3), torch.randn(3, 5, 8)
        >>> temperature(z, z).shape, temperature.pairwise(z, z).shape
        (torch.Size([3, 5]), torch.Size([3, 5, 5]))
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 3,
        hidden_dim: int = 128,
        lower: float = 1e-5,
        upper: float = 2.0,
        shared: bool = True,
    ) -> None:
        super().__init__()
        check_positive(embedding_dim=embedding_dim, num_heads=num_heads, hidden_dim=hidden_dim)
        _check_bounds(lower, upper)
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.lower = lower
        self.upper = upper
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * embedding_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1))
            for _ in range(1 if shared else num_heads)
        )

    def reset_parameters(self) -> None:
        """Draw phi anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def extra_repr(self) -> str:
        """Settings."""
        return f"embedding_dim={self.embedding_dim}, num_heads={self.num_heads}, lower={self.lower}, upper={self.upper}"

    def forward(self, a: Float[Tensor, "C M d"], b: Float[Tensor, "C M d"]) -> Float[Tensor, "C M"]:
        """Temperatures of the pairs of equal rows."""
        self._check(a, b, a.shape[1:2])
        a, b = full_precision(a), full_precision(b)
        of_a, of_b, bias, *second = self.weights(a)
        with no_autocast(a):
            return self._tau(a @ of_a + b @ of_b + bias, *second)

    def pairwise(self, a: Float[Tensor, "C M d"], b: Float[Tensor, "C K d"]) -> Float[Tensor, "C M K"]:
        """Temperatures of every row of a with every row of b; the hidden layer is ``C x M x K x hidden`` large."""
        self._check(a, b, b.shape[1:2])
        a, b = full_precision(a), full_precision(b)
        return self.of_pairs(a, b, *self.weights(a))

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """phi as tensors with a leading axis of 1 or C: first layer's halves, its bias, second layer, its bias."""
        first = torch.stack([mlp[0].weight for mlp in self.mlps]).to(like).mT  # type: ignore[index, union-attr]
        bias = torch.stack([mlp[0].bias for mlp in self.mlps]).to(like).unsqueeze(1)  # type: ignore[index, union-attr]
        second = torch.stack([mlp[2].weight for mlp in self.mlps]).to(like).mT  # type: ignore[index, union-attr]
        last = torch.stack([mlp[2].bias for mlp in self.mlps]).to(like)  # type: ignore[index, union-attr]
        return first[:, : self.embedding_dim], first[:, self.embedding_dim :], bias, second, last

    def of_pairs(
        self, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, bias: Tensor, second: Tensor, last: Tensor
    ) -> Tensor:
        """:meth:`pairwise` with phi as :meth:`weights` gives it."""
        with no_autocast(a):
            hidden = (a @ of_a + bias).unsqueeze(2) + (b @ of_b).unsqueeze(1)
            return self._tau(hidden, second.unsqueeze(1), last.unsqueeze(1))

    def _tau(self, hidden: Tensor, second: Tensor, last: Tensor) -> Tensor:
        scores = (hidden.relu() @ second).squeeze(-1) + last
        return self.lower + (self.upper - self.lower) * scores.sigmoid()

    def _check(self, a: Tensor, b: Tensor, rows: torch.Size) -> None:
        heads, dim = self.num_heads, self.embedding_dim
        for name, x, needed in (("a", a, a.shape[1:2]), ("b", b, rows)):
            if tuple(x.shape) != (heads, *needed, dim):
                size = needed[0] if name == "b" and needed else "M"
                raise ValueError(f"{name}: found shape {tuple(x.shape)}, needed [{heads}, {size}, {dim}]")


class AdaptiveMultiHeadContrastiveLoss(nn.Module):
    """Contrastive losses over C heads with a temperature for every pair.

    With ``s`` the cosine and ``Omega`` of :func:`temperature_regularizer`, summed over heads, mean over anchors i:

    - ``kind="ntxent"``: ``-s_p / tau_p + beta Omega(tau_p) + s_n / tau_n - beta Omega(tau_n)``, p the positive, n the
      negative with the largest cosine; ``negatives="logsumexp"`` has ``log sum_n exp(s_n / tau_n - beta Omega(tau_n))``
      in place of the last two terms. Without a queue (SimCLR) the anchors are both views, the positive is the other
      view, the negatives are all other rows; with one (MoCo) anchors are view1, positives view2, negatives its rows.
    - ``kind="simsiam"`` (also BYOL): ``-cos(p1, h2) / (2 tau_1) - cos(p2, h1) / (2 tau_2) + beta Omega`` of both;
      the targets get no gradient.
    - ``kind="barlow"``: with the correlations r of standardised columns, ``sum_l (1 - r_ll / tau_ll)^2 + w sum_{l != m}
      r_lm^2 / tau_lm + beta (sum_l Omega(tau_ll) - sum_{l != m} Omega(tau_lm))``, tau from a free parameter.

    The term of the negatives falls without bound as ``lower`` goes to 0: train with ``lower`` of 0.05 at least, and
    from scratch with ``negatives="logsumexp"``.

    Args:
        embedding_dim: d.
        num_heads: C.
        kind: ``"ntxent"``, ``"simsiam"`` or ``"barlow"``.
        beta: weight of Omega.
        lower: smallest temperature.
        upper: largest temperature.
        hidden_dim: width of phi.
        shared: one phi for all heads.
        negatives: ``"max"`` or ``"logsumexp"``.
        offdiag_weight: w of the Barlow Twins form.
        gather_distributed: views of the joint batch of all ranks; a queue is taken as it is.
        chunk_size: anchors at once for ``"ntxent"``; ``None``: as many as fit the cache.

    Raises:
        ValueError: settings out of range; shapes that do not fit; one sample without a queue, or for ``"barlow"``; a
            queue with another kind, targets missing.

    Example:
        >>> import torch
        >>> from proto_core.losses import AdaptiveMultiHeadContrastiveLoss
        >>> loss = AdaptiveMultiHeadContrastiveLoss(8, num_heads=2, lower=0.1, negatives="logsumexp")
        >>> loss(torch.randn(2, 4, 8), torch.randn(2, 4, 8)).ndim
        0
    """

    paper: ClassVar[Paper] = Paper(
        title="Adaptive Multi-head Contrastive Learning",
        year=2024,
        arxiv="2310.05615",
        code="LeiWangR/cl@3318352",
        evidence="formulas",
        summary="contrastive learning with several heads and a learned temperature for every pair",
        claim="similarity over its temperature tells positive from negative pairs no worse than one temperature",
    )

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 3,
        kind: str = "ntxent",
        beta: float = 0.1,
        lower: float = 1e-5,
        upper: float = 2.0,
        hidden_dim: int = 128,
        shared: bool = True,
        negatives: str = "max",
        offdiag_weight: float = 5e-3,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(embedding_dim=embedding_dim, num_heads=num_heads)
        _check_bounds(lower, upper)
        for name, value in {"beta": beta, "offdiag_weight": offdiag_weight}.items():
            if value < 0:
                raise ValueError(f"{name}: found {value}, needed at least 0")
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.kind = check_option("kind", kind, "ntxent", "simsiam", "barlow")
        self.beta = beta
        self.lower = lower
        self.upper = upper
        self.negatives = check_option("negatives", negatives, "max", "logsumexp")
        self.offdiag_weight = offdiag_weight
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)
        self.hidden_dim = hidden_dim
        if kind == "barlow":
            self.theta = nn.Parameter(torch.zeros(num_heads, embedding_dim, embedding_dim))
        else:
            self.temperature = AdaptiveTemperature(embedding_dim, num_heads, hidden_dim, lower, upper, shared)

    def reset_parameters(self) -> None:
        """Draw phi anew, or set theta to 0."""
        if self.kind == "barlow":
            nn.init.zeros_(self.theta)
        else:
            self.temperature.reset_parameters()

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"kind={self.kind!r}, beta={self.beta}, lower={self.lower}, upper={self.upper}, "
            f"negatives={self.negatives!r}, offdiag_weight={self.offdiag_weight}"
        )

    def forward(
        self,
        view1: Float[Tensor, "C N d"],
        view2: Float[Tensor, "C N d"],
        queue: Float[Tensor, "C K d"] | None = None,
        targets: tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of a batch: the projections of two views by every head; for ``"simsiam"`` predictions and targets."""
        self._check(view1, view2, queue, targets)
        one, two = (self._joint(full_precision(view), 1) for view in (view1, view2))
        if self.kind == "barlow":
            return self._barlow(one, two)
        if self.kind == "simsiam":
            assert targets is not None
            goals = [self._joint(full_precision(target.detach()), 0) for target in targets]
            return self._towards(one, goals[1]) + self._towards(two, goals[0])
        if queue is not None:
            return self._contrast(one, two, full_precision(queue), 0)
        both = torch.cat([one, two], dim=1)
        return self._contrast(both, torch.cat([two, one], dim=1), both, one.shape[1])

    def _joint(self, x: Tensor, axis: int) -> Tensor:
        if not self.gather_distributed:
            return x
        return gather_with_grad(x.transpose(0, axis).contiguous()).transpose(0, axis)

    def _omega(self, tau: Tensor) -> Tensor:
        return self.beta * temperature_regularizer(tau, self.embedding_dim)

    def _contrast(self, anchors: Tensor, positives: Tensor, others: Tensor, views: int) -> Tensor:
        """``views``: rows of one view where the others are the anchors themselves, 0 for a queue."""
        unit, near, far = (unit_vectors(x) for x in (anchors, positives, others))
        tau = self.temperature(anchors, positives)
        pull = -(unit * near).sum(-1) / tau + self._omega(tau)
        if self.negatives == "max":
            index = self._hardest(unit.detach(), far.detach(), views).unsqueeze(-1).expand_as(anchors)
            tau = self.temperature(anchors, others.gather(1, index))
            push = (unit * far.gather(1, index)).sum(-1) / tau - self._omega(tau)
            return (pull + push).mean(dim=1).sum()
        phi = self.temperature.weights(anchors)

        def block(rows: slice, a: Tensor, b: Tensor, unit: Tensor, far: Tensor, *phi: Tensor) -> Tensor:
            tau = self.temperature.of_pairs(a[:, rows], b, *phi)
            with no_autocast(unit):
                logits = (unit[:, rows] @ far.mT) / tau - self._omega(tau)
            nothing = torch.finfo(logits.dtype).min / 4
            return logits.masked_fill(_excluded(rows, logits, views), nothing).logsumexp(dim=-1).sum()

        count = anchors.shape[1]
        push = sum_over_rows(
            block,
            (anchors, others, unit, far, *phi),
            rows=count,
            columns=others.shape[1] * self.num_heads * self.hidden_dim,
            chunk_size=self.chunk_size,
        )
        return pull.mean(dim=1).sum() + push / count

    @torch.no_grad()
    def _hardest(self, unit: Tensor, far: Tensor, views: int) -> Int[Tensor, "C M"]:
        """Index of the negative with the largest cosine, by blocks of anchors."""
        count, columns = unit.shape[1], far.shape[1] * len(far)
        size = self.chunk_size or max(1, CACHED.get(unit.device.type, CACHED["cuda"]) // columns)
        size = count if torch.compiler.is_compiling() else size
        found = []
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            with no_autocast(unit):
                products = unit[:, rows] @ far.mT
            found.append(products.masked_fill_(_excluded(rows, products, views), -torch.inf).argmax(dim=-1))
        return torch.cat(found, dim=1)

    def _towards(self, predictions: Tensor, goals: Tensor) -> Tensor:
        goals = goals.expand_as(predictions)
        tau = self.temperature(predictions, goals)
        cosine = (unit_vectors(predictions) * unit_vectors(goals)).sum(-1)
        return (self._omega(tau) - cosine / (2 * tau)).mean(dim=1).sum()

    def _barlow(self, one: Tensor, two: Tensor) -> Tensor:
        tau = self.lower + (self.upper - self.lower) * self.theta.to(one).sigmoid()
        correlation, omega = _correlation(one, two), self._omega(tau)
        own = (1 - correlation.diagonal(dim1=1, dim2=2) / tau.diagonal(dim1=1, dim2=2)).square()
        between = self.offdiag_weight * correlation.square() / tau - omega
        diagonal = own + omega.diagonal(dim1=1, dim2=2)
        return diagonal.sum() + _off_diagonal(between).sum()

    def _check(self, view1: Tensor, view2: Tensor, queue: Tensor | None, targets: tuple[Tensor, Tensor] | None) -> None:
        heads, dim = self.num_heads, self.embedding_dim
        rows = view1.shape[1] if view1.ndim == 3 else 0
        if view1.shape != view2.shape or tuple(view1.shape) != (heads, rows, dim) or rows < 1:
            shapes = f"{tuple(view1.shape)} and {tuple(view2.shape)}"
            raise ValueError(f"view1, view2: found shapes {shapes}, needed [{heads}, N, {dim}] both, N at least 1")
        if queue is not None:
            if self.kind != "ntxent":
                raise ValueError(f"queue: found one with kind {self.kind!r}, needed None")
            if queue.ndim != 3 or tuple(queue.shape) != (heads, queue.shape[1], dim) or queue.shape[1] < 1:
                raise ValueError(f"queue: found shape {tuple(queue.shape)}, needed [{heads}, K, {dim}]")
        if (targets is None) == (self.kind == "simsiam"):
            raise ValueError(f"targets: found {'none' if targets is None else 'some'} with kind {self.kind!r}")
        if targets is not None and (len(targets) != 2 or any(tuple(h.shape) != (rows, dim) for h in targets)):
            shapes = ", ".join(str(tuple(h.shape)) for h in targets)
            raise ValueError(f"targets: found shapes {shapes}, needed [{rows}, {dim}] twice")
        if rows < 2 and (self.kind == "barlow" or (self.kind == "ntxent" and queue is None)):
            raise ValueError(f"view1, view2: found {rows} sample, needed 2 at least for kind {self.kind!r}")


class BarlowTwinsLoss(nn.Module):
    """``sum_l (1 - r_ll)^2 + w sum_{l != m} r_lm^2``, r the correlations between the columns of two views.

    Columns are standardised over the batch (unbiased standard deviation, at least 1e-12), ``r = a^T b / N``.

    Args:
        offdiag_weight: w.
        gather_distributed: columns of the joint batch of all ranks.

    Raises:
        ValueError: a negative weight; shapes that differ, fewer than two samples.

    Source:
        Barlow Twins (arXiv 2103.03230), the baseline of AMCL.

    Example:
        >>> import torch
        >>> from proto_core.losses import BarlowTwinsLoss
        >>> view = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> BarlowTwinsLoss()(view, view)  # r = (N - 1) / N on the diagonal
        tensor(0.1250)
    """

    def __init__(self, offdiag_weight: float = 5e-3, *, gather_distributed: bool = False) -> None:
        super().__init__()
        if offdiag_weight < 0:
            raise ValueError(f"offdiag_weight: found {offdiag_weight}, needed at least 0")
        self.offdiag_weight = offdiag_weight
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return f"offdiag_weight={self.offdiag_weight}"

    def forward(self, view1: Float[Tensor, "N d"], view2: Float[Tensor, "N d"]) -> Float[Tensor, ""]:
        """Loss of a batch."""
        if view1.ndim != 2 or view1.shape != view2.shape or len(view1) < 2:
            shapes = f"{tuple(view1.shape)} and {tuple(view2.shape)}"
            raise ValueError(f"view1, view2: found shapes {shapes}, needed [N, d] both, N at least 2")
        one, two = full_precision(view1), full_precision(view2)
        if self.gather_distributed:
            one, two = gather_with_grad(one), gather_with_grad(two)
        correlation = _correlation(one, two)
        return (1 - correlation.diagonal()).square().sum() + self.offdiag_weight * _off_diagonal(
            correlation.square()
        ).sum()


def _excluded(rows: slice, scores: Tensor, views: int) -> Tensor:
    """Self and positive of each row where the columns are both views; nothing for a queue."""
    if views == 0:
        return torch.zeros((), dtype=torch.bool, device=scores.device)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return columns % views == (columns[rows] % views).unsqueeze(1)


def _correlation(one: Tensor, two: Tensor) -> Tensor:
    a, b = (_standardised(x) for x in (one, two))
    with no_autocast(a):
        return a.mT @ b / a.shape[-2]


def _standardised(x: Tensor) -> Tensor:
    """Columns of mean 0 and unbiased deviation 1, at least 1e-12; a constant one is 0 and has no gradient."""
    # from the first row: the rounding of a constant column's mean would be taken for its spread
    x = x - x[..., :1, :].detach()
    spread = x.var(dim=-2, keepdim=True)
    varies = spread > 0
    scale = torch.where(varies, torch.where(varies, spread, 1).clamp_min(1e-24).rsqrt(), 0)
    return (x - x.mean(dim=-2, keepdim=True)) * scale


def _off_diagonal(matrix: Tensor) -> Tensor:
    own = torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(own, 0)


def _check_bounds(lower: float, upper: float) -> None:
    if not 0 < lower < upper:
        raise ValueError(f"lower, upper: found {lower} and {upper}, needed 0 < lower < upper")
