"""Unpenalised logistic regressions by the hundred: one batched Newton iteration over a block of predictors.

Each predictor ``z_p`` gets a model of its own, ``logit P(y = 1) = b0 + b1 z_p + gamma^T covariates``, against one
outcome. "Prototype Learning to Create Refined Interpretable Digital Phenotypes from ECGs" (2025, arXiv 2508.01521)
fits one such model for each pair of prototype and phecode. No code of the authors exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Real
from scipy.special import erfc

from .arrays import Array, check_binary, float_array, float_matrix

__all__ = ["LogisticResult", "logistic_association"]

WALD_95 = 1.959963984540054
SEPARATION = 30.0
"""A linear predictor beyond this (probability 1e-13) is taken for perfect separation."""
SINGULAR = 1e-10
"""Least share of a column's information that the columns before it may leave over (one minus its R squared)."""
BLOCK = 49_152
"""Entries of one ``[predictors, rows]`` work array: small enough that a handful of them stay in the cache."""


class BatchFit(NamedTuple):
    """Coefficient and standard error of each predictor; NaN where the fit failed.

    Attributes:
        beta: ``[B]``, log odds ratio for one unit of the predictor.
        se: ``[B]``, from the inverse observed information.
    """

    beta: np.ndarray
    se: np.ndarray


@dataclass(frozen=True, slots=True)
class LogisticResult:
    """One logistic regression's answer about its predictor.

    Attributes:
        beta: log odds ratio for one unit of the predictor.
        se: standard error from the inverse observed information.
        z: ``beta / se``.
        p_value: two-sided, ``2 (1 - Phi(|z|))``.
        odds_ratio: ``exp(beta)``.
        ci_low: lower end of the 95 % Wald interval of the odds ratio.
        ci_high: its upper end.
        converged: False if the fit failed; all other values are then NaN.
    """

    beta: float
    se: float
    z: float
    p_value: float
    odds_ratio: float
    ci_low: float
    ci_high: float
    converged: bool


def wald(beta: np.ndarray, se: np.ndarray) -> dict[str, np.ndarray]:
    """z, two-sided p, odds ratio and its 95 % interval of coefficients; any shape, NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = beta / se
        return {
            "z": z,
            "p_value": erfc(np.abs(z) / np.sqrt(2.0)),
            "odds_ratio": np.exp(beta),
            "ci_low": np.exp(beta - WALD_95 * se),
            "ci_high": np.exp(beta + WALD_95 * se),
        }


def standardised(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``[P, N]`` with mean 0 and standard deviation 1 (ddof 0), and the deviations ``[P]`` (0 if constant)."""
    deviation = columns.std(axis=1)
    deviation[columns.max(axis=1) == columns.min(axis=1)] = 0.0
    centred = columns - columns.mean(axis=1, keepdims=True)
    centred /= np.where(deviation > 0, deviation, 1.0)[:, None]
    return centred, deviation


def shared_columns(covariates: np.ndarray | None, rows: int) -> np.ndarray:
    """Design columns that all predictors share, ``[N, Q + 1]``: the intercept and the covariates.

    Covariates are centred and scaled here. That changes neither ``b1`` nor Newton's path (the method is affine
    invariant), but ages in years and incomes in cents then meet the tolerances on equal terms.
    """
    ones = np.ones((rows, 1))
    if covariates is None:
        return ones
    scaled, _ = standardised(np.ascontiguousarray(covariates.T))
    return np.concatenate([ones, scaled.T], axis=1)


def newton(z: np.ndarray, y: np.ndarray, shared: np.ndarray, max_iter: int, tol: float) -> BatchFit:
    """Fit one logistic regression per row of ``z`` by Newton's method from 0, rows that finish leaving the batch.

    Args:
        z: predictors ``[B, n]``.
        y: outcome ``[n]`` of zeros and ones.
        shared: intercept and covariates ``[n, S]``.
        max_iter: iterations before a fit counts as not converged.
        tol: a fit ends when its largest absolute step is below this.

    Returns:
        ``[B]`` coefficients and standard errors of ``z``; NaN for singular information (also: a constant predictor),
        perfect separation (a linear predictor beyond +-30) and no convergence.
    """
    batch, size = z.shape[0], shared.shape[1]
    fit = BatchFit(np.full(batch, np.nan), np.full(batch, np.nan))
    upper = np.triu_indices(size)
    products = shared[:, upper[0]] * shared[:, upper[1]]
    active = np.arange(batch)
    theta = np.zeros((batch, size + 1))
    information = np.empty((batch, size + 1, size + 1))
    for _ in range(max_iter):
        eta = theta[:, size:] * z
        eta += theta[:, :size] @ shared.T
        np.negative(eta, out=eta)
        with np.errstate(over="ignore"):
            probability = np.exp(eta, out=eta)
        probability += 1.0
        np.reciprocal(probability, out=probability)
        residual = y - probability
        gradient = np.concatenate([residual @ shared, np.vecdot(residual, z)[:, None]], axis=1)
        weight = np.multiply(probability, probability, out=residual)
        np.subtract(probability, weight, out=weight)
        information = information[: len(active)]
        information[:, upper[0], upper[1]] = information[:, upper[1], upper[0]] = weight @ products
        weight *= z
        information[:, :size, size] = information[:, size, :size] = weight @ shared
        information[:, size, size] = np.vecdot(weight, z)

        factor, failure = torch.linalg.cholesky_ex(torch.from_numpy(information))
        pivots = torch.diagonal(factor, dim1=1, dim2=2).numpy() ** 2
        diagonal = np.diagonal(information, axis1=1, axis2=2)
        regular = (failure.numpy() == 0) & np.isfinite(pivots).all(1) & (pivots > SINGULAR * diagonal).all(1)
        step = torch.cholesky_solve(torch.from_numpy(gradient).unsqueeze(2), factor).squeeze(2).numpy()
        theta += np.where(regular[:, None], step, 0.0)
        done = regular & (np.abs(step).max(axis=1) < tol)
        if done.any():
            predictor = theta[done, size:] * z[done] + theta[done, :size] @ shared.T
            inside = np.abs(predictor).max(axis=1) <= SEPARATION
            variance = torch.cholesky_inverse(factor[torch.from_numpy(done)])[:, size, size].numpy()
            fit.beta[active[done]] = np.where(inside, theta[done, size], np.nan)
            fit.se[active[done]] = np.where(inside, np.sqrt(variance), np.nan)
        going = regular & ~done
        if not going.any():
            break
        if not going.all():
            active, theta, z = active[going], theta[going], z[going]
    return fit


def logistic_association(
    x: Real[Array, " N"],
    y: Real[Array, " N"],
    covariates: Real[Array, "N Q"] | None = None,
    max_iter: int = 50,
    tol: float = 1e-10,
) -> LogisticResult:
    """Logistic regression of an outcome on one predictor, by unpenalised maximum likelihood.

    ``logit P(y = 1) = b0 + b1 x + gamma^T covariates``; the result is about ``b1``, for one unit of ``x`` as given.

    Args:
        x: predictor ``[N]``.
        y: outcome ``[N]`` in {0, 1, NaN}; rows with NaN are dropped.
        covariates: ``[N, Q]``, finite; ``None`` for none.
        max_iter: Newton iterations before the fit counts as not converged.
        tol: Newton stops when the largest absolute step is below this (in standard deviations of ``x``).

    Returns:
        The coefficient with its Wald statistics; NaN and ``converged=False`` for a constant ``x``, one class only,
        perfect separation (a linear predictor beyond +-30), singular information or no convergence.

    Raises:
        ValueError: lengths differ, ``y`` outside {0, 1, NaN}, or a NaN in ``x`` or ``covariates``.

    Source:
        arXiv 2508.01521 as its card reads it, step 4.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import logistic_association
        >>> x = np.array([0, 0, 0, 0, 1, 1, 1, 1.0])
        >>> y = np.array([0, 0, 0, 1, 0, 1, 1, 1.0])
        >>> round(logistic_association(x, y).odds_ratio, 6)  # (3 * 3) / (1 * 1) of the 2x2 table
        9.0
    """
    predictor = float_matrix(float_array(x, "x").reshape(1, -1), "x", "1 N")
    outcome = float_array(y, "y")
    if outcome.shape != (predictor.shape[1],):
        raise ValueError(f"y: found shape {list(outcome.shape)}, needed [{predictor.shape[1]}], as many as x")
    check_binary(outcome, "y")
    kept = ~np.isnan(outcome)
    table = None
    if covariates is not None:
        table = float_matrix(covariates, "covariates", "N Q")
        if len(table) != len(outcome):
            raise ValueError(f"covariates: found {len(table)} rows, needed {len(outcome)}, as many as x")
        table = table[kept]
    outcome, predictor = outcome[kept], predictor[:, kept]
    beta = se = np.full(1, np.nan)
    if 0 < outcome.sum() < len(outcome):
        scaled, deviation = standardised(predictor)
        if deviation[0] > 0:
            beta, se = newton(scaled, outcome, shared_columns(table, len(outcome)), max_iter, tol)
            beta, se = beta / deviation, se / deviation
    values = {name: float(value[0]) for name, value in wald(beta, se).items()}
    return LogisticResult(beta=float(beta[0]), se=float(se[0]), converged=bool(np.isfinite(beta[0])), **values)
