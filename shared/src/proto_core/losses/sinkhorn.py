"""Sinkhorn divergence and uncertainty-weighted prototype alignment: the losses of CLIPoint3D (arXiv 2602.20409).

Both align an unlabelled target with a labelled source. Unlike in the authors' code, the divergence is converged (theirs
is annealed and stops early, within 2 %), the alignment has a gradient, and the number of random subsets of a prototype
is not the class size.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets, check_positive
from proto_core.distances import cosine_similarity, sq_euclidean
from proto_core.distributed import gather_with_grad
from proto_core.precision import full_precision, no_autocast
from proto_core.transport import check_weights, sinkhorn_plan, symmetric_potential

__all__ = ["SinkhornLoss", "UncertaintyPrototypeAlignmentLoss", "confidence_score", "uncertainty_prototypes"]


class SinkhornLoss(nn.Module):
    """Sinkhorn divergence ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`` of two weighted sets of points.

    ``OT = min <P, C> + blur^p KL(P | a b^T)`` with cost ``|x - y|`` (p = 1) or ``|x - y|^2 / 2`` (p = 2); the gradient
    is that of the cost under the optimal plan.

    Args:
        p: 1 or 2.
        blur: length below which points are not told apart; the entropy's strength is ``blur ** p``.
        debias: subtract the two transports of a set onto itself.
        max_iter: iterations at most.
        tol: see :func:`proto_core.transport.sinkhorn_plan`; never asked for more than the precision gives.
        gather_distributed: the joint sets of all ranks, with uniform weights.

    Raises:
        ValueError: another p, blur not positive; shapes that do not fit, weights that are not positive of sum 1.

    Example:
        >>> import torch
        >>> from proto_core.losses import SinkhornLoss
        >>> SinkhornLoss(p=2, blur=0.1)(torch.zeros(4, 2), torch.ones(6, 2)).round(decimals=4)
        tensor(1.)
    """

    def __init__(
        self,
        p: int = 1,
        blur: float = 0.05,
        debias: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-9,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if p not in (1, 2):
            raise ValueError(f"p: found {p}, needed 1 or 2")
        check_positive(blur=blur, max_iter=max_iter)
        self.p = p
        self.blur = blur
        self.debias = debias
        self.max_iter = max_iter
        self.tol = tol
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Settings."""
        return f"p={self.p}, blur={self.blur}, debias={self.debias}, max_iter={self.max_iter}, tol={self.tol}"

    def forward(
        self,
        x: Float[Tensor, "N D"],
        y: Float[Tensor, "M D"],
        a: Float[Tensor, "N"] | None = None,
        b: Float[Tensor, "M"] | None = None,
    ) -> Float[Tensor, ""]:
        """Divergence of two sets; without weights both are uniform."""
        if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (len(x), len(y)):
            raise ValueError(f"x, y: found shapes {tuple(x.shape)} and {tuple(y.shape)}, needed [N, D] and [M, D]")
        x, y = full_precision(x), full_precision(y)
        if self.gather_distributed:
            if a is not None or b is not None:
                raise ValueError("a, b: found weights, needed none with gather_distributed=True")
            x, y = gather_with_grad(x), gather_with_grad(y)
        rows, columns = check_weights("a", a, len(x), x), check_weights("b", b, len(y), y)
        with no_autocast(x):
            loss = self._across(x, y, rows, columns)
            if self.debias:
                loss = loss - (self._within(x, rows) + self._within(y, columns)) / 2
        return loss

    def _cost(self, x: Tensor, y: Tensor) -> Tensor:
        if self.p == 2:
            return sq_euclidean(x, y) / 2
        # by differences: the root would make the cancellation of a matrix product large where points coincide
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    def _stop(self, like: Tensor) -> float:
        return max(self.tol, 10 * torch.finfo(like.dtype).eps)

    def _across(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        cost = self._cost(x, y)
        plan, f, g = sinkhorn_plan(cost, a, b, self.blur**self.p, self.max_iter, self._stop(cost))
        return _value(a @ f + b @ g, plan, cost)

    def _within(self, x: Tensor, a: Tensor) -> Tensor:
        cost = self._cost(x, x)
        epsilon = self.blur**self.p
        f = symmetric_potential(cost.detach(), a, epsilon, self.max_iter, self._stop(cost))
        plan = a.unsqueeze(1) * a * ((f.unsqueeze(1) + f - cost.detach()) / epsilon).exp()
        return _value(2 * (a @ f), plan, cost)


def _value(value: Tensor, plan: Tensor, cost: Tensor) -> Tensor:
    """The optimal value with the gradient of the plan's cost (envelope theorem)."""
    spent = (plan * cost).sum()
    return value + (spent - spent.detach())


class UncertaintyPrototypeAlignmentLoss(nn.Module):
    """Pull unlabelled features to the class prototype they are nearest to, the more the surer they are.

    With s the cosines to the prototypes: ``-mean_b w_b log softmax(s_b)[argmax s_b]``, w the
    :func:`confidence_score` of s.

    Args:
        detach_weights: no gradient through the confidence.

    Raises:
        ValueError: shapes that do not fit, fewer than two prototypes.

    Example:
        >>> import torch
        >>> from proto_core.losses import UncertaintyPrototypeAlignmentLoss
        >>> UncertaintyPrototypeAlignmentLoss()(torch.eye(2), torch.eye(2)).round(decimals=4)
        tensor(0.0501)
    """

    def __init__(self, detach_weights: bool = False) -> None:
        super().__init__()
        self.detach_weights = detach_weights

    def extra_repr(self) -> str:
        """Settings."""
        return f"detach_weights={self.detach_weights}"

    def forward(self, features: Float[Tensor, "B D"], prototypes: Float[Tensor, "C D"]) -> Float[Tensor, ""]:
        """Loss of a batch."""
        scores = self._scores(features, prototypes)
        weight = confidence_score(scores)
        if self.detach_weights:
            weight = weight.detach()
        return -(weight * scores.log_softmax(dim=1).amax(dim=1)).mean()

    def details(self, features: Float[Tensor, "B D"], prototypes: Float[Tensor, "C D"]) -> dict[str, Tensor]:
        """``pseudo_labels``, ``alpha`` = (highest cosine + 1) / 2, and ``confidence`` of each sample."""
        scores = self._scores(features, prototypes).detach()
        best = scores.max(dim=1)
        return {
            "pseudo_labels": best.indices,
            "alpha": (best.values + 1) / 2,
            "confidence": confidence_score(scores),
        }

    def _scores(self, features: Tensor, prototypes: Tensor) -> Tensor:
        if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1] or not len(features):
            shapes = f"{tuple(features.shape)} and {tuple(prototypes.shape)}"
            raise ValueError(f"features, prototypes: found shapes {shapes}, needed [B, D] and [C, D]")
        return cosine_similarity(features, prototypes)


def confidence_score(logits: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch"]:
    """``1 - H / log C`` with ``H = -sum p log(p + 1e-8)`` of the softmax: 0 for a uniform one, 1 for a sure one.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> import torch
        >>> from proto_core.losses import confidence_score
        >>> confidence_score(torch.tensor([[0.0, 0.0], [0.0, 50.0]])).abs().round(decimals=4)
        tensor([0., 1.])
    """
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(f"logits: found shape {tuple(logits.shape)}, needed [..., C] with at least 2 classes")
    probability = full_precision(logits).softmax(dim=-1)
    return 1 + (probability * (probability + 1e-8).log()).sum(dim=-1) / math.log(logits.shape[-1])


def uncertainty_prototypes(
    features: Float[Tensor, "N D"],
    logits: Float[Tensor, "N C"],
    labels: Int[Tensor, "N"],
    num_classes: int,
    num_subsets: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "C D"]:
    """Class prototypes: the mean over random subsets of each class of their confidence-weighted means.

    Args:
        features: of the labelled source.
        logits: from which :func:`confidence_score` weights the samples.
        labels: classes.
        num_classes: number of rows of the result.
        num_subsets: subsets of a class, of equal size up to one; empty ones are left out.
        generator: source of the split.

    Returns:
        Zeros for a class without a sample; the plain mean where a subset's weights are not positive in sum.

    Raises:
        ValueError: shapes that do not fit, a label outside 0..C-1, fewer than one subset.

    Example:
        >>> import torch
        >>> from proto_core.losses import uncertainty_prototypes
        >>> features, logits = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0, 50.0], [50.0, 0.0]])
        >>> uncertainty_prototypes(features, logits, torch.tensor([0, 0]), num_classes=2).flatten()
        tensor([2., 0.])
    """
    check_class_targets(features, labels, "features", classes=num_classes)
    if logits.ndim != 2 or len(logits) != len(features):
        raise ValueError(f"logits: found shape {tuple(logits.shape)}, needed [{len(features)}, C]")
    if num_subsets < 1:
        raise ValueError(f"num_subsets: found {num_subsets}, needed at least 1")
    features, weight = full_precision(features), confidence_score(logits)
    device = features.device
    source = generator.device if generator is not None else device
    order = torch.randperm(len(features), generator=generator, device=source).to(device)
    labels = labels.long()
    order = order[labels[order].argsort(stable=True)]
    ordered = labels[order]
    place = torch.arange(len(order), device=device) - torch.searchsorted(ordered, ordered)
    cell = torch.empty_like(order)
    cell[order] = ordered * num_subsets + place % num_subsets
    cells = num_classes * num_subsets

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(cells, *values.shape[1:]).index_add(0, cell, values)

    weight = weight.to(features)
    counts, weights = sums(torch.ones_like(weight)), sums(weight)
    usable = weights > 0
    weighted = sums(features * weight.unsqueeze(1)) / torch.where(usable, weights, 1).unsqueeze(1)
    plain = sums(features) / counts.clamp_min(1).unsqueeze(1)
    subset = torch.where(usable.unsqueeze(1), weighted, plain).unflatten(0, (num_classes, num_subsets))
    filled = (counts > 0).to(features).unflatten(0, (num_classes, num_subsets))
    return (subset * filled.unsqueeze(-1)).sum(dim=1) / filled.sum(dim=1).clamp_min(1).unsqueeze(1)
