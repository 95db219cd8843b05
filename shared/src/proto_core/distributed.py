"""Collectives that batch-wise losses need: gather with gradient, sums of counts, means over the joint batch.

Everything here is the identity when ``torch.distributed`` is not initialised, works with gloo and nccl, and is called
by every rank or by none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["all_reduce_sum", "gather_parts", "gather_with_grad", "is_distributed", "joint_mean"]


def is_distributed() -> bool:
    """Whether a process group with more than one rank is there.

    Example:
        >>> from proto_core.distributed import is_distributed
        >>> is_distributed()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def all_reduce_sum(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum of ``value`` over all ranks, without gradient; the argument keeps its values.

    Example:
        >>> import torch
        >>> from proto_core.distributed import all_reduce_sum
        >>> all_reduce_sum(torch.tensor(3.0))
        tensor(3.)
    """
    value = value.detach().clone()
    if is_distributed():
        dist.all_reduce(value)
    return value


def joint_mean(total: Float[Tensor, ""], count: Shaped[Tensor, ""]) -> Float[Tensor, ""]:
    """Rank-local share of a mean over the joint batch: ``total / (sum of counts over ranks / number of ranks)``.

    DDP averages gradients over the ranks; the average of this share over the ranks is the joint batch's sum divided by
    the joint batch's count, in value and in gradient, however unevenly the counted entries are spread. A joint count
    of zero gives ``total`` (zero for a sum over nothing), not NaN.

    Args:
        total: this rank's sum.
        count: this rank's number of summed entries, or their sum of weights.

    Example:
        >>> import torch
        >>> from proto_core.distributed import joint_mean
        >>> joint_mean(torch.tensor(6.0), torch.tensor(4))
        tensor(1.5000)
    """
    ranks = dist.get_world_size() if is_distributed() else 1
    joint = all_reduce_sum(count)  # a sum of weights may lie between 0 and 1
    return total * ranks / torch.where(joint > 0, joint, 1)


def _exchange(x: Tensor, sizes: list[int], group: Any = None) -> list[Tensor]:
    """The parts of all ranks, which hold so many rows each: padded for the transfer, cut afterwards."""
    # bool is sent as bytes: not every backend knows it
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    padded = sent.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = sent
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:size].to(x.dtype) for part, size in zip(parts, sizes)]


@torch.no_grad()
def gather_parts(x: Shaped[Tensor, "..."], group: Any = None) -> list[Tensor]:
    """What every rank holds, in rank order and without gradient; ``dist_sync_fn`` of metrics that collect samples.

    A rank that has nothing may hold an empty tensor of any shape and type: it learns both from the others.

    Args:
        x: this rank's part.
        group: process group; ``None`` is all ranks.

    Raises:
        ValueError: parts that differ in more than their number of rows.

    Example:
        >>> import torch
        >>> from proto_core.distributed import gather_parts
        >>> gather_parts(torch.ones(2, 3))[0].shape
        torch.Size([2, 3])
    """
    if not is_distributed():
        return [x]
    kinds: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(kinds, (tuple(x.shape), x.dtype), group=group)
    filled = [(shape[1:], dtype) for shape, dtype in kinds if 0 not in shape]
    if not filled:
        return [x] * len(kinds)
    if len(set(filled)) > 1:
        raise ValueError(f"x: found parts {kinds} on the ranks, needed one shape but for the rows, and one type")
    (rest, dtype), scalar = filled[0], kinds[0][0] == ()
    if 0 in x.shape:
        x = x.new_zeros((0, *rest), dtype=dtype)
    sizes = [shape[0] if shape and 0 not in shape else int(scalar) for shape, _ in kinds]
    parts = _exchange(x.unsqueeze(0) if scalar else x, sizes, group)
    return [part.squeeze(0) for part in parts] if scalar else parts


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.tensor([x.shape[0]], device=x.device)
        lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, length)
        sizes = torch.cat(lengths).tolist()
        ctx.start = sum(sizes[: dist.get_rank()])
        ctx.length = x.shape[0]
        return torch.cat(_exchange(x.detach(), sizes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        joint = grads[0].contiguous().clone()
        dist.all_reduce(joint)
        return joint[ctx.start : ctx.start + ctx.length]


def gather_with_grad(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "joint *rest"]:
    """The joint batch on every rank, in rank order; the gradient of a rank's own part is summed over all ranks.

    First dimensions may differ between ranks (padded for the transfer, cut afterwards); the other dimensions and the
    dtype must be the same everywhere. Every rank must run the backward pass if one does.

    Under DDP, which averages gradients over ranks, a loss of the joint batch computed on every rank has the joint
    batch's gradient: each rank contributes the whole gradient of its own part times the number of ranks, and the
    average takes that factor off.

    Args:
        x: this rank's part, at least one dimension.

    Returns:
        All parts concatenated along the first dimension; ``x`` itself without a process group.

    Raises:
        ValueError: ``x`` has no first dimension.

    Example:
        >>> import torch
        >>> from proto_core.distributed import gather_with_grad
        >>> gather_with_grad(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if x.ndim == 0:
        raise ValueError("x: found a scalar, needed at least one dimension to concatenate along")
    return _GatherWithGrad.apply(x) if is_distributed() else x
