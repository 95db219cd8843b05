"""H-consistency of comp-sum losses (ICML 2023, arXiv 2304.07288): what a small surrogate excess says of the error.

Theorem 1, for a symmetric and complete hypothesis set H, any distribution and h in H:
``R_01(h) - R_01* + M_01 <= Gamma_tau(R_tau(h) - R_tau* + M_tau)`` with ``Gamma_tau`` the inverse of ``T_tau`` and M the
minimisability gaps. T is exact for tau <= 1 and a valid lower bound above. Everything is float64; NumPy arrays come
back as NumPy, tensors as tensors, numbers as floats.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "bayes_conditional_risk",
    "h_consistency_bound",
    "h_consistency_bound_closed",
    "h_consistency_transform",
    "minimizability_gap",
    "minimizability_gap_upper",
    "minimizability_gap_upper_deterministic",
]

BISECTIONS = 60


def h_consistency_transform(beta: Any, tau: float, num_classes: int) -> Any:
    """``T_tau(beta)``: the surrogate excess that an excess error beta costs at least (Theorem 1).

    With ``a = 1 / (2 - tau)`` and ``m = (((1 + beta)^a + (1 - beta)^a) / 2)^(2 - tau)``:

    - tau < 1: ``2^(1 - tau) / (1 - tau) (1 - m)``;
    - tau = 1: ``((1 + beta) log(1 + beta) + (1 - beta) log(1 - beta)) / 2``;
    - 1 < tau < 2: ``(m - 1) / ((tau - 1) n^(tau - 1))``;
    - tau >= 2: ``beta / ((tau - 1) n^(tau - 1))``.

    Args:
        beta: excess error, in [0, 1].
        tau: of the loss, at least 0.
        num_classes: n, at least 2.

    Raises:
        ValueError: beta outside [0, 1], a negative tau, fewer than two classes.

    Example:
        >>> from proto_core.theory import h_consistency_transform
        >>> h_consistency_transform(0.5, 2.0, 4)
        0.125
    """
    _check(tau, num_classes)
    values = _read("beta", beta)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"beta: found {values[~((values >= 0) & (values <= 1))].flat[0]}, needed numbers in [0, 1]")
    return _as(_transform(values, tau, num_classes), beta)


def h_consistency_bound(surrogate_excess: Any, tau: float, num_classes: int) -> Any:
    """``Gamma_tau(t) = T_tau^-1(t)``, at most 1: the excess error that a surrogate excess t allows (Theorem 1).

    Closed for tau = 0 (``sqrt(2 t - t^2)``) and tau >= 2, otherwise by bisection to 1e-12.

    Args:
        surrogate_excess: t, at least 0, minimisability gap included.
        tau: of the loss, at least 0.
        num_classes: n, at least 2.

    Raises:
        ValueError: a negative excess or tau, fewer than two classes.

    Example:
        >>> from proto_core.theory import h_consistency_bound
        >>> h_consistency_bound(0.125, 2.0, 4)
        0.5
    """
    _check(tau, num_classes)
    excess = _excess(surrogate_excess)
    if tau >= 2:
        found = np.minimum((tau - 1) * num_classes ** (tau - 1) * excess, 1.0)
    elif tau == 0:
        inside = np.minimum(excess, 1.0)
        found = np.sqrt(np.maximum(2 * inside - inside**2, 0.0))
    else:
        low, high = np.zeros_like(excess), np.ones_like(excess)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = _transform(middle, tau, num_classes) < excess
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        found = np.where(excess >= _transform(np.ones(()), tau, num_classes), 1.0, (low + high) / 2)
        found = np.where(excess == 0, 0.0, found)
    return _as(found, surrogate_excess)


def h_consistency_bound_closed(surrogate_excess: Any, tau: float, num_classes: int) -> Any:
    """A simpler bound, never below :func:`h_consistency_bound`.

    tau < 1: ``sqrt(2^tau (2 - tau) t)``; 1 <= tau < 2: ``sqrt(2 n^(tau - 1) (2 - tau) t)``; tau >= 2:
    ``(tau - 1) n^(tau - 1) t``.

    Between 1 and 2 the formula alone is no bound: with tau = 1.5, two classes, p = (1, 0) and uniform scores the error
    is 1 at an excess of 0.586, where it says 0.910. There the larger of the formula and Gamma comes back.

    Args:
        surrogate_excess: t, at least 0.
        tau: of the loss, at least 0.
        num_classes: n, at least 2.

    Raises:
        ValueError: a negative excess or tau, fewer than two classes.

    Example:
        >>> from proto_core.theory import h_consistency_bound_closed
        >>> h_consistency_bound_closed(0.5, 1.0, 4)
        1.0
    """
    _check(tau, num_classes)
    excess = _excess(surrogate_excess)
    if tau < 1:
        found = np.sqrt(2**tau * (2 - tau) * excess)
    elif tau < 2:
        found = np.sqrt(2 * num_classes ** (tau - 1) * (2 - tau) * excess)
        if tau > 1:
            found = np.maximum(found, h_consistency_bound(excess, tau, num_classes))
    else:
        found = (tau - 1) * num_classes ** (tau - 1) * excess
    return _as(found, surrogate_excess)


def bayes_conditional_risk(cond_probs: Any, tau: float) -> Any:
    """Smallest expected loss under class probabilities p, over all scores.

    ``((sum p^(1 / (2 - tau)))^(2 - tau) - 1) / (1 - tau)`` below 2; the entropy in nats at tau = 1;
    ``(1 - max p) / (tau - 1)`` from 2 on.

    Args:
        cond_probs: ``[..., C]``, rows of sum 1.
        tau: of the loss, at least 0.

    Returns:
        ``[...]``.

    Raises:
        ValueError: a negative tau, negative probabilities, rows whose sum is not 1.

    Example:
        >>> from proto_core.theory import bayes_conditional_risk
        >>> bayes_conditional_risk([0.75, 0.25], 2.0)
        0.25
    """
    _check(tau, 2)
    return _as(_bayes_risk(_probabilities(cond_probs), tau), cond_probs)


def minimizability_gap(best_in_class_risk: float, cond_probs: Any, weights: Any, tau: float) -> float:
    """``R*(H) - E[C*]``: how far the best hypothesis of H stays above the pointwise optimum.

    Args:
        best_in_class_risk: smallest expected loss in H.
        cond_probs: class probabilities at M points ``[M, C]``.
        weights: probabilities of the points ``[M]``.
        tau: of the loss, at least 0.

    Returns:
        Not cut at 0: a negative gap shows that the risk and the probabilities do not belong together.

    Raises:
        ValueError: a negative tau; probabilities or weights that are negative, do not fit or have another sum than 1.

    Example:
        >>> from proto_core.theory import minimizability_gap
        >>> minimizability_gap(0.5, [[0.75, 0.25]], [1.0], 2.0)
        0.25
    """
    return float(best_in_class_risk) - _mean_risk(cond_probs, weights, tau)


def minimizability_gap_upper(sum_exp_best_risk: float, cond_probs: Any, weights: Any, tau: float) -> float:
    """``Phi_tau(R_0*) - E[C*]``, an upper bound of the gap by the concavity of Phi (Theorem 3).

    Args:
        sum_exp_best_risk: smallest expected sum-exponential loss in H, at least 0.
        cond_probs: class probabilities at M points ``[M, C]``.
        weights: probabilities of the points ``[M]``.
        tau: of the loss, at least 0.

    Raises:
        ValueError: as :func:`minimizability_gap`, and a negative risk.

    Example:
        >>> from proto_core.theory import minimizability_gap_upper
        >>> minimizability_gap_upper(1.0, [[0.75, 0.25]], [1.0], 2.0)
        0.25
    """
    return _phi(_risk(sum_exp_best_risk), tau) - _mean_risk(cond_probs, weights, tau)


def minimizability_gap_upper_deterministic(
    sum_exp_best_risk: float, score_bound: float, num_classes: int, tau: float
) -> float:
    """The same bound for labels without noise and scores in [-L, L]: ``Phi_tau(R_0*) - Phi_tau((n - 1) e^(-2 L))``.

    Args:
        sum_exp_best_risk: smallest expected sum-exponential loss in H, at least 0.
        score_bound: L, at least 0.
        num_classes: n, at least 2.
        tau: of the loss, at least 0.

    Raises:
        ValueError: a negative tau, risk or bound, fewer than two classes.

    Example:
        >>> from proto_core.theory import minimizability_gap_upper_deterministic
        >>> minimizability_gap_upper_deterministic(3.0, 0.0, 4, 1.0)
        0.0
    """
    _check(tau, num_classes)
    if not score_bound >= 0:
        raise ValueError(f"score_bound: found {score_bound}, needed at least 0")
    return _phi(_risk(sum_exp_best_risk), tau) - _phi((num_classes - 1) * math.exp(-2 * score_bound), tau)


def _transform(beta: Any, tau: float, classes: int) -> Any:
    if tau >= 2:
        return beta / ((tau - 1) * classes ** (tau - 1))
    with np.errstate(divide="ignore"):
        up, down = np.log1p(beta), np.log1p(-beta)
    if tau == 1:
        falling = np.where(beta == 1, 0.0, (1 - beta) * np.where(beta == 1, 0.0, down))
        return ((1 + beta) * up + falling) / 2
    a = 1 / (2 - tau)
    power = np.expm1((np.logaddexp(a * up, a * down) - math.log(2)) / a)  # m - 1
    if tau < 1:
        return -(2 ** (1 - tau)) / (1 - tau) * power
    return power / ((tau - 1) * classes ** (tau - 1))


def _bayes_risk(p: Any, tau: float) -> Any:
    if tau >= 2:
        return (1 - p.max(axis=-1)) / (tau - 1)
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    if tau == 1:
        return -np.where(p > 0, p * np.where(p > 0, log_p, 0.0), 0.0).sum(axis=-1)
    a = 1 / (2 - tau)
    return np.expm1(np.logaddexp.reduce(a * log_p, axis=-1) / a) / (1 - tau)


def _phi(u: float, tau: float) -> float:
    grown = math.log1p(u)
    return grown if abs(1 - tau) < 1e-8 else math.expm1((1 - tau) * grown) / (1 - tau)


def _mean_risk(cond_probs: Any, weights: Any, tau: float) -> float:
    _check(tau, 2)
    p, w = _probabilities(cond_probs), _read("weights", weights)
    if p.ndim != 2 or w.shape != p.shape[:1]:
        raise ValueError(f"cond_probs, weights: found shapes {p.shape} and {w.shape}, needed [M, C] and [M]")
    if (w < 0).any() or abs(w.sum() - 1) > 1e-6:
        raise ValueError(f"weights: found a sum of {w.sum()} and a smallest of {w.min()}, needed 1 and at least 0")
    return float(w @ _bayes_risk(p, tau))


def _probabilities(cond_probs: Any) -> Any:
    p = _read("cond_probs", cond_probs)
    if p.ndim < 1 or p.shape[-1] < 1:
        raise ValueError(f"cond_probs: found shape {p.shape}, needed [..., C]")
    if (p < 0).any() or (np.abs(p.sum(axis=-1) - 1) > 1e-6).any():
        raise ValueError("cond_probs: found rows with a negative entry or another sum than 1")
    return p


def _risk(value: float) -> float:
    if not value >= 0:
        raise ValueError(f"sum_exp_best_risk: found {value}, needed at least 0")
    return float(value)


def _excess(surrogate_excess: Any) -> Any:
    values = _read("surrogate_excess", surrogate_excess)
    if not (values >= 0).all():
        raise ValueError(f"surrogate_excess: found {values.min()}, needed at least 0")
    return values


def _check(tau: float, num_classes: int) -> None:
    if not tau >= 0:
        raise ValueError(f"tau: found {tau}, needed at least 0")
    if num_classes < 2:
        raise ValueError(f"num_classes: found {num_classes}, needed at least 2")


def _read(name: str, values: Any) -> Any:
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    found = found.astype(np.float64)
    if np.isnan(found).any():
        raise ValueError(f"{name}: found NaN, needed numbers")
    return found


def _as(found: Any, like: Any) -> Any:
    """The kind of thing that came in."""
    if isinstance(like, Tensor):
        return torch.from_numpy(np.asarray(found)).to(like.device)
    return float(found) if np.ndim(found) == 0 else found
