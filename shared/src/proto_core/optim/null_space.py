"""Learn a new task without moving what earlier tasks' inputs see: projection of updates onto a null space.

NSGP-RePRE (ICML 2025, arXiv 2502.05540): covariances of each layer's inputs on earlier tasks are summed up; updates of
its weight are projected onto the directions whose singular values lie beyond the sharpest bend of the spectrum. As in
the authors' code the inputs of one call are averaged over the batch before their covariance (call with single samples
to avoid that), and ``normalize`` divides the projector by its Frobenius norm. Unlike there, parameters without gradient
are left out and covariances of several tasks add up in one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.precision import full_precision, no_autocast
from proto_core.systems import Paper

__all__ = [
    "NullSpaceProjection",
    "NullSpaceSGD",
    "input_covariance",
    "null_space_mask",
    "null_space_projector",
]

SMOOTHED_FROM = 128
"""Spectra of so many values and more are smoothed before the bend is looked for."""


@torch.no_grad()
def input_covariance(module: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "d d"]:
    """``sum r r^T`` over the inputs of a layer, after the mean over the batch.

    Args:
        module: ``nn.Linear`` or ``nn.Conv2d``.
        x: its input, ``[..., D]`` or ``[N, C, H, W]``.

    Returns:
        For a linear layer ``m m^T`` of the mean row m; for a convolution the sum over output places of ``r r^T``, r the
        patch of the mean image, in the order of ``weight.flatten(1)``.

    Raises:
        ValueError: another kind of layer, a grouped convolution, input that does not fit, an empty input.

    Source:
        NSGP-RePRE (arXiv 2502.05540), null space gradient projection.

    Example:
        >>> import torch
        >>> from proto_core.optim import input_covariance
        >>> input_covariance(torch.nn.Linear(2, 3), torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        tensor([[4., 2.],
                [2., 1.]])
    """
    if x.numel() == 0:
        raise ValueError(f"x: found shape {tuple(x.shape)}, needed one sample at least")
    x = full_precision(x.detach())
    with no_autocast(x):
        if isinstance(module, nn.Linear):
            if x.shape[-1] != module.in_features:
                raise ValueError(f"x: found shape {tuple(x.shape)}, needed [..., {module.in_features}]")
            mean = x.reshape(-1, x.shape[-1]).mean(dim=0)
            return mean.outer(mean)
        if isinstance(module, nn.Conv2d):
            if module.groups != 1:
                raise ValueError(f"module: found a convolution of {module.groups} groups, needed 1")
            if x.ndim != 4 or x.shape[1] != module.in_channels:
                raise ValueError(f"x: found shape {tuple(x.shape)}, needed [N, {module.in_channels}, H, W]")
            image, padding = x.mean(dim=0, keepdim=True), module.padding
            if module.padding_mode != "zeros" or isinstance(padding, str):
                mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
                image, padding = F.pad(image, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
            options: dict[str, Any] = {"dilation": module.dilation, "stride": module.stride, "padding": padding}
            patches = F.unfold(image, module.kernel_size, **options)[0]
            return patches @ patches.T
    raise ValueError(f"module: found {type(module).__name__}, needed Linear or Conv2d")


def null_space_mask(singular_values: Float[Tensor, "d"], offset: float = 0.0) -> Bool[Tensor, "d"]:
    """Which directions are kept: those from the sharpest bend of the spectrum on.

    The bend is where the second difference is largest; from 128 values on of the spectrum after a Gaussian filter
    (sigma 10), without 1.5 % of it at each end. All of fewer than 3 values are kept.

    Args:
        singular_values: falling.
        offset: moves the first kept index i by ``int(offset * i)`` if in [-1, 1], else by ``int(offset)``.

    Raises:
        ValueError: no vector, NaN, values that rise.

    Source:
        NSGP-RePRE (arXiv 2502.05540), authors' code.

    Example:
        >>> import torch
        >>> from proto_core.optim import null_space_mask
        >>> null_space_mask(torch.tensor([9.0, 8.0, 0.2, 0.1, 0.0])).tolist()
        [False, False, True, True, True]
    """
    if singular_values.ndim != 1:
        raise ValueError(f"singular_values: found shape {tuple(singular_values.shape)}, needed [d]")
    values = singular_values.detach().double().cpu().numpy()
    if (values != values).any():
        raise ValueError("singular_values: found NaN, needed numbers")
    count = len(values)
    if (values[1:] > values[:-1]).any():
        raise ValueError("singular_values: found values that rise, needed falling ones")
    if count < 3:
        return torch.ones(count, dtype=torch.bool, device=singular_values.device)
    smooth = gaussian_filter1d(values, 10.0, mode="reflect", truncate=4.0) if count >= SMOOTHED_FROM else values
    slope = smooth[:-1] - smooth[1:]
    bend = slope[:-1] - slope[1:]
    if count >= SMOOTHED_FROM:
        drop = int(0.03 * count / 2)
        bend = bend[drop : len(bend) - drop]
    level = values[int(bend.argmax()) + (count - len(bend)) // 2]
    first = int((values >= level).nonzero()[0][-1])
    first += int(offset * first) if -1 <= offset <= 1 else int(offset)
    first = min(max(first, 0), count - 1)
    return torch.arange(count, device=singular_values.device) >= first


@torch.no_grad()
def null_space_projector(
    cov: Float[Tensor, "d d"], offset: float = 0.0, normalize: bool = False
) -> Float[Tensor, "d d"]:
    """``V V^T`` of the kept directions of a covariance; with ``normalize`` divided by its Frobenius norm.

    Args:
        cov: symmetric, of :func:`input_covariance`.
        offset: see :func:`null_space_mask`.
        normalize: a change of the step size by ``1 / sqrt(rank)``, which the authors make in the backbone.

    Raises:
        ValueError: no square matrix, NaN.

    Example:
        >>> import torch
        >>> from proto_core.optim import null_space_projector
        >>> null_space_projector(torch.diag(torch.tensor([9.0, 8.0, 0.2, 0.1, 0.0]))).diag().round()
        tensor([0., 0., 1., 1., 1.])
    """
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or len(cov) == 0:
        raise ValueError(f"cov: found shape {tuple(cov.shape)}, needed [d, d]")
    if bool(cov.isnan().any()):
        raise ValueError(f"cov: found {int(cov.isnan().sum())} NaN, needed numbers")
    cov = full_precision(cov)
    size = cov.diagonal().sum()
    _, values, right = torch.linalg.svd(cov / torch.where(size > 0, size, 1))
    kept = right[null_space_mask(values, offset)]
    projector = kept.T @ kept
    return projector / projector.norm() if normalize else projector


class NullSpaceProjection:
    """Covariances of the inputs of chosen layers over tasks, and the projectors that follow from them.

    At the end of each task, in evaluation mode: ``with projection.collect(model, names): model(x)`` for every batch,
    then ``projection.fit()``. Covariances of several tasks add up. The first task has no projectors.

    Args:
        offset: see :func:`null_space_mask`.
        normalize: for all layers, or ``name -> bool`` of the weight's name.

    Attributes:
        covariances: ``"<module>.weight" -> [d, d]``.
        projectors: the same of :meth:`fit`.

    Example:
        >>> import torch
        >>> from proto_core.optim import NullSpaceProjection
        >>> net, projection = torch.nn.Sequential(torch.nn.Linear(4, 2)), NullSpaceProjection()
        >>> with projection.collect(net, ["0"]):
        ...     for x in torch.eye(4)[:2]:
        ...         _ = net(x)
        >>> projection.fit()
        >>> projection.project("0.weight", torch.ones(2, 4))[0, :2].abs().round()  # what was seen stays
        tensor([0., 0.])
    """

    paper: ClassVar[Paper] = Paper(
        title="Demystifying Catastrophic Forgetting in Two-Stage Incremental Object Detector",
        year=2025,
        arxiv="2502.05540",
        code="fanrena/NSGP-RePRE@279d39a",
        evidence="code",
        summary="updates projected onto the null space of earlier tasks' inputs",
        claim="with the projection an earlier task is forgotten less than half as much",
    )

    def __init__(self, offset: float = 0.0, normalize: bool | Callable[[str], bool] = False) -> None:
        self.offset = offset
        self.normalize = normalize
        self.covariances: dict[str, Tensor] = {}
        self.projectors: dict[str, Tensor] = {}

    @contextmanager
    def collect(self, model: nn.Module, module_names: Iterable[str]) -> Iterator[NullSpaceProjection]:
        """Add the inputs that pass the named layers inside the block.

        Raises:
            ValueError: a name that the model lacks, or of another layer than Linear and Conv2d.
        """
        modules, names = dict(model.named_modules()), list(module_names)
        for name in names:
            if not isinstance(modules.get(name), nn.Linear | nn.Conv2d):
                found = type(modules[name]).__name__ if name in modules else "no such module"
                raise ValueError(f"module_names: found {name!r} ({found}), needed names of Linear or Conv2d modules")

        def watch(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found = input_covariance(module, inputs[0])
                self.covariances[key] = self.covariances[key] + found if key in self.covariances else found

            return add

        hooks = [
            modules[name].register_forward_pre_hook(watch(f"{name}.weight" if name else "weight")) for name in names
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def fit(self) -> None:
        """Projectors of all covariances.

        Raises:
            ValueError: NaN in a covariance.
        """
        for name, cov in self.covariances.items():
            normalize = self.normalize(name) if callable(self.normalize) else self.normalize
            try:
                self.projectors[name] = null_space_projector(cov, self.offset, normalize)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    @torch.no_grad()
    def project(self, name: str, update: Tensor) -> Tensor:
        """The update of a weight within the null space; as it is where the name has no projector.

        Raises:
            ValueError: an update of another width.
        """
        if name not in self.projectors:
            return update
        projector = self.projectors[name].to(update.device)
        rows = update.flatten(1) if update.ndim > 1 else update.unsqueeze(0)
        if rows.shape[1] != len(projector):
            raise ValueError(f"{name}: found an update of width {rows.shape[1]}, needed {len(projector)}")
        with no_autocast(rows):
            return (rows.to(projector) @ projector).to(update).reshape(update.shape)

    def state_dict(self) -> dict[str, Any]:
        """Covariances and projectors."""
        return {"covariances": dict(self.covariances), "projectors": dict(self.projectors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.covariances = dict(state_dict["covariances"])
        self.projectors = dict(state_dict["projectors"])


class NullSpaceSGD(torch.optim.Optimizer):
    """SGD whose updates are projected; momentum is kept of the unprojected gradients.

    ``d = grad + wd w``; buffer ``b = d`` at first, then ``m b + (1 - dampening) d``; ``update = -lr (d + m b)`` with
    Nesterov, else ``-lr b``; the update (weight decay in it) is projected.

    Args:
        named_parameters: ``(name, parameter)`` pairs, as of ``model.named_parameters()``.
        lr: learning rate.
        momentum: m.
        dampening: of the momentum.
        weight_decay: wd.
        nesterov: Nesterov's form.
        projection: ``None`` is plain SGD.

    Raises:
        ValueError: no parameter, negative settings, Nesterov without momentum or with dampening.

    Source:
        NSGP-RePRE (arXiv 2502.05540).

    Example:
        >>> import torch
        >>> from proto_core.optim import NullSpaceProjection, NullSpaceSGD
        >>> net = torch.nn.Linear(4, 2)
        >>> optimizer = NullSpaceSGD(net.named_parameters(), lr=0.1, projection=NullSpaceProjection())
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        projection: NullSpaceProjection | None = None,
    ) -> None:
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name}: found {value}, needed at least 0")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov: found momentum {momentum} and dampening {dampening}, needed a momentum alone")
        pairs = [(name, p) for name, p in named_parameters]
        if not pairs:
            raise ValueError("named_parameters: found none, needed one at least")
        self.names = {p: name for name, p in pairs}
        self.projection = projection
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__([p for _, p in pairs], {**defaults, "weight_decay": weight_decay, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; parameters without a gradient are left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad.clone()
                if group["momentum"]:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = d.clone()
                    else:
                        state["momentum_buffer"].mul_(group["momentum"]).add_(d, alpha=1 - group["dampening"])
                    buffer = state["momentum_buffer"]
                    d = d.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
                update = d * -group["lr"]
                if self.projection is not None and p in self.names:
                    update = self.projection.project(self.names[p], update)
                p.add_(update)
        return loss
