"""One entry of the table that holds every loss of the core to the same rules; see ``test_losses_all.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["LossCase"]


@dataclass(frozen=True)
class LossCase:
    """How to build a loss and what to feed it.

    Args:
        name: unique; the class name, with the setting where a class has several entries.
        build: makes the loss with the given extra keywords; parameters must not depend on a random state.
        inputs: seed -> the inputs of forward, floating-point ones float64; deterministic, on the CPU.
        batch: positions of the inputs whose first axis is the batch. They are permuted together, cut to one sample and
            shared out over two processes. Empty: the loss has no batch.
        permutable: the value does not depend on the order of the batch.
        single: a batch of one sample gives a finite loss (otherwise a ValueError is expected).
        gathers: takes ``gather_distributed``; two processes must give the joint batch's value and gradient.
        chunks: takes ``chunk_size``; every size must give the same value and gradient.
        graph_break: why ``torch.compile(fullgraph=True)`` cannot take it; empty where it can.
        host_sync: why forward reads values back; empty where it does not.
        tolerance: relative and absolute tolerance of float32 against float64.
        half_tolerance: the same of bfloat16 inputs against these inputs in float64.
        large: makes float32 inputs of N = 16,384, D = 128 for a loss with ``chunk_size``; its memory must stay bounded.
        detached: positions of floating inputs that get no gradient.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    batch: tuple[int, ...] = (0, 1)
    permutable: bool = True
    single: bool = True
    gathers: bool = False
    chunks: bool = False
    graph_break: str = ""
    host_sync: str = ""
    tolerance: tuple[float, float] = (2e-4, 2e-5)
    half_tolerance: tuple[float, float] = (2e-3, 2e-3)
    large: Callable[[], tuple[Any, ...]] | None = None
    detached: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    def differentiable(self, inputs: tuple[Any, ...]) -> list[int]:
        """Positions of the inputs that must get a gradient."""
        floating = (i for i, item in enumerate(inputs) if isinstance(item, Tensor) and item.is_floating_point())
        return [i for i in floating if i not in self.detached]
