"""The truncated loss for labels of which some are wrong: generalised cross-entropy without the doubtful samples.

Source: "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018, arXiv
1805.07836. Difference from the usual code: a sample that is left out costs the constant of the paper's definition;
there every sample costs less by this constant, which changes no gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets
from proto_core.losses import CompSumLoss
from proto_core.precision import full_precision

__all__ = ["TruncatedLoss"]


class TruncatedLoss(nn.Module):
    """Mean of ``w L_q(p_y) + (1 - w) L_q(k)`` with ``L_q(p) = (1 - p^q) / q``; p the softmax of the logits.

    Samples with ``w = 0`` have no gradient. Which these are, :meth:`keeps` says: those with ``p_y`` up to k.

    Args:
        q: in (0, 1]; towards 0 it is cross-entropy, at 1 the mean absolute error.
        k: probability up to which a label is doubted, in (0, 1).

    Raises:
        ValueError: q or k out of range; shapes or types that do not fit, a target outside 0..C-1.

    Source:
        arXiv 1805.07836, sections 3.2 and 3.3.

    Example:
        >>> import torch
        >>> from proto_vision.truncated import TruncatedLoss
        >>> loss, logits, targets = TruncatedLoss(), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
        >>> kept = loss.keeps(logits, targets)
        >>> kept, loss(logits, targets, kept).round(decimals=4)
        (tensor([ True, False]), tensor(0.3353))
    """

    def __init__(self, q: float = 0.7, k: float = 0.5) -> None:
        super().__init__()
        if not 0 < q <= 1:
            raise ValueError(f"q: found {q}, needed a number in (0, 1]")
        if not 0 < k < 1:
            raise ValueError(f"k: found {k}, needed a probability in (0, 1)")
        self.q, self.k = q, k
        self.losses = CompSumLoss(1 + q, reduction="none")

    def extra_repr(self) -> str:
        """Settings."""
        return f"q={self.q}, k={self.k}"

    def forward(
        self, logits: Float[Tensor, "N C"], targets: Int[Tensor, "N"], kept: Bool[Tensor, "N"] | None = None
    ) -> Float[Tensor, ""]:
        """Loss of a batch; ``kept`` are the samples with ``w = 1``, by default all."""
        losses = self.losses(logits, targets)
        if kept is not None:
            losses = torch.where(kept, losses, (1 - self.k**self.q) / self.q)
        return losses.mean()

    @torch.no_grad()
    def keeps(self, logits: Float[Tensor, "N C"], targets: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Samples whose label has a probability above k."""
        check_class_targets(logits, targets)
        return full_precision(logits).softmax(1).gather(1, targets.long()[:, None]).squeeze(1) > self.k
