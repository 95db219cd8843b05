"""Supervised contrastive loss, in the form that PRD trains with (ICML 2023, arXiv 2303.14771, equation 1).

Unlike the authors' code, an anchor whose class has no other sample is left out instead of giving NaN. Positives enter
by the sums of their classes, so that no mask of pairs is needed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_chunk_size, check_embeddings, check_positive
from proto_core.distributed import gather_with_grad
from proto_core.losses.pairs import sum_over_rows
from proto_core.precision import full_precision, no_autocast, unit_vectors

__all__ = ["SupConLoss"]


class SupConLoss(nn.Module):
    """``-(tau / tau_base) mean_i mean_{j positive} log [ e^(z_i z_j / tau) / sum_{k != i} e^(z_i z_k / tau) ]``.

    Positives of an anchor are the other samples of its label, all views included. The mean is over anchors that have
    one; without any such anchor the loss is 0.

    Args:
        temperature: tau.
        base_temperature: scales the loss.
        normalize: divide embeddings by their norm first.
        gather_distributed: pairs of the joint batch of all ranks.
        chunk_size: rows of the N x N matrix at once; ``None``: as many as fit the cache.

    Raises:
        ValueError: a temperature that is not positive; shapes or types that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import SupConLoss
        >>> SupConLoss(1.0, 1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])).round(decimals=4)
        tensor(0.5514)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        normalize: bool = True,
        *,
        gather_distributed: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.normalize = normalize
        self.gather_distributed = gather_distributed
        self.chunk_size = check_chunk_size(chunk_size)

    def extra_repr(self) -> str:
        """Settings."""
        return f"temperature={self.temperature}, base_temperature={self.base_temperature}, normalize={self.normalize}"

    def forward(self, embeddings: Float[Tensor, "N *V D"], labels: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Loss of a batch: ``[N, D]``, or ``[B, V, D]`` with V views of each of the B labels."""
        if embeddings.ndim == 3:
            labels = labels.repeat_interleave(embeddings.shape[1]) if labels.ndim == 1 else labels
            embeddings = embeddings.flatten(0, 1)
        check_embeddings(embeddings, labels)
        x = full_precision(embeddings)
        if self.gather_distributed:
            x, labels = gather_with_grad(x), gather_with_grad(labels)
        ordered = labels.sort().values
        first = torch.searchsorted(ordered, labels)
        others = torch.searchsorted(ordered, labels, right=True) - first - 1
        counted = others > 0
        nothing = torch.finfo(x.dtype).min / 4

        def block(rows: slice, x: Tensor) -> Tensor:
            logits = x[rows] @ x.T / self.temperature
            logits.diagonal(offset=rows.start).fill_(nothing)
            return torch.where(counted[rows], logits.logsumexp(dim=1), 0).sum()

        with no_autocast(x):
            x = unit_vectors(x) if self.normalize else x
            total = sum_over_rows(block, (x,), rows=len(x), columns=len(x), chunk_size=self.chunk_size)
            # by place of a label's first occurrence among the sorted ones: as good a number of the class as any
            of_class = torch.zeros_like(x).index_add(0, first, x)[first]
            near = (x * (of_class - x)).sum(dim=1) / others.clamp_min(1) / self.temperature
            loss = (total - torch.where(counted, near, 0).sum()) / counted.sum().clamp_min(1)
        return loss * (self.temperature / self.base_temperature)
