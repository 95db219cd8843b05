"""Pseudo-labels of ProtoGCD that harden over time: one view's prediction teaches the other views.

Source: "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery", TPAMI 2025, arXiv
2504.03755, section 4.2. Difference from the authors' code: any number of views, an empty batch gives 0.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.checks import check_positive
from proto_core.precision import full_precision, no_autocast
from proto_vision.protogcd.contrast import check_views, rows_of_views

__all__ = ["DAPLLoss", "confidence"]


def confidence(probabilities: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch"]:
    """How far the first class is ahead of the second: ``q_(1) / (q_(2) + 1e-6)``.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd.pseudo_labels import confidence
        >>> confidence(torch.tensor([[0.75, 0.25]])).round(decimals=3)
        tensor([3.])
    """
    if probabilities.shape[-1] < 2:
        raise ValueError(f"logits: found {probabilities.shape[-1]} classes, needed 2 or more")
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first / (second + 1e-6)


class DAPLLoss(nn.Module):
    """Dual-level adaptive pseudo-labelling: one view's soft or hard labels teach the other views.

    ``mean over ordered pairs of views (a, b) of mean_n [-sum_k q^a_nk log softmax(l^b / tau)_nk]``: ``q = softmax(l /
    tau_t)`` without gradient; in each view the ``int(N ratio)`` most confident rows (:func:`confidence`) get the hard
    label of their largest q.

    Args:
        num_epochs: of training.
        wait_epochs: first epochs, with ratio 0.
        ramp_epochs: epochs after them over which the ratio goes from ``init_ratio`` to ``final_ratio``, both reached.
        init_ratio: share of hard labels at first.
        final_ratio: share of hard labels in the end.
        temperature: tau of the student.
        teacher_temperature: tau_t.
        num_views: V.

    Shapes:
        logits ``[V N, K]``, view after view -> scalar.

    Raises:
        ValueError: an epoch outside the training, more wait and ramp than epochs, a share outside [0, 1], fewer than
            two views or classes, rows that are no whole number of views.

    Source:
        arXiv 2504.03755, section 4.2.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import DAPLLoss
        >>> loss = DAPLLoss(4, ramp_epochs=3)
        >>> [loss.ratio(epoch) for epoch in range(4)]
        [0.0, 0.5, 1.0, 1.0]
        >>> loss(torch.eye(4), epoch=3).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_epochs: int = 200,
        *,
        wait_epochs: int = 0,
        ramp_epochs: int = 100,
        init_ratio: float = 0.0,
        final_ratio: float = 1.0,
        temperature: float = 0.1,
        teacher_temperature: float = 0.05,
        num_views: int = 2,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, teacher_temperature=teacher_temperature)
        if num_epochs < 1 or wait_epochs < 0 or ramp_epochs < 0 or wait_epochs + ramp_epochs > num_epochs:
            found = f"{num_epochs}, {wait_epochs} and {ramp_epochs}"
            raise ValueError(
                f"num_epochs, wait_epochs, ramp_epochs: found {found}, needed at least 1 epoch, and not more to wait "
                "and to ramp"
            )
        for name, share in (("init_ratio", init_ratio), ("final_ratio", final_ratio)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: found {share}, needed a share in [0, 1]")
        check_views(num_views)
        self.num_epochs, self.wait_epochs, self.ramp_epochs = num_epochs, wait_epochs, ramp_epochs
        self.init_ratio, self.final_ratio = init_ratio, final_ratio
        self.temperature, self.teacher_temperature, self.num_views = temperature, teacher_temperature, num_views
        self._ramp: list[float] = np.linspace(init_ratio, final_ratio, ramp_epochs).tolist()

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"num_epochs={self.num_epochs}, wait_epochs={self.wait_epochs}, ramp_epochs={self.ramp_epochs}, "
            f"init_ratio={self.init_ratio}, final_ratio={self.final_ratio}, temperature={self.temperature}, "
            f"teacher_temperature={self.teacher_temperature}, num_views={self.num_views}"
        )

    def ratio(self, epoch: int) -> float:
        """Share of rows with a hard label in an epoch, counted from 0."""
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch: found {epoch}, needed 0 to {self.num_epochs - 1}")
        if epoch < self.wait_epochs:
            return 0.0
        ramped = epoch - self.wait_epochs
        return self._ramp[ramped] if ramped < self.ramp_epochs else float(self.final_ratio)

    def forward(self, logits: Float[Tensor, "rows K"], epoch: int) -> Float[Tensor, ""]:
        """Loss of a batch; 0 for an empty one."""
        ratio = self.ratio(epoch)
        rows = rows_of_views(logits, self.num_views, "logits")
        views = full_precision(logits).unflatten(0, (self.num_views, rows))
        with torch.no_grad():
            labels = (views / self.teacher_temperature).softmax(-1)
            ahead = confidence(labels)
            chosen = ahead.topk(int(rows * ratio), dim=1).indices
            hard = torch.zeros_like(ahead, dtype=torch.bool).scatter(1, chosen, True)
            one_hot = torch.zeros_like(labels).scatter(2, labels.argmax(2, keepdim=True), 1)
            labels = torch.where(hard[:, :, None], one_hot, labels)
        student = (views / self.temperature).log_softmax(-1)
        with no_autocast(student):
            pairs = torch.einsum("ank,bnk->ab", labels, student)
        others = 1 - torch.eye(self.num_views, dtype=pairs.dtype, device=pairs.device)
        count = self.num_views * (self.num_views - 1) * max(rows, 1)
        return -(pairs * others).sum() / count
