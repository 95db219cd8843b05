"""Continual learning: averages, transfer and forgetting of a matrix of accuracies, each as its source defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

__all__ = ["ContinualMetrics"]

OVER_TASKS = (
    "backward_transfer",
    "forgetting",
    "forgetting_nonnegative",
    "forgetting_all_tasks",
    "forward_transfer",
)


class ContinualMetrics:
    """Matrix R, ``R[i, j]`` the accuracy on task j after training task i, and what is read off it.

    - ``average_accuracy``: mean of the last row.
    - ``average_incremental_accuracy``: mean over rows of the mean over the tasks seen.
    - ``backward_transfer``: mean over j < T-1 of ``R[T-1, j] - R[j, j]``.
    - ``forgetting`` (Chaudhry et al. 2018): mean over j < T-1 of the best accuracy from j to T-2 minus the last.
    - ``forgetting_nonnegative``: the same with the best up to T-1.
    - ``forgetting_all_tasks``: that times ``(T-1) / T``, the last task counting as 0.
    - ``forward_transfer``: mean over j >= 1 of ``R[j-1, j] - random_accuracy[j]``.

    With one task all but the first two are NaN. Values keep their unit.

    Args:
        num_tasks: T.
        random_accuracy: accuracy of guessing on each task, for ``forward_transfer``.

    Raises:
        ValueError: fewer than one task, another number of random accuracies.

    Example:
        >>> from proto_core.metrics import ContinualMetrics
        >>> metrics = ContinualMetrics(2)
        >>> metrics.update(0, [0.75])
        >>> metrics.update(1, [0.25, 1.0])
        >>> metrics.compute()["average_accuracy"], metrics.compute()["forgetting"]
        (0.625, 0.5)
    """

    def __init__(self, num_tasks: int, random_accuracy: Any = None) -> None:
        if num_tasks < 1:
            raise ValueError(f"num_tasks: found {num_tasks}, needed at least 1")
        self.num_tasks = num_tasks
        self.matrix: Float64[Tensor, "T T"] = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)
        self.random_accuracy: Tensor | None = None
        if random_accuracy is not None:
            self.random_accuracy = torch.as_tensor(random_accuracy, dtype=torch.float64).clone()
            if tuple(self.random_accuracy.shape) != (num_tasks,):
                found = tuple(self.random_accuracy.shape)
                raise ValueError(f"random_accuracy: found shape {found}, needed ({num_tasks},)")

    @classmethod
    def from_matrix(cls, matrix: Any, random_accuracy: Any = None) -> ContinualMetrics:
        """Metrics of a whole matrix.

        Raises:
            ValueError: a matrix that is not square.
        """
        values = torch.as_tensor(matrix, dtype=torch.float64)
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ValueError(f"matrix: found shape {tuple(values.shape)}, needed [T, T]")
        metrics = cls(len(values), random_accuracy)
        metrics.matrix.copy_(values)
        return metrics

    def update(self, after_task: int, accuracies: Sequence[float] | Tensor) -> None:
        """Set a row: accuracies on tasks 0, 1, ... after training ``after_task``; tasks left out are NaN.

        Raises:
            ValueError: a task that there is not, fewer accuracies than tasks seen, or more than tasks.
        """
        if not 0 <= after_task < self.num_tasks:
            raise ValueError(f"after_task: found {after_task}, needed 0 to {self.num_tasks - 1}")
        row = torch.as_tensor(accuracies, dtype=torch.float64)
        if row.ndim != 1 or not after_task + 1 <= len(row) <= self.num_tasks:
            needed = f"{after_task + 1} to {self.num_tasks}"
            raise ValueError(f"accuracies: found shape {tuple(row.shape)}, needed {needed} numbers")
        self.matrix[after_task] = torch.nan
        self.matrix[after_task, : len(row)] = row

    def compute(self) -> dict[str, float]:
        """All metrics by name."""
        tasks, matrix = self.num_tasks, self.matrix
        seen = torch.ones(tasks, tasks, dtype=torch.bool).tril()
        counts = torch.arange(1, tasks + 1)
        found = {
            "average_accuracy": matrix[-1].mean(),
            "average_incremental_accuracy": (torch.where(seen, matrix, 0).sum(dim=1) / counts).mean(),
        }
        if tasks == 1:
            return {name: float(value) for name, value in found.items()} | dict.fromkeys(OVER_TASKS, float("nan"))
        old, last = seen[:, :-1], matrix[-1, :-1]
        after = torch.where(old, matrix[:, :-1], -torch.inf)
        best_before, best = after[:-1].amax(dim=0), after.amax(dim=0)
        found["backward_transfer"] = (last - matrix.diagonal()[:-1]).mean()
        found["forgetting"] = (best_before - last).mean()
        found["forgetting_nonnegative"] = (best - last).mean()
        found["forgetting_all_tasks"] = found["forgetting_nonnegative"] * (tasks - 1) / tasks
        ahead = matrix.diagonal(offset=1)
        guess = self.random_accuracy
        found["forward_transfer"] = torch.tensor(torch.nan) if guess is None else (ahead - guess[1:]).mean()
        return {name: float(value) for name, value in found.items()}

    def __repr__(self) -> str:
        return f"ContinualMetrics(num_tasks={self.num_tasks})"
