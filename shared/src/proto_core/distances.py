"""Pairwise distances and similarities between points and centres, by name.

Every distance takes ``x [..., D]`` and ``c [K, D]``, returns ``[..., K]`` (at least 0) and is differentiable in both.
Half precision is computed and returned in float32, also under autocast. The set is that of "Rethinking the Harmonic
Loss via Non-Euclidean Distance Layers" (2026, arXiv 2603.10225). It differs from the authors' code: "max" is the
Chebyshev distance's default, squared Euclidean distances and cosine distances are clamped at 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from proto_core.checks import check_chunk_size, check_option, check_positive
from proto_core.precision import no_autocast, unit_vectors

__all__ = [
    "METRICS",
    "bray_curtis",
    "canberra",
    "chebyshev",
    "cosine",
    "cosine_similarity",
    "euclidean",
    "hamming",
    "mahalanobis",
    "manhattan",
    "minkowski",
    "sq_euclidean",
]


def cosine_similarity(
    x: Shaped[Tensor, "*batch D"], c: Shaped[Tensor, "K D"], eps: float = 1e-12
) -> Float[Tensor, "*batch K"]:
    """Cosine of the angle between every ``x`` and every ``c``: ``<x / max(|x|, eps), c / max(|c|, eps)>``.

    A zero vector has similarity 0 to everything and a zero gradient.

    Args:
        x: points.
        c: centres (prototypes).
        eps: smallest norm to divide by.

    Raises:
        ValueError: ``c`` is not ``[K, D]`` with the D of ``x``.

    Example:
        >>> import torch
        >>> from proto_core.distances import cosine_similarity
        >>> cosine_similarity(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        tensor([[1., 0.]])
    """
    x, c = _checked(x, c)
    with no_autocast(x):
        return unit_vectors(x, eps) @ unit_vectors(c, eps).T


def sq_euclidean(x: Shaped[Tensor, "*batch D"], c: Shaped[Tensor, "K D"]) -> Float[Tensor, "*batch K"]:
    """Squared Euclidean distance ``sum_f (x_f - c_f)^2``, as one matrix product.

    Both arguments are first moved so that the centres' mean is the origin, which leaves distances and gradients as
    they are and keeps the cancellation in ``|x|^2 + |c|^2 - 2 <x, c>`` small; what is left of it is clamped at 0.

    Raises:
        ValueError: ``c`` is not ``[K, D]`` with the D of ``x``.

    Example:
        >>> import torch
        >>> from proto_core.distances import sq_euclidean
        >>> sq_euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """
    x, c = _checked(x, c)
    origin = c.detach().mean(dim=0)
    x, c = x - origin, c - origin
    with no_autocast(x):
        cross = x @ c.T
    return ((x * x).sum(-1, keepdim=True) + (c * c).sum(-1) - 2 * cross).clamp_min(0)


def euclidean(x: Shaped[Tensor, "*batch D"], c: Shaped[Tensor, "K D"]) -> Float[Tensor, "*batch K"]:
    """Euclidean distance ``sqrt(sum_f (x_f - c_f)^2)``; its gradient at distance 0 is 0.

    Raises:
        ValueError: ``c`` is not ``[K, D]`` with the D of ``x``.

    Example:
        >>> import torch
        >>> from proto_core.distances import euclidean
        >>> euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    squared = sq_euclidean(x, c)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def manhattan(
    x: Shaped[Tensor, "*batch D"], c: Shaped[Tensor, "K D"], *, chunk_size: int | None = None
) -> Float[Tensor, "*batch K"]:
    """Manhattan distance ``sum_f |x_f - c_f|``.

    Args:
        x: points.
        c: centres.
        chunk_size: centres looked at in one go; ``None``: what fits the cache. Same values, recomputed in the backward
            pass. The same option of the other distances means the same.

    Raises:
        ValueError: shapes that do not fit, ``chunk_size`` below 1.

    Example:
        >>> import torch
        >>> from proto_core.distances import manhattan
        >>> manhattan(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, -4.0]]))
        tensor([[7.]])
    """
    x, c = _checked(x, c)
    if chunk_size is None and not torch.compiler.is_compiling():
        return _cdist(x, c, 1.0)
    return _pairwise(lambda a, b: (a - b).abs().sum(-1), x, c, chunk_size)


def cosine(
    x: Shaped[Tensor, "*batch D"], c: Shaped[Tensor, "K D"], *, stable: bool = True, eps: float = 1e-4
) -> Float[Tensor, "*batch K"]:
    """Cosine distance: one minus the cosine similarity, clamped at 0 from below.

    Args:
        x: points.
        c: centres.
        stable: normalise both sides first; otherwise ``1 - <x, c> / (|x| |c| + eps)``.
        eps: used by ``stable=False`` only.

    Raises:
        ValueError: shapes that do not fit, ``eps`` not positive.

    Example:
        >>> import torch
        >>> from proto_core.distances import cosine
        >>> cosine(torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.eye(2))
        tensor([[1., 1.],
                [0., 1.]])
    """
    check_positive(eps=eps)
    if stable:
        return (1 - cosine_similarity(x, c)).clamp_min(0)
    x, c = _checked(x, c)
    with no_autocast(x):
        products = x @ c.T
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * torch.linalg.vector_norm(c, dim=-1)
    return (1 - products / (norms + eps)).clamp_min(0)


def minkowski(
    x: Shaped[Tensor, "*batch D"],
    c: Shaped[Tensor, "K D"],
    *,
    p: float = 1.5,
    eps: float = 1e-4,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch K"]:
    """Minkowski distance ``(sum_f (|x_f - c_f| + eps)^p + eps)^(1/p)``; eps is part of the distance.

    Raises:
        ValueError: shapes that do not fit, ``p`` below 1, ``eps`` not positive.

    Example:
        >>> import torch
        >>> from proto_core.distances import minkowski
        >>> minkowski(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), p=2.0, eps=1e-8)
        tensor([[5.]])
    """
    x, c = _checked(x, c)
    check_positive(eps=eps)
    if p < 1:
        raise ValueError(f"p: found {p}, needed at least 1")
    return _pairwise(lambda a, b: (((a - b).abs() + eps).pow(p).sum(-1) + eps).pow(1 / p), x, c, chunk_size)


def hamming(
    x: Shaped[Tensor, "*batch D"],
    c: Shaped[Tensor, "K D"],
    *,
    variant: str = "soft",
    threshold: float = 0.5,
    temperature: float = 1.0,
    training: bool = False,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch K"]:
    """Hamming distance between soft or hard bits of the features.

    ``soft``: ``sum_f |sigmoid(x_f / T) - sigmoid(c_f / T)|``. ``gumbel``: the same, with Gumbel noise added to every
    ``x`` and every ``c`` in training. ``hard``: bits ``[x > threshold]``, whose gradient is that of ``sigmoid(x / T)``;
    where two bits agree no gradient flows. T is at least 0.1.

    Raises:
        ValueError: shapes that do not fit, an unknown ``variant``, ``temperature`` not positive.

    Example:
        >>> import torch
        >>> from proto_core.distances import hamming
        >>> hamming(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0]]), variant="hard")
        tensor([[2.]])
    """
    x, c = _checked(x, c)
    check_option("variant", variant, "soft", "gumbel", "hard")
    check_positive(temperature=temperature)
    temperature = max(temperature, 0.1)

    def bits(values: Tensor) -> Tensor:
        if variant == "gumbel" and training:
            uniform = torch.rand_like(values).clamp(1e-7, 1 - 1e-7)
            values = values + (-(-uniform.log()).log()).clamp(-10, 10)
        soft = (values / temperature).sigmoid()
        # the parentheses make the forward value exactly the bit
        return (values > threshold).to(values) + (soft - soft.detach()) if variant == "hard" else soft

    return manhattan(bits(x), bits(c), chunk_size=chunk_size)


def chebyshev(
    x: Shaped[Tensor, "*batch D"],
    c: Shaped[Tensor, "K D"],
    *,
    variant: str = "max",
    alpha: float = 10.0,
    eps: float = 1e-4,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch K"]:
    """Chebyshev distance ``max_f |x_f - c_f|``, or one of two smooth stand-ins.

    With ``z`` the absolute differences divided by (their standard deviation over the features + eps): ``softmax`` is
    ``sum_f softmax(z)_f z_f``, ``smooth`` is ``logsumexp_f(clamp(alpha z, -50, 50)) / alpha``, alpha within [1, 20].

    Raises:
        ValueError: shapes that do not fit, an unknown ``variant``, ``eps`` not positive, a single feature where a
            standard deviation is needed.

    Example:
        >>> import torch
        >>> from proto_core.distances import chebyshev
        >>> chebyshev(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, -4.0]]))
        tensor([[4.]])
    """
    x, c = _checked(x, c)
    check_option("variant", variant, "max", "softmax", "smooth")
    check_positive(eps=eps)
    if variant != "max" and x.shape[-1] < 2:
        raise ValueError(f"x: found 1 feature, needed at least 2 for variant {variant!r} (a standard deviation)")
    if variant == "max" and chunk_size is None and not torch.compiler.is_compiling():
        return _cdist(x, c, torch.inf)
    alpha = min(max(alpha, 1.0), 20.0)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        difference = (a - b).abs()
        if variant == "max":
            return difference.amax(-1)
        variance = difference.var(-1, keepdim=True)
        varies = variance > 0
        z = difference / (torch.where(varies, torch.where(varies, variance, 1).sqrt(), 0) + eps)
        if variant == "softmax":
            return (z.softmax(-1) * z).sum(-1)
        return (alpha * z).clamp(-50, 50).logsumexp(-1) / alpha

    return _pairwise(distance, x, c, chunk_size)


def canberra(
    x: Shaped[Tensor, "*batch D"],
    c: Shaped[Tensor, "K D"],
    *,
    variant: str = "standard",
    eps: float = 1e-4,
    min_denom: float = 1e-3,
    weight_power: float = 1.0,
    normalize_weights: bool = True,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch K"]:
    """Canberra distance ``sum_f |x_f - c_f| / q_f`` with ``q_f = |x_f| + |c_f|`` kept away from 0.

    ``standard``: q below eps becomes eps. ``robust``: q is at least ``min_denom``. ``weighted``: q + eps, and the terms
    weighted by ``q^weight_power`` (divided by its sum over the features if ``normalize_weights``).

    Raises:
        ValueError: shapes that do not fit, an unknown ``variant``, ``eps`` or ``min_denom`` not positive.

    Example:
        >>> import torch
        >>> from proto_core.distances import canberra
        >>> canberra(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([[0.5000]])
    """
    x, c = _checked(x, c)
    check_option("variant", variant, "standard", "robust", "weighted")
    check_positive(eps=eps, min_denom=min_denom)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        size = a.abs() + b.abs()
        if variant == "weighted":
            size = size + eps
            weight = size.pow(weight_power)
            if normalize_weights:
                weight = weight / weight.sum(-1, keepdim=True)
            return (weight * (a - b).abs() / size).sum(-1)
        size = size.clamp_min(eps if variant == "standard" else min_denom)
        return ((a - b).abs() / size).sum(-1)

    return _pairwise(distance, x, c, chunk_size)


def bray_curtis(
    x: Shaped[Tensor, "*batch D"],
    c: Shaped[Tensor, "K D"],
    *,
    variant: str = "standard",
    eps: float = 1e-3,
    min_sum: float = 1e-3,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch K"]:
    """Bray-Curtis distance: the Manhattan distance divided by the size of both vectors together.

    ``standard``: divided by ``max(|sum_f (x_f + c_f)| + eps, 10 eps)``, which signed features can make tiny.
    ``abs``: by ``max(sum_f (|x_f| + |c_f|) + eps, 10 eps)``. ``normalized``: both vectors become
    ``(|x| + eps) / max(sum_f (|x_f| + eps), min_sum, 10 eps)`` first, then as standard.

    Raises:
        ValueError: shapes that do not fit, an unknown ``variant``, ``eps`` or ``min_sum`` not positive.

    Example:
        >>> import torch
        >>> from proto_core.distances import bray_curtis
        >>> bray_curtis(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]]), variant="abs", eps=1e-8)
        tensor([[0.3333]])
    """
    x, c = _checked(x, c)
    check_option("variant", variant, "standard", "abs", "normalized")
    check_positive(eps=eps, min_sum=min_sum)

    def share(values: Tensor) -> Tensor:
        values = values.abs() + eps
        return values / values.sum(-1, keepdim=True).clamp_min(max(min_sum, 10 * eps))

    if variant == "normalized":
        x, c = share(x), share(c)
    if variant == "abs":
        size = x.abs().sum(-1, keepdim=True) + c.abs().sum(-1)
    else:
        size = (x.sum(-1, keepdim=True) + c.sum(-1)).abs()
    return manhattan(x, c, chunk_size=chunk_size) / (size + eps).clamp_min(10 * eps)


def mahalanobis(
    x: Shaped[Tensor, "*batch D"],
    c: Shaped[Tensor, "K D"],
    precision: Shaped[Tensor, "*precision"],
    *,
    eps: float = 1e-4,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch K"]:
    """Mahalanobis distance ``sqrt(max((x - c)^T S (x - c), 0) + eps)`` with the precision matrix S as given.

    Args:
        x: points.
        c: centres.
        precision: S as ``[D, D]``, or its diagonal ``[D]``.
        eps: added under the root.
        chunk_size: see :func:`manhattan`.

    Raises:
        ValueError: shapes that do not fit, ``eps`` not positive.

    Example:
        >>> import torch
        >>> from proto_core.distances import mahalanobis
        >>> mahalanobis(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=1e-8)
        tensor([[5.]])
    """
    x, c = _checked(x, c)
    check_positive(eps=eps)
    features = x.shape[-1]
    if tuple(precision.shape) not in ((features,), (features, features)):
        raise ValueError(f"precision: found shape {tuple(precision.shape)}, needed ({features},) or 2 x {features}")
    matrix = precision.to(x)
    if chunk_size is not None:

        def distance(a: Tensor, b: Tensor) -> Tensor:
            difference = a - b
            with no_autocast(difference):
                scaled = difference * matrix if matrix.ndim == 1 else difference @ matrix
            return ((scaled * difference).sum(-1).clamp_min(0) + eps).sqrt()

        return _pairwise(distance, x, c, chunk_size)
    origin = c.detach().mean(dim=0)
    x, c = x - origin, c - origin
    with no_autocast(x):
        if matrix.ndim == 1:
            seen, own = x * matrix, c * matrix
        else:
            matrix = (matrix + matrix.T) / 2
            seen, own = x @ matrix, c @ matrix
        squared = (x * seen).sum(-1, keepdim=True) + (c * own).sum(-1) - 2 * (seen @ c.T)
    return (squared.clamp_min(0) + eps).sqrt()


AT_ONCE = 2**19
"""Entries ``points x centres x features`` that one goes through at once without being told a chunk size."""

_SQUARES = (sq_euclidean, euclidean, cosine, mahalanobis)
_OTHERS = (manhattan, minkowski, hamming, chebyshev, canberra, bray_curtis)
METRICS: dict[str, Callable[..., Tensor]] = {function.__name__: function for function in (*_SQUARES, *_OTHERS)}
"""Distance functions by name."""


def _checked(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim < 1 or c.ndim != 2 or x.shape[-1] != c.shape[-1]:
        raise ValueError(f"x, c: found shapes {tuple(x.shape)} and {tuple(c.shape)}, needed [..., D] and [K, D]")
    dtype = torch.promote_types(torch.promote_types(x.dtype, c.dtype), torch.float32)
    return x.to(dtype), c.to(dtype)


def _cdist(x: Tensor, c: Tensor, p: float) -> Tensor:
    return torch.cdist(x.reshape(-1, x.shape[-1]), c, p=p).reshape(*x.shape[:-1], len(c))


def _pairwise(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, c: Tensor, chunk_size: int | None) -> Tensor:
    """``distance`` of ``[..., 1, D]`` and ``[k, D]`` for chunks of k centres, each recomputed in the backward pass."""
    if chunk_size is None:
        chunk_size = len(c) if torch.compiler.is_compiling() else max(1, AT_ONCE // max(x.numel(), 1))
    check_chunk_size(chunk_size)
    x = x.unsqueeze(-2)
    if chunk_size >= len(c):
        return distance(x, c)
    return torch.cat([checkpoint(distance, x, part, use_reentrant=False) for part in c.split(chunk_size)], dim=-1)
