"""What losses over pairs share: checks, who is whose positive, sums over an N x N matrix that is never whole.

A loss over pairs is a sum over rows (anchors). :func:`sum_over_rows` evaluates it in blocks of rows and takes each
block's gradient while the block is in the cache, so that memory is ``chunk_size x N`` and not ``N x N``, at the cost
of the plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "check_chunk_size",
    "check_class_targets",
    "check_embeddings",
    "check_option",
    "check_positive",
    "masked_logsumexp",
    "readable",
    "same_label",
    "sum_over_rows",
]

CACHED = {"cpu": 2**20, "cuda": 2**27}
"""Entries of a block that one goes through at once, by kind of device."""


def readable(values: Tensor) -> bool:
    """Whether values may be looked at: on the host, and not while a graph is traced.

    On an accelerator a look costs a synchronisation, so that wrong values are found there by the kernels alone.

    Example:
        >>> import torch
        >>> from proto_core.losses.pairs import readable
        >>> readable(torch.ones(1)), readable(torch.ones(1, device="meta"))
        (True, False)
    """
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_embeddings(embeddings: Tensor, labels: Tensor, what: str = "embeddings") -> None:
    """Refuse anything but ``[N, D]`` with integer labels ``[N]``, N at least 1.

    Raises:
        ValueError: names the shapes or the type found.
    """
    if embeddings.ndim != 2 or labels.ndim != 1 or len(embeddings) != len(labels) or len(labels) == 0:
        shapes = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{what}, labels: found shapes {shapes}, needed [N, D] and [N] with N at least 1")
    if not embeddings.is_floating_point():
        raise ValueError(f"{what}: found {embeddings.dtype}, needed floating-point numbers")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise ValueError(f"labels: found {labels.dtype}, needed integers")


def check_class_targets(
    logits: Tensor, targets: Tensor, what: str = "logits", classes: int | None = None, empty: bool = False
) -> None:
    """Refuse anything but ``[N, C]`` with integer targets ``[N]`` in 0..C-1.

    Args:
        logits: one row per sample.
        targets: classes.
        what: name of the first argument in messages.
        classes: number of classes C; ``None``: the columns of ``logits``.
        empty: whether N = 0 is allowed.

    Raises:
        ValueError: names the shapes, the type or the value found.
    """
    fits = logits.ndim == 2 and targets.ndim == 1 and len(logits) == len(targets) and (empty or len(targets) > 0)
    if not fits:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"{what}, targets: found shapes {shapes}, needed [N, C] and [N]")
    if not logits.is_floating_point():
        raise ValueError(f"{what}: found {logits.dtype}, needed floating-point numbers")
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
        raise ValueError(f"targets: found {targets.dtype}, needed integers")
    count = logits.shape[1] if classes is None else classes
    if readable(targets) and len(targets) and not bool(((targets >= 0) & (targets < count)).all()):
        wrong = targets[(targets < 0) | (targets >= count)][0]
        raise ValueError(f"targets: found {int(wrong)}, needed classes 0 to {count - 1}")


def check_positive(**options: float) -> None:
    """Refuse options that are not positive numbers.

    Raises:
        ValueError: names the option and its value.
    """
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name}: found {value}, needed a positive number")


def check_option(name: str, value: str, *allowed: str) -> str:
    """``value`` if it is one of the words allowed.

    Raises:
        ValueError: names the option, the word found and the words there are.
    """
    if value not in allowed:
        raise ValueError(f"{name}: found {value!r}, needed one of {', '.join(map(repr, allowed))}")
    return value


def check_chunk_size(chunk_size: int | None) -> int | None:
    """``chunk_size`` if it is ``None`` or at least 1.

    Raises:
        ValueError: names the size found.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: found {chunk_size}, needed at least 1 row, or None")
    return chunk_size


def same_label(rows: Int[Tensor, "R"], columns: Int[Tensor, "N"]) -> Bool[Tensor, "R N"]:
    """Whether two samples have one label.

    Example:
        >>> import torch
        >>> from proto_core.losses.pairs import same_label
        >>> same_label(torch.tensor([3]), torch.tensor([3, 5])).tolist()
        [[True, False]]
    """
    return rows.unsqueeze(1) == columns


def masked_logsumexp(
    logits: Float[Tensor, "R K"], mask: Bool[Tensor, "R K"], weights: Float[Tensor, "R K"] | None = None
) -> Float[Tensor, "R"]:
    """``log sum_k mask w exp(logits)`` by row, the core of every InfoNCE- or SupCon-type loss.

    A row without any entry gives a very negative finite number (its exponential is 0) and no gradient. A weight of 0
    leaves its entry out.

    Args:
        logits: scores, float32 or float64.
        mask: entries that take part.
        weights: weights w, not negative; ``None``: all 1.

    Example:
        >>> import torch
        >>> from proto_core.losses.pairs import masked_logsumexp
        >>> masked_logsumexp(torch.zeros(1, 3), torch.tensor([[True, True, False]])).exp()
        tensor([2.])
    """
    nothing = torch.finfo(logits.dtype).min / 4
    if weights is not None:
        mask = mask & (weights > 0)
        logits = logits + torch.where(mask, weights, 1).log()
    return torch.where(mask, logits, nothing).logsumexp(dim=1)


def sum_over_rows(
    term: Callable[..., Float[Tensor, ""]],
    tensors: tuple[Shaped[Tensor, "..."], ...],
    *,
    rows: int,
    columns: int,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """``sum over blocks of term(rows of the block, *tensors)``, with gradients to the floating-point tensors.

    Args:
        term: ``(slice of rows, *tensors) -> scalar``, the rows' share of the sum; it uses no other tensor that needs
            a gradient.
        tensors: whole tensors.
        rows: number of rows N.
        columns: entries of a row, which decides how many rows fit the cache.
        chunk_size: rows of a block; ``None``: as many as fit the cache. With more than one block there are no second
            derivatives; a number of at least ``rows`` makes it one.

    Returns:
        The sum. Where a graph is traced (``torch.compile``) it is one block, which the compiler cuts as it likes.

    Example:
        >>> import torch
        >>> from proto_core.losses.pairs import sum_over_rows
        >>> x = torch.tensor([[1.0], [2.0]], requires_grad=True)
        >>> total = sum_over_rows(lambda rows, x: (x[rows] @ x.T).sum(), (x,), rows=2, columns=2, chunk_size=1)
        >>> total.backward()
        >>> total.item(), x.grad.flatten().tolist()
        (9.0, [6.0, 6.0])
    """
    size = chunk_size or max(1, CACHED.get(tensors[0].device.type, CACHED["cuda"]) // max(columns, 1))
    if size >= rows or torch.compiler.is_compiling():
        return term(slice(0, rows), *tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _SumOverRows.apply(term, rows, size, *tensors)
    total = tensors[0].new_zeros(())
    for start in range(0, rows, size):
        total = total + term(slice(start, min(start + size, rows)), *tensors)
    return total


class _SumOverRows(torch.autograd.Function):
    """Gradients are taken block by block on the way forward: a scalar's only scale with what comes from behind."""

    @staticmethod
    def forward(ctx: Any, term: Callable[..., Tensor], rows: int, size: int, *tensors: Tensor) -> Tensor:
        inside = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        wanted = [tensor for tensor in inside if tensor.requires_grad]
        totals = [torch.zeros_like(tensor) for tensor in wanted]
        # one accumulator: a scalar kept per block would pin the block's place on the heap
        total_value = tensors[0].new_zeros(())
        for start in range(0, rows, size):
            with torch.enable_grad():
                value = term(slice(start, min(start + size, rows)), *inside)
            if value.requires_grad:
                parts = torch.autograd.grad(value, wanted, allow_unused=True)
                for total, part in zip(totals, parts):
                    if part is not None:
                        total += part
            total_value += value.detach()
        ctx.save_for_backward(*totals)
        ctx.needed = [tensor.requires_grad for tensor in tensors]
        return total_value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        totals = iter(ctx.saved_tensors)
        return (None, None, None, *(next(totals) * upstream if needed else None for needed in ctx.needed))
