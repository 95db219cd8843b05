"""Keep a network's average output from moving with its weights: gradient-norm regularisation with a multiplier.

IGNITE (NeurIPS 2024, arXiv 2503.04242): minimise the loss subject to ``rho |grad_w G(w)| <= epsilon``, G the mean
prediction over the batch, by a Lagrangian: descent in the weights, ascent in the multiplier. Unlike in the authors'
code the multiplier never falls below 0 (where it would reward sharpness), a zero gradient of G adds nothing instead of
NaN, and weights come back from a copy, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from proto_core.checks import check_positive
from proto_core.distributed import all_reduce_sum, is_distributed
from proto_core.optim.sharpness import buffers_at_rest, restore
from proto_core.systems import Paper

__all__ = ["GradientNormRegularizer"]


class GradientNormRegularizer:
    """Adds ``lam (rho / r) (grad G(w + r h / |h|) - h)`` to the gradients, ``h = grad G(w)``, and moves lam.

    This is the gradient of ``lam rho |grad G|`` by a finite difference, without a second-order graph; two more forward
    and backward passes a step. Afterwards ``lam <- lam + eta (rho |h| - epsilon)``. Gradients are unscaled (AMP) before
    and clipped after it. Both passes see the same random numbers (dropout) and leave buffers (batch norm) alone; on
    several processes h is the mean over them.

    Args:
        model: its trainable parameters are regularised.
        rho: radius of the constraint.
        r: step of the finite difference.
        lam: multiplier at the start.
        eta: step of the multiplier.
        epsilon: how much the mean output may change.
        constrained: ``False``: lam stays as it is (IGNITE-2).
        clamp_lambda: keep lam at least 0.

    Attributes:
        lam: the multiplier, a float or a scalar tensor.

    Raises:
        ValueError: rho or r not positive, a negative lam, eta or epsilon.

    Source:
        IGNITE (arXiv 2503.04242).

    Example:
        >>> import torch
        >>> from proto_core.optim import GradientNormRegularizer
        >>> model, x = torch.nn.Linear(2, 1), torch.randn(8, 2)
        >>> regularizer = GradientNormRegularizer(model, lam=0.5)
        >>> model(x).square().mean().backward()
        >>> sorted(regularizer.apply(lambda: model(x).mean()))  # before optimizer.step()
        ['grad_norm', 'lam']
    """

    paper: ClassVar[Paper] = Paper(
        title="Incorporating Surrogate Gradient Norm to Improve Offline Optimization Techniques",
        year=2024,
        arxiv="2503.04242",
        code="cuong-dm/IGNITE@c702614",
        evidence="code",
        summary="gradient-norm regularisation with a multiplier, and offline optimisation by a surrogate",
        claim="a surrogate whose mean moves less with its weights leads ascent to better designs",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.05,
        r: float = 0.05,
        lam: float = 1e-3,
        eta: float = 1e-3,
        epsilon: float = 0.1,
        constrained: bool = True,
        clamp_lambda: bool = True,
    ) -> None:
        check_positive(rho=rho, r=r)
        for name, value in {"lam": lam, "eta": eta, "epsilon": epsilon}.items():
            if not value >= 0:
                raise ValueError(f"{name}: found {value}, needed at least 0")
        self.model = model
        self.rho = rho
        self.r = r
        self.eta = eta
        self.epsilon = epsilon
        self.constrained = constrained
        self.clamp_lambda = clamp_lambda
        self.lam: float | Tensor = lam

    def __repr__(self) -> str:
        """Settings."""
        names = ("rho", "r", "lam", "eta", "epsilon", "constrained", "clamp_lambda")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def apply(self, mean_fn: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Add the regulariser's gradient to ``.grad`` and move lam; after ``backward()``, before the optimiser's step.

        Args:
            mean_fn: gives G, a scalar, from the weights as they are when it is called.

        Returns:
            ``grad_norm``, the norm of h, and ``lam`` after the step; scalar tensors.

        Raises:
            ValueError: a G that is no scalar or depends on no parameter.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        found = self._gradients(mean_fn, parameters)
        moving = [(p, h) for p, h in zip(parameters, found) if h is not None]
        if not moving:
            raise ValueError("mean_fn: found a result that depends on no trainable parameter of the model")
        weights, h = [p for p, _ in moving], [h for _, h in moving]
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(h)).norm()
            scale = torch.where(norm > 0, self.r / norm, 0)
            kept = [(p, p.detach().clone()) for p in weights]
            for p, step in zip(weights, h):
                p.add_(step * scale.to(p))
        try:
            beyond = self._gradients(mean_fn, weights)
        finally:
            restore(kept)
        with torch.no_grad():
            factor = torch.where(norm > 0, self.lam * (self.rho / self.r), 0).to(norm)
            for p, near, far in zip(weights, h, beyond):
                change = factor * ((torch.zeros_like(near) if far is None else far) - near)
                p.grad = change if p.grad is None else p.grad + change
            if self.constrained:
                lam = self.lam + self.eta * (self.rho * norm - self.epsilon)
                self.lam = lam.clamp_min(0) if self.clamp_lambda else lam
        return {"grad_norm": norm, "lam": torch.as_tensor(self.lam, dtype=norm.dtype, device=norm.device)}

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return {"lam": torch.as_tensor(self.lam).detach().clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the multiplier."""
        self.lam = torch.as_tensor(state_dict["lam"]).detach().clone().to(next(self.model.parameters()).device)

    def _gradients(self, mean_fn: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor | None]:
        devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
        with buffers_at_rest(self.model), torch.random.fork_rng(devices), torch.enable_grad():
            mean = mean_fn()
            if mean.numel() != 1:
                raise ValueError(f"mean_fn: found a result of shape {tuple(mean.shape)}, needed a scalar")
            if not mean.requires_grad:
                raise ValueError("mean_fn: found a result without a gradient; is it computed under no_grad?")
            found = torch.autograd.grad(mean.sum(), parameters, allow_unused=True)
        if not is_distributed():
            return list(found)
        return [None if g is None else all_reduce_sum(g) / dist.get_world_size() for g in found]
