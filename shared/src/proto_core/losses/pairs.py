"""What losses over pairs share: who is whose positive, sums over an N x N matrix that is never whole.

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

from proto_core.checks import CACHED

__all__ = [
    "masked_logsumexp",
    "same_label",
    "sum_over_rows",
]


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
