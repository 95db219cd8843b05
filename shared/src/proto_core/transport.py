"""Entropic optimal transport in the log domain: plan and potentials by Sinkhorn's iteration.

Plain updates of the potentials cost an exponential per entry and iteration. Here they are done once per round; between
them the kernel is kept and rescaled by matrix-vector products (stabilised scaling), as long as the scalings stay in
range. The result is that of the log domain.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from proto_core.checks import check_positive, readable
from proto_core.precision import full_precision

__all__ = ["check_weights", "sinkhorn_plan", "symmetric_potential"]

RESCALINGS = 20
"""Iterations by rescaling between two in the log domain."""


@torch.no_grad()
def sinkhorn_plan(
    cost: Float[Tensor, "N M"],
    a: Float[Tensor, "N"] | None = None,
    b: Float[Tensor, "M"] | None = None,
    epsilon: float = 0.05,
    max_iter: int = 1000,
    tol: float = 1e-9,
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N"], Float[Tensor, "M"]]:
    """``argmin <P, C> + epsilon KL(P | a b^T)`` over plans with marginals a and b.

    The plan is ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)`` with
    ``f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)``, g alike; ``<a, f> + <b, g>`` is the minimum at
    convergence. Nothing is differentiated: at the optimum the plan alone gives the gradient by the cost.

    Args:
        cost: C.
        a: weights of the rows, positive, of sum 1; ``None``: uniform.
        b: weights of the columns; ``None``: uniform.
        epsilon: strength of the entropy, in units of the cost.
        max_iter: iterations at most.
        tol: stop when the plan's marginals miss theirs by no more, in sum.

    Returns:
        Plan, f, g; the plan's column marginal is exact.

    Raises:
        ValueError: shapes that do not fit, nothing to transport, weights that are not positive or whose sum is not 1,
            epsilon or max_iter not positive, a cost that is not finite.

    Example:
        >>> import torch
        >>> from proto_core.transport import sinkhorn_plan
        >>> sinkhorn_plan(1 - torch.eye(2), epsilon=0.05)[0].round(decimals=4)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    check_positive(epsilon=epsilon, max_iter=max_iter)
    if cost.ndim != 2 or 0 in cost.shape:
        raise ValueError(f"cost: found shape {tuple(cost.shape)}, needed [N, M] with entries")
    cost = full_precision(cost.detach())
    if readable(cost) and not bool(cost.isfinite().all()):
        raise ValueError("cost: found NaN or infinite entries, needed numbers")
    a = check_weights("a", a, cost.shape[0], cost)
    b = check_weights("b", b, cost.shape[1], cost)
    log_a, log_b, minus = a.log(), b.log(), -cost / epsilon
    # in units of epsilon, and with the logarithms of the weights inside: exp(u + v + minus) is the plan
    v = log_b.clone()
    u = log_a - (v + minus).logsumexp(dim=1)
    done = 0
    while True:
        v = log_b - (u.unsqueeze(1) + minus).logsumexp(dim=0)
        done += 1
        plan = (u.unsqueeze(1) + v + minus).exp()
        if done >= max_iter or bool((plan.sum(dim=1) - a).abs().sum() <= tol):
            return plan, epsilon * (u - log_a), epsilon * (v - log_b)
        steps = min(RESCALINGS, max_iter - done)
        rows, columns = torch.ones_like(a), torch.ones_like(b)
        for _ in range(steps):
            rows = a / (plan @ columns)
            columns = b / (plan.T @ rows)
        scales = torch.cat([rows, columns]).log()
        if bool(scales.isfinite().all()):
            done += steps
            u, v = u + scales[: len(a)], v + scales[len(a) :]
        u = log_a - (v + minus).logsumexp(dim=1)


@torch.no_grad()
def symmetric_potential(
    cost: Float[Tensor, "N N"],
    a: Float[Tensor, "N"],
    epsilon: float,
    max_iter: int = 1000,
    tol: float = 1e-9,
) -> Float[Tensor, "N"]:
    """Potential f of the transport of a set onto itself, where f = g; by the averaged iteration, which is fast here.

    Args:
        cost: symmetric cost.
        a: weights.
        epsilon: strength of the entropy.
        max_iter: iterations at most.
        tol: stop when the plan's marginal misses a by no more, in sum.

    Example:
        >>> import torch
        >>> from proto_core.transport import symmetric_potential
        >>> symmetric_potential(1 - torch.eye(2), torch.full((2,), 0.5), 0.05).round(decimals=4)
        tensor([0.0173, 0.0173])
    """
    log_a, minus = a.log(), -cost / epsilon
    u = torch.zeros_like(a)
    for _ in range(max_iter):
        new = -(log_a + u + minus).logsumexp(dim=1)
        # the marginal of the plan that u gives is a exp(u - new)
        missed = (a * ((u - new).exp() - 1)).abs().sum()
        u = (u + new) / 2
        if bool(missed <= tol):
            break
    return epsilon * u


def check_weights(name: str, weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    """Weights in the precision of ``like``; uniform where there are none.

    Raises:
        ValueError: another number, an entry that is not positive, a sum other than 1.
    """
    if weights is None:
        return like.new_full((count,), 1 / count)
    if tuple(weights.shape) != (count,):
        raise ValueError(f"{name}: found shape {tuple(weights.shape)}, needed ({count},)")
    weights = weights.detach().to(like)
    if readable(weights):
        if not bool((weights > 0).all()):
            raise ValueError(f"{name}: found {float(weights.min())}, needed positive weights")
        if abs(float(weights.sum()) - 1) > 1e-4:
            raise ValueError(f"{name}: found a sum of {float(weights.sum())}, needed 1")
    return weights
