"""Comp-sum losses: cross entropy and its relatives as one family (ICML 2023, arXiv 2304.07288).

A concave function of the sum of exponentials of score differences: tau 0 is the sum-exponential loss, 1 the logistic
one (cross entropy), between 1 and 2 the generalised cross entropy, 2 the mean absolute error. The smooth adversarial
form bounds the robust loss. What theory says of them is in :mod:`proto_core.theory`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, check_positive
from proto_core.precision import full_precision
from proto_core.systems import Paper

__all__ = ["CompSumLoss", "SmoothAdversarialCompSumLoss"]


class CompSumLoss(nn.Module):
    """``(p_y^(tau - 1) - 1) / (1 - tau)``, at tau = 1 ``-log p_y``; p the softmax of the logits.

    Below tau = 1 it grows like ``exp((1 - tau) nll)``: clip gradients; float32 overflows to infinity, never to NaN.
    Above, badly misclassified samples have hardly any gradient.

    Args:
        tau: at least 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: a negative tau, an unknown reduction; shapes or types that do not fit, a target outside 0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.losses import CompSumLoss
        >>> [CompSumLoss(tau)(torch.zeros(1, 4), torch.tensor([0])).item() for tau in (0.0, 2.0)]
        [3.0, 0.75]
    """

    paper: ClassVar[Paper] = Paper(
        title="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
        year=2023,
        arxiv="2304.07288",
        code=None,
        evidence="formulas",
        summary="cross entropy and its relatives as one family, with bounds and a robust form",
        claim="the H-consistency bounds hold, and the smooth adversarial form trains a robust network",
    )

    def __init__(self, tau: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.tau = _check_tau(tau)
        self.reduction = check_option("reduction", reduction, "mean", "sum", "none")

    @classmethod
    def from_name(cls, name: str, q: float = 0.7) -> CompSumLoss:
        """``"sum_exponential"`` (tau 0), ``"logistic"`` (1), ``"gce"`` (1 + q) or ``"mae"`` (2).

        Raises:
            ValueError: an unknown name, q not positive.
        """
        check_option("name", name, "sum_exponential", "logistic", "gce", "mae")
        check_positive(q=q)
        return cls({"sum_exponential": 0.0, "logistic": 1.0, "gce": 1.0 + q, "mae": 2.0}[name])

    def extra_repr(self) -> str:
        """Settings."""
        return f"tau={self.tau}, reduction={self.reduction!r}"

    def forward(self, logits: Float[Tensor, "N C"], targets: Int[Tensor, "N"]) -> Float[Tensor, "..."]:
        """Loss of a batch."""
        check_class_targets(logits, targets)
        targets = targets.long()
        return _reduce(_comp_sum(full_precision(logits), targets, self.tau), self.reduction)


class SmoothAdversarialCompSumLoss(nn.Module):
    """``Phi_tau(sum_y' exp(-D_y' / rho)) + nu |D(x') - D(x)|_2`` with margins ``D_y' = h_y - h_y'``, y' not y.

    The first term is the comp-sum loss of ``logits / rho``. With ``nu >= sqrt(C - 1) / rho`` and x' the worst input
    near x it bounds the adversarial margin loss; in practice nu is tuned, or warmed up. x' comes from
    :func:`proto_core.attacks.comp_sum_adversary`; run x and x' through the network as one batch.

    Args:
        tau: at least 0.
        rho: margin scale.
        nu: weight of the change.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: a negative tau or nu, rho not positive, an unknown reduction; shapes or types that do not fit, a
            target outside 0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.losses import SmoothAdversarialCompSumLoss
        >>> x = torch.zeros(1, 2)
        >>> SmoothAdversarialCompSumLoss(nu=0.5)(x, torch.tensor([0]), x + torch.tensor([0.0, 2.0])).round(decimals=4)
        tensor(1.6931)
    """

    def __init__(self, tau: float = 1.0, rho: float = 1.0, nu: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.tau = _check_tau(tau)
        check_positive(rho=rho)
        if not nu >= 0:
            raise ValueError(f"nu: found {nu}, needed at least 0")
        self.rho = rho
        self.nu = nu
        self.reduction = check_option("reduction", reduction, "mean", "sum", "none")

    def extra_repr(self) -> str:
        """Settings."""
        return f"tau={self.tau}, rho={self.rho}, nu={self.nu}, reduction={self.reduction!r}"

    def forward(
        self, logits: Float[Tensor, "N C"], targets: Int[Tensor, "N"], adv_logits: Float[Tensor, "N C"]
    ) -> Float[Tensor, "..."]:
        """Loss of a batch: logits of x, targets, logits of x'."""
        check_class_targets(logits, targets)
        targets = targets.long()
        if adv_logits.shape != logits.shape:
            raise ValueError(f"adv_logits: found shape {tuple(adv_logits.shape)}, needed {tuple(logits.shape)}")
        clean, moved = full_precision(logits), full_precision(adv_logits)
        change = moved - clean
        change = change.gather(1, targets.unsqueeze(1)) - change  # the target's own entry is 0
        square = change.square().sum(dim=1)
        apart = square > 0
        norm = torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)
        return _reduce(_comp_sum(clean / self.rho, targets, self.tau) + self.nu * norm, self.reduction)


def _comp_sum(logits: Tensor, targets: Tensor, tau: float) -> Tensor:
    nll = F.cross_entropy(logits, targets, reduction="none")
    power = 1 - tau
    return nll if abs(power) < 1e-8 else (power * nll).expm1() / power


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _check_tau(tau: float) -> float:
    if not tau >= 0:
        raise ValueError(f"tau: found {tau}, needed at least 0")
    return tau
