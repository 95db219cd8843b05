"""Numeric input of the phenotype analysis: NumPy arrays or torch tensors in, checked NumPy float64 arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "check_binary", "float_array", "float_matrix", "membership"]

Array = np.ndarray | Tensor
"""What every numeric argument of :mod:`proto_ecg.phenotypes` may be."""


def float_array(value: Any, argument: str) -> np.ndarray:
    """``value`` as a float64 array; tensors (bf16 too) are detached and brought to the CPU.

    Raises:
        ValueError: not numeric; names ``argument``.
    """
    if isinstance(value, Tensor):
        value = value.detach().to(device="cpu", dtype=torch.float64).numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: found {type(value).__name__} that is not numeric, needed numbers") from error


def float_matrix(value: Any, argument: str, axes: str) -> np.ndarray:
    """``value`` as a finite, non-empty float64 matrix.

    Args:
        value: array or tensor of two axes.
        argument: its name, for the message.
        axes: the axes' names such as ``"N P"``, for the message.

    Raises:
        ValueError: not two axes, an empty axis, or a NaN or infinite entry.
    """
    matrix = float_array(value, argument)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{argument}: found shape {list(matrix.shape)}, needed [{axes}] with no empty axis")
    finite = np.isfinite(matrix)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(
            f"{argument}: found {matrix[row, column]} at row {row}, column {column} "
            f"({int((~finite).sum())} such entries), needed finite numbers"
        )
    return matrix


def label_matrix(value: Any, rows: int, argument: str = "phecodes") -> np.ndarray:
    """Outcomes ``[N, K]`` in the type they came in (int8 stays int8: a float copy of 160 000 x 1500 is 2 GB).

    Raises:
        ValueError: not two axes, an empty axis, another number of rows, or entries other than 0, 1 and NaN.
    """
    labels = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
    if isinstance(labels, Tensor):
        labels = (labels.double() if labels.is_floating_point() else labels).numpy()
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"{argument}: found shape {list(labels.shape)}, needed [N K] with no empty axis")
    if labels.shape[0] != rows:
        raise ValueError(f"{argument}: found {labels.shape[0]} rows, needed {rows}, as many as activations")
    if not (np.issubdtype(labels.dtype, np.number) or labels.dtype == np.bool_):
        labels = float_array(labels, argument)
    for column in range(labels.shape[1]):
        check_binary(labels[:, column], f"{argument}, column {column}")
    return labels


def check_binary(values: np.ndarray, argument: str) -> None:
    """Refuse outcomes other than 0, 1 and NaN.

    Raises:
        ValueError: names ``argument`` and the first offending value.
    """
    wrong = ~((values == 0) | (values == 1) | (values != values))
    if wrong.any():
        raise ValueError(f"{argument}: found {values[wrong][0]!s}, needed 0, 1 or NaN (neither case nor control)")


def membership(prototype_class: Any, prototypes: int) -> np.ndarray:
    """Boolean class membership ``[P, C]`` of prototypes.

    Raises:
        ValueError: not ``[P, C]`` with ``P`` as given, no class, or entries other than 0 and 1.
    """
    matrix = float_matrix(prototype_class, "prototype_class", "P C")
    if matrix.shape[0] != prototypes:
        raise ValueError(f"prototype_class: found {matrix.shape[0]} rows, needed {prototypes}, one per prototype")
    check_binary(matrix.ravel(), "prototype_class")
    return matrix > 0
