"""Half precision in, float32 inside: what losses, norms and distances do with their inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["full_precision", "no_autocast", "unit_vectors"]


def full_precision(x: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``x`` as float32, or as it is if it is float64.

    Example:
        >>> import torch
        >>> from proto_core.precision import full_precision
        >>> full_precision(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Shaped[Tensor, "*shape"]) -> AbstractContextManager[object]:
    """Context in which products on the device of ``x`` keep their precision.

    Where autocast is off it is nothing at all, so that exported graphs stay plain.

    Example:
        >>> import torch
        >>> from proto_core.precision import no_autocast
        >>> with torch.autocast("cpu", torch.bfloat16), no_autocast(torch.ones(1)):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known and torch.is_autocast_enabled(device) else nullcontext()


def unit_vectors(x: Shaped[Tensor, "*batch D"], eps: float = 1e-12) -> Float[Tensor, "*batch D"]:
    """``x / max(|x|, eps)`` along the last dimension; a zero vector stays zero and gets a zero gradient.

    The formula's own gradient at zero is ``1 / eps``, finite but enough to ruin an optimiser's running moments; a
    vector without direction has nothing to learn from a direction.

    Args:
        x: vectors.
        eps: smallest norm to divide by.

    Example:
        >>> import torch
        >>> from proto_core.precision import unit_vectors
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = full_precision(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(norm > 0, norm.clamp_min(eps).reciprocal(), 0)
