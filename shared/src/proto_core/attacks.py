"""Adversaries: inputs near a given one that change a network's margins most."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_option, check_positive

__all__ = ["comp_sum_adversary"]


def comp_sum_adversary(
    model: nn.Module,
    x: Float[Tensor, "N *shape"],
    targets: Int[Tensor, "N"],
    *,
    gamma: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    clamp: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N *shape"]:
    """Projected gradient ascent on ``|D(x') - D(x)|_2``, D the margins of the target (arXiv 2304.07288, section 5).

    It starts from a random point of the ball, since at x the objective has no gradient. The network is in evaluation
    mode meanwhile; its mode and its gradients are left as they were.

    Args:
        model: ``[N, ...] -> logits [N, C]``.
        x: inputs.
        targets: classes.
        gamma: radius of the ball around x.
        steps: ascent steps.
        step_size: of one; ``None``: ``2.5 gamma / steps``.
        norm: ``"linf"`` (signs of the gradient) or ``"l2"`` (gradient of norm 1).
        clamp: range of inputs; ``None``: none.
        generator: source of the start.

    Returns:
        Inputs within the ball and the range, detached.

    Raises:
        ValueError: gamma, steps or step_size not positive, an unknown norm; targets that are not ``[N]``.

    Example:
        >>> import torch
        >>> from proto_core.attacks import comp_sum_adversary
        >>> x = torch.full((1, 2), 0.5)
        >>> moved = comp_sum_adversary(torch.nn.Linear(2, 2), x, torch.tensor([0]), gamma=0.1)
        >>> (moved - x).abs().max().round(decimals=4)
        tensor(0.1000)
    """
    check_positive(gamma=gamma, steps=steps)
    check_option("norm", norm, "linf", "l2")
    size = 2.5 * gamma / steps if step_size is None else step_size
    check_positive(step_size=size)
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed ({x.shape[0]},)")
    x = x.detach()
    source = generator.device if generator is not None else x.device
    start = torch.rand(x.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
    moved = _into(x, x + gamma * (2 * start - 1), gamma, norm, clamp)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            clean = _margins(model(x), targets)
        for _ in range(steps):
            moved.requires_grad_()
            with torch.enable_grad():
                change = torch.linalg.vector_norm(_margins(model(moved), targets) - clean, dim=1)
                (gradient,) = torch.autograd.grad(change.sum(), moved)
            with torch.no_grad():
                if norm == "linf":
                    direction = gradient.sign()
                else:
                    direction = gradient / _lengths(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
                moved = _into(x, moved + size * direction, gamma, norm, clamp)
    finally:
        for module, training in modes.items():
            module.training = training
    return moved.detach()


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets.unsqueeze(1)) - logits


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def _into(x: Tensor, moved: Tensor, gamma: float, norm: str, clamp: tuple[float, float] | None) -> Tensor:
    """Nearest point of the ball around x, then of the range."""
    change = moved - x
    shrunk = gamma / _lengths(change).clamp_min(gamma)
    inside = change.clamp(-gamma, gamma) if norm == "linf" else change * shrunk
    return x + inside if clamp is None else (x + inside).clamp(*clamp)
