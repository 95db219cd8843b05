"""Sharpness-aware minimisation (SAM, arXiv 2010.01412), the baseline of SAF, and three measures of sharpness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from proto_core.checks import check_positive

__all__ = ["SAM", "hessian_top_eigenvalue", "hessian_trace", "sharpness"]


class SAM(torch.optim.Optimizer):
    """Step with the gradient at the worst point of a small ball: ``w + rho g / |g|``.

    The norm is over all parameters together; ``adaptive`` scales the ball by the weights:
    ``e = rho w^2 g / | |w| g |``. Weights are restored from a copy, exactly. Two forward and backward passes a step:
    ``loss.backward(); first_step(); loss_again.backward(); second_step()``, or ``step(closure)`` where the closure
    zeroes nothing and returns the loss after its backward pass. Let batch norm's running statistics rest in the second
    pass.

    Args:
        params: parameters or groups.
        base_optimizer: class of the optimiser that takes the step.
        rho: radius.
        adaptive: scale-invariant radius.
        base_kwargs: settings of the base optimiser.

    Raises:
        ValueError: a negative rho.

    Example:
        >>> import torch
        >>> from proto_core.optim import SAM
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> def closure():
        ...     loss = (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> w.data  # the gradient at 1.5 is 3
        tensor([0.7000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer],
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if not rho >= 0:
            raise ValueError(f"rho: found {rho}, needed at least 0")
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **base_kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)
        self._resting: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Move to the worst point, by the gradients that there are.

        Raises:
            RuntimeError: twice without a second step between.
        """
        if self._resting:
            raise RuntimeError("SAM.first_step: the weights are at the worst point already, second_step comes next")
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moving:
            return
        self._resting = ascend([(p, p.grad, group["rho"], group["adaptive"]) for p, group in moving])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = True) -> None:
        """Back to the weights, then the base optimiser's step with the gradients from the worst point."""
        restore(self._resting)
        self._resting = []
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Both steps; the closure is called twice.

        Raises:
            ValueError: without a closure.
        """
        if closure is None:
            raise ValueError("closure: found None, needed one that computes the loss and its gradients")
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimiser."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the base optimiser, whose groups are these."""
        self.base_optimizer.load_state_dict(state_dict)
        self.param_groups = self.base_optimizer.param_groups


@torch.no_grad()
def ascend(moving: Sequence[tuple[Tensor, Tensor, float, bool]]) -> list[tuple[Tensor, Tensor]]:
    """Move to the worst point of the ball; the norm is over all tensors together.

    Args:
        moving: tensor, its gradient, radius, and whether the radius scales with the tensor.

    Returns:
        Each tensor with a copy of what it was, for :func:`restore`.
    """
    norm = torch.stack(torch._foreach_norm([(p.abs() if adaptive else 1) * g for p, g, _, adaptive in moving])).norm()
    kept = [(p, p.detach().clone()) for p, *_ in moving]
    for p, g, rho, adaptive in moving:
        p.add_((p.square() if adaptive else 1) * g * (rho / (norm + 1e-12)))
    return kept


@torch.no_grad()
def restore(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Bring tensors back to their copies, bit by bit."""
    for tensor, old in kept:
        tensor.copy_(old)


@contextmanager
def buffers_at_rest(module: nn.Module) -> Iterator[None]:
    """Passes in here leave no trace in the buffers (running statistics of batch norm)."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        restore(kept)


def sharpness(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple[Any, ...], rho: float = 0.05) -> float:
    """``L(w + rho g / |g|) - L(w)`` on one batch; weights, gradients and mode are left as they were.

    Args:
        model: network.
        loss_fn: ``(model(inputs), *rest of the batch) -> loss``.
        batch: inputs first.
        rho: radius.

    Raises:
        ValueError: rho not positive.

    Example:
        >>> import torch
        >>> from proto_core.optim import sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> round(sharpness(model, lambda out: (out**2).sum(), (torch.ones(1, 1),), rho=0.5), 4)
        1.25
    """
    check_positive(rho=rho)
    inputs, *rest = batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad(), buffers_at_rest(model):
        before = loss_fn(model(inputs), *rest)
        gradients = torch.autograd.grad(before, parameters, allow_unused=True)
        kept = ascend([(p, g, rho, False) for p, g in zip(parameters, gradients) if g is not None])
        try:
            with torch.no_grad():
                after = loss_fn(model(inputs), *rest)
        finally:
            restore(kept)
    return float(after - before)


def hessian_top_eigenvalue(
    loss_closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    iters: int = 100,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> float:
    """Eigenvalue of the loss's Hessian that is largest in size, by power iteration.

    Args:
        loss_closure: gives the scalar loss.
        params: variables.
        iters: products with the Hessian at most.
        tol: stop at a relative change of the Rayleigh quotient below it.
        generator: source of the start, N(0, 1).

    Raises:
        ValueError: iters not positive, no parameter.

    Example:
        >>> import torch
        >>> from proto_core.optim import hessian_top_eigenvalue
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> round(hessian_top_eigenvalue(lambda: w[0] ** 2 + 5 * w[1] ** 2, [w]), 3)
        10.0
    """
    check_positive(iters=iters)
    times = _hessian(loss_closure, params)
    vector = [_normal(p, generator) for p in params]
    found = 0.0
    for _ in range(iters):
        length = torch.stack([v.norm() for v in vector]).norm()
        if not bool(length > 0):
            return 0.0
        vector = [v / length for v in vector]
        product = times(vector)
        quotient = float(sum((v * hv).sum() for v, hv in zip(vector, product)))
        if abs(quotient - found) <= tol * abs(quotient):
            return quotient
        found, vector = quotient, product
    return found


def hessian_trace(
    loss_closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    samples: int = 50,
    generator: torch.Generator | None = None,
) -> float:
    """Trace of the loss's Hessian by Hutchinson's estimate with random signs.

    Args:
        loss_closure: gives the scalar loss.
        params: variables.
        samples: random vectors.
        generator: their source.

    Raises:
        ValueError: samples not positive, no parameter.

    Example:
        >>> import torch
        >>> from proto_core.optim import hessian_trace
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> hessian_trace(lambda: w[0] ** 2 + 5 * w[1] ** 2, [w], samples=1)
        12.0
    """
    check_positive(samples=samples)
    times = _hessian(loss_closure, params)
    total = 0.0
    for _ in range(samples):
        signs = [_normal(p, generator).sign() for p in params]
        total += float(sum((s * hs).sum() for s, hs in zip(signs, times(signs))))
    return total / samples


def _hessian(loss_closure: Callable[[], Tensor], params: Sequence[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Products with the Hessian, from one graph of the gradient."""
    params = list(params)
    if not params:
        raise ValueError("params: found none, needed at least one")
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss_closure(), params, create_graph=True, allow_unused=True)
    used = [g if g is not None else torch.zeros_like(p) for g, p in zip(gradients, params)]

    def times(vector: list[Tensor]) -> list[Tensor]:
        product = sum((g * v).sum() for g, v in zip(used, vector))
        if not isinstance(product, Tensor) or not product.requires_grad:  # a linear loss
            return [torch.zeros_like(p) for p in params]
        found = torch.autograd.grad(product, params, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if f is None else f for f, p in zip(found, params)]

    return times


def _normal(p: Tensor, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else p.device
    return torch.randn(p.shape, generator=generator, dtype=p.dtype, device=source).to(p.device)
