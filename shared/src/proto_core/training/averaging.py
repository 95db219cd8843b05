"""A slow copy of a module: momentum (EMA) or frozen teacher, kept in checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

__all__ = ["Teacher"]


class Teacher(nn.Module):
    """A copy of a module that never trains; it follows by an exponential moving average, or stays as it is.

    ``teacher = momentum * teacher + (1 - momentum) * student`` for floating parameters; buffers (batch-norm
    statistics) are averaged the same way if floating, else copied. All ranks update alike, so they stay equal under
    DDP. The copy is in ``state_dict`` and always in evaluation mode.

    Args:
        student: the module to copy.
        momentum: in [0, 1]; 1 is a frozen teacher, 0 a mirror.

    Raises:
        ValueError: momentum outside [0, 1].

    Example:
        >>> import torch
        >>> from proto_core.training import Teacher
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> teacher = Teacher(student, momentum=0.5)
        >>> start = student.weight.item()
        >>> with torch.no_grad():
        ...     _ = student.weight.add_(1.0)
        >>> teacher.update(student)
        >>> round(teacher.module.weight.item() - start, 4)
        0.5
    """

    def __init__(self, student: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: found {momentum}, needed 0 to 1")
        self.momentum = momentum
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's answer, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | None = None) -> None:
        """Take one step towards the student.

        Args:
            student: a module with the same parameters and buffers.
            momentum: replaces the teacher's own for this step.
        """
        keep = self.momentum if momentum is None else momentum
        source = dict(student.named_parameters()) | dict(student.named_buffers())
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.lerp_(source[name].to(tensor.dtype), 1 - keep)
            else:
                tensor.copy_(source[name])
