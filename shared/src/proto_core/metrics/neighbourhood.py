"""ICNN score: how well classes are separated, seen from the neighbours of each sample (arXiv 2305.09062).

Two forms stand in the authors' code: the one they train with ("modified") and an earlier one ("original", whose third
part, omega, is computed and thrown away there). Neighbours are searched in blocks of anchors without gradient; only the
distances of those that are found are differentiated.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from proto_core.checks import CACHED, check_embeddings, check_option, check_positive
from proto_core.precision import full_precision, no_autocast

__all__ = ["icnn_score"]


def icnn_score(
    embeddings: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    targets: Float[Tensor, "M D"] | None = None,
    target_labels: Int[Tensor, "M"] | None = None,
    k: int = 4,
    instances_per_class: int | None = None,
    variant: str = "modified",
    p: float = 2,
    q: float = 2,
    r: float = 2,
    use_omega: bool = False,
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Separation of classes, in (0, 1], higher is better; differentiable in embeddings and targets.

    Of each anchor the nearest targets are taken and the first dropped (itself, where the targets are the anchors; the
    authors drop it for other targets too).

    ``modified``: with ``ipc`` neighbours, distances of the first k are divided by the nearest of another class. ``A``
    is 1 minus the mean of those of the own class, ``B`` the mean of those of other classes over the largest of all,
    ``gamma`` the mean share of own-class neighbours: ``((A + B) / 2 + gamma) / 2``.
    ``original``: with k neighbours, distances scaled to [0, 1] per anchor: ``(lambda + gamma) / 2``; omega is a third.

    Args:
        embeddings: anchors.
        labels: any integers.
        targets: where neighbours are looked for; ``None``: among the anchors.
        target_labels: one per target.
        k: neighbours that count; cut to M - 2.
        instances_per_class: neighbours looked at for one of another class (ipc); ``None``: k + 1.
        variant: ``"modified"`` or ``"original"``.
        p: root of lambda, of the original.
        q: root of omega.
        r: root of gamma.
        use_omega: count omega.
        chunk_size: anchors searched at once; ``None``: what fits the cache.

    Raises:
        ValueError: shapes or types that do not fit, fewer than 3 targets, ``ipc`` outside k to M - 1, k, p, q or r not
            positive, an unknown variant, targets without labels.

    Example:
        >>> import torch
        >>> from proto_core.metrics import icnn_score
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
        >>> icnn_score(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2).round(decimals=2)
        tensor(1.)
    """
    check_embeddings(embeddings, labels)
    check_option("variant", variant, "modified", "original")
    check_positive(k=k, p=p, q=q, r=r)
    if (targets is None) != (target_labels is None):
        raise ValueError("targets, target_labels: found one of them, needed both or none")
    if targets is None or target_labels is None:
        targets, target_labels = embeddings, labels
    check_embeddings(targets, target_labels, "targets")
    if targets.shape[1] != embeddings.shape[1]:
        raise ValueError(f"targets: found {targets.shape[1]} features, needed {embeddings.shape[1]}")
    x, t = full_precision(embeddings), full_precision(targets)
    count = len(t)
    if count < 3:
        raise ValueError(f"targets: found {count}, needed at least 3")
    if variant == "original":
        k = k if k < count else 3
        if k > count - 1:
            raise ValueError(f"k: found {k} with {count} targets, needed at most {count - 1}")
        distance, same = _neighbours(x, labels, t, target_labels, k, chunk_size)
        return _original(distance, same, k, p, q, r, use_omega)
    if k + 2 >= count:
        k = count - 2
    ipc = k + 1 if instances_per_class is None else instances_per_class
    if not k <= ipc <= count - 1:
        raise ValueError(f"instances_per_class: found {ipc}, needed {k} (k) to {count - 1}")
    distance, same = _neighbours(x, labels, t, target_labels, ipc, chunk_size)
    return _modified(distance, same, k, k + 2 < count)


def _neighbours(
    x: Tensor, labels: Tensor, t: Tensor, target_labels: Tensor, number: int, chunk_size: int | None
) -> tuple[Float[Tensor, "N number"], Bool[Tensor, "N number"]]:
    """Distances to the nearest targets but the first, in rising order, and whether they are of the anchor's class."""
    size = chunk_size or max(1, CACHED.get(x.device.type, CACHED["cuda"]) // len(t))
    if torch.compiler.is_compiling():
        size = len(x)
    with torch.no_grad(), no_autocast(x):
        origin = t.mean(dim=0)
        moved, norms = t - origin, (t - origin).square().sum(dim=1)
        # the anchor's own norm does not change the order of its neighbours
        found = [
            (norms - 2 * ((rows - origin) @ moved.T)).topk(number + 1, dim=1, largest=False).indices
            for rows in x.split(size)
        ]
        index = torch.cat(found)
    distance = ((x.unsqueeze(1) - t[index]).square().sum(dim=-1) + 1e-6).sqrt()
    distance, order = distance.sort(dim=1, stable=True)
    index = index.gather(1, order)
    same = target_labels[index] == labels.unsqueeze(1)
    return distance[:, 1:], same[:, 1:]


def _modified(distance: Tensor, same: Tensor, k: int, enough: bool) -> Tensor:
    eps = 1e-7
    nearest_other = torch.where(same, torch.inf, distance).amin(dim=1, keepdim=True)
    lonely = nearest_other.isinf()
    distance, same = distance[:, :k], same[:, :k]
    ratio = torch.where(lonely, 0, distance / torch.where(lonely, 1, nearest_other + eps))
    ratio = ratio / ratio.amax(dim=1, keepdim=True).clamp_min(1)
    own = same.sum(dim=1).to(distance)  # an integer tensor and a float would meet in float32
    inner = torch.where(same, ratio, 0).sum(dim=1) / (own + eps)
    a = 1 - inner.sum() / ((own > 0).to(distance).sum() + eps)
    apart = torch.where(same, 0, distance)
    outer = (apart / (apart.amax() + eps)).sum(dim=1) / (k - own + eps)
    mixed = (own < k).to(distance).sum()
    b = torch.where(mixed > 0, outer.sum() / (mixed + eps), 1)
    gamma = (own / k).mean() if enough else torch.ones_like(a)
    return ((a + b) / 2 + gamma) / 2


def _original(distance: Tensor, same: Tensor, k: int, p: float, q: float, r: float, use_omega: bool) -> Tensor:
    eps = 1e-6
    low, high = distance.amin(dim=1, keepdim=True), distance.amax(dim=1, keepdim=True)
    scaled = (distance - low) / (high - low + eps)
    own, other = torch.where(same, scaled, 0), torch.where(same, 0, scaled)
    closeness = torch.where(same, 1 - scaled, scaled).sum(dim=1)
    inner = (closeness / (closeness.amax() + eps)).pow(1 / p).mean()
    gamma = (same.sum(dim=1).to(distance) / k).pow(1 / r).mean()
    if not use_omega:
        return (inner + gamma) / 2
    omega = (1 - own.var() - other.var()).pow(1 / q)
    return (inner + gamma + omega) / 3
