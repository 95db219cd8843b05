"""Checks of what losses, prototypes and metrics are given, and when values may be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "CACHED",
    "check_chunk_size",
    "check_class_targets",
    "check_embeddings",
    "check_option",
    "check_positive",
    "readable",
]

CACHED = {"cpu": 2**20, "cuda": 2**27}
"""Entries of an N x M block that one goes through at once, by kind of device."""


def readable(values: Tensor) -> bool:
    """Whether values may be looked at: on the host, and not while a graph is traced.

    On an accelerator a look costs a synchronisation, so that wrong values are found there by the kernels alone.

    Example:
        >>> import torch
        >>> from proto_core.checks import readable
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
