"""Find better designs from recorded ones alone: a surrogate of the score, ascent on it, and tasks to measure it on.

The pipeline of IGNITE (NeurIPS 2024, arXiv 2503.04242): train a surrogate on offline pairs, optionally with
:class:`proto_core.optim.GradientNormRegularizer`, climb its mean from the best recorded designs, score the outcome by
the true function. The analytic tasks stand in for Design-Bench, which needs downloads. Unlike in the authors' code
several surrogates are not reduced to their minimum under the name of a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_option, check_positive, readable
from proto_core.optim.gradient_norm import GradientNormRegularizer
from proto_core.precision import full_precision

__all__ = [
    "GaussianSurrogate",
    "OfflineTask",
    "SurrogateModule",
    "gradient_ascent_search",
    "percentile_scores",
    "top_k_designs",
]


class GaussianSurrogate(nn.Module):
    """Mean and log standard deviation of a score by a network of two hidden layers.

    The second output s is kept between two learned bounds: ``s' = max - softplus(max - s)``,
    ``log_std = min + softplus(s' - min)``.

    Args:
        in_features: D.
        hidden: width of both hidden layers.
        negative_slope: of the LeakyReLU.
        max_std: upper bound of the standard deviation at the start.
        min_std: lower bound at the start.

    Raises:
        ValueError: sizes or bounds that are not positive, ``min_std`` above ``max_std``.

    Source:
        IGNITE (arXiv 2503.04242); the bounds go back to PETS.

    Example:
        >>> import torch
        >>> from proto_core.offline_optimization import GaussianSurrogate
        >>> mean, log_std = GaussianSurrogate(4, hidden=16)(torch.randn(8, 4))
        >>> mean.shape, log_std.shape
        (torch.Size([8, 1]), torch.Size([8, 1]))
    """

    def __init__(
        self,
        in_features: int,
        hidden: int = 2048,
        negative_slope: float = 0.3,
        max_std: float = 0.2,
        min_std: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, hidden=hidden, max_std=max_std, min_std=min_std)
        if min_std > max_std:
            raise ValueError(f"min_std: found {min_std}, needed at most max_std = {max_std}")
        self.negative_slope = negative_slope
        self.bounds = (math.log(min_std), math.log(max_std))
        self.linear0 = nn.Linear(in_features, hidden)
        self.linear1 = nn.Linear(hidden, hidden)
        self.linear2 = nn.Linear(hidden, 2)
        self.max_logstd = nn.Parameter(torch.full((1, 1), self.bounds[1]))
        self.min_logstd = nn.Parameter(torch.full((1, 1), self.bounds[0]))

    def reset_parameters(self) -> None:
        """Draw the weights anew and put the bounds back."""
        for layer in (self.linear0, self.linear1, self.linear2):
            layer.reset_parameters()
        nn.init.constant_(self.min_logstd, self.bounds[0])
        nn.init.constant_(self.max_logstd, self.bounds[1])

    def extra_repr(self) -> str:
        """Settings."""
        low, high = (math.exp(bound) for bound in self.bounds)
        return f"negative_slope={self.negative_slope}, max_std={high:g}, min_std={low:g}"

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
        """Mean and log standard deviation of the score of each design."""
        for layer in (self.linear0, self.linear1):
            x = F.leaky_relu(layer(x), self.negative_slope)
        mean, raw = full_precision(self.linear2(x)).split(1, dim=1)
        capped = self.max_logstd - F.softplus(self.max_logstd - raw)
        return mean, self.min_logstd + F.softplus(capped - self.min_logstd)

    def nll(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N 1"], weights: Tensor | None = None) -> Float[Tensor, ""]:
        """Mean negative log-likelihood; with ``weights`` [N] or [N, 1] the weighted mean, 0 where all are 0.

        Raises:
            ValueError: shapes that do not fit, an empty batch, NaN.
        """
        if x.ndim != 2 or tuple(y.shape) != (len(x), 1) or len(x) == 0:
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"x, y: found shapes {shapes}, needed [N, D] and [N, 1] with N at least 1")
        for name, values in {"x": x, "y": y}.items():
            if readable(values) and bool(values.isnan().any()):
                raise ValueError(f"{name}: found {int(values.isnan().sum())} NaN, needed numbers")
        mean, log_std = self(x)
        loss = 0.5 * ((y - mean) * (-log_std).exp()).square() + log_std + 0.5 * math.log(2 * math.pi)
        if weights is None:
            return loss.mean()
        if weights.numel() != len(x):
            raise ValueError(f"weights: found shape {tuple(weights.shape)}, needed [{len(x)}]")
        weights = weights.reshape(-1, 1).to(loss)
        total = weights.sum()
        return (weights * loss).sum() / torch.where(total == 0, 1, total)


class SurrogateModule(L.LightningModule):
    """Train a surrogate on batches ``(x, y)`` or ``(x, y, weights)`` by Adam, with or without a regulariser.

    Args:
        surrogate: offers ``nll(x, y, weights)`` and returns the mean first.
        regularizer: :class:`proto_core.optim.GradientNormRegularizer` of that surrogate; its multiplier is kept in
            checkpoints.
        lr: learning rate of Adam.
        model_noise_std: standard deviation of noise on the inputs of the likelihood.

    Raises:
        ValueError: lr not positive, a negative standard deviation, the regulariser of another model.

    Example:
        >>> from proto_core.offline_optimization import GaussianSurrogate, SurrogateModule
        >>> from proto_core.optim import GradientNormRegularizer
        >>> surrogate = GaussianSurrogate(4, hidden=16)
        >>> module = SurrogateModule(surrogate, GradientNormRegularizer(surrogate))
    """

    def __init__(
        self,
        surrogate: GaussianSurrogate,
        regularizer: GradientNormRegularizer | None = None,
        *,
        lr: float = 3e-4,
        model_noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(lr=lr)
        if model_noise_std < 0:
            raise ValueError(f"model_noise_std: found {model_noise_std}, needed at least 0")
        if regularizer is not None and regularizer.model is not surrogate:
            raise ValueError("regularizer: found one of another model, needed one of the surrogate")
        self.automatic_optimization = False
        self.surrogate = surrogate
        self.regularizer = regularizer
        self.lr = lr
        self.model_noise_std = model_noise_std

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """Mean score of each design."""
        return self.surrogate(x)[0]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """One step: likelihood, regulariser, optimiser."""
        x, y, *weights = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        noisy = x + self.model_noise_std * torch.randn_like(x) if self.model_noise_std else x
        loss = self.surrogate.nll(noisy, y, *weights)
        self.manual_backward(loss)
        if self.regularizer is not None:
            found = self.regularizer.apply(lambda: self(x).mean())
            self.log_dict({f"train/{name}": value for name, value in found.items()})
        optimizer.step()
        self.log("train/nll", loss.detach(), prog_bar=True)
        return loss.detach()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Likelihood of held-out designs."""
        self.log("val/nll", self.surrogate.nll(*batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.surrogate.parameters(), lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the multiplier."""
        if self.regularizer is not None:
            checkpoint["gradient_norm_regularizer"] = self.regularizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the multiplier back."""
        if self.regularizer is not None and "gradient_norm_regularizer" in checkpoint:
            self.regularizer.load_state_dict(checkpoint["gradient_norm_regularizer"])


def gradient_ascent_search(
    mean_fn: Callable[[Tensor], Tensor],
    x0: Float[Tensor, "M D"],
    *,
    steps: int = 200,
    lr: float = 0.01,
    scale_by_dim: bool = True,
    return_trajectory: bool = False,
) -> Tensor:
    """Climb a surrogate from each design by plain steps ``x <- x + lr sqrt(D) d mean / dx``.

    Args:
        mean_fn: designs ``[M, D]`` -> mean scores, one per design.
        x0: where to start.
        steps: number of steps.
        lr: length of a step per unit of gradient.
        scale_by_dim: multiply it by ``sqrt(D)``.
        return_trajectory: the designs after every step instead of the last.

    Returns:
        ``[M, D]``, or ``[steps, M, D]``.

    Raises:
        ValueError: designs that are no matrix with a row, NaN among them, fewer than 1 step, lr not positive.

    Example:
        >>> import torch
        >>> from proto_core.offline_optimization import gradient_ascent_search
        >>> gradient_ascent_search(lambda x: -(x - 1).square().sum(1), torch.zeros(1, 1), lr=0.1).round(decimals=3)
        tensor([[1.]])
    """
    check_positive(steps=steps, lr=lr)
    if x0.ndim != 2 or x0.numel() == 0:
        raise ValueError(f"x0: found shape {tuple(x0.shape)}, needed [M, D] with M at least 1")
    if readable(x0) and bool(x0.isnan().any()):
        raise ValueError(f"x0: found {int(x0.isnan().sum())} NaN, needed numbers")
    size = lr * math.sqrt(x0.shape[1]) if scale_by_dim else lr
    x, path = x0.detach(), []
    for _ in range(steps):
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(mean_fn(x).sum(), x)
        x = x.detach() + size * gradient
        if return_trajectory:
            path.append(x)
    return torch.stack(path) if return_trajectory else x


def top_k_designs(x: Float[Tensor, "N D"], y: Float[Tensor, "N *one"], k: int = 128) -> Float[Tensor, "k D"]:
    """The k designs with the largest scores, best first.

    Raises:
        ValueError: scores that do not fit, k below 1 or above the number of designs, NaN.

    Example:
        >>> import torch
        >>> from proto_core.offline_optimization import top_k_designs
        >>> top_k_designs(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.5, 0.9, 0.1]), k=2)
        tensor([[2.],
                [1.]])
    """
    if len(x) != len(y) or y.numel() != len(y):
        raise ValueError(f"x, y: found shapes {tuple(x.shape)} and {tuple(y.shape)}, needed [N, D] and [N] or [N, 1]")
    if not 1 <= k <= len(x):
        raise ValueError(f"k: found {k}, needed 1 to {len(x)}, the number of designs")
    for name, values in {"x": x, "y": y}.items():
        if bool(values.isnan().any()):
            raise ValueError(f"{name}: found {int(values.isnan().sum())} NaN, needed numbers")
    return x[y.reshape(-1).topk(k).indices]


def percentile_scores(
    scores: Any, y_min: float, y_max: float, percentiles: Sequence[float] = (100, 80, 50)
) -> np.ndarray:
    """Percentiles of ``(score - y_min) / (y_max - y_min)``, interpolated linearly.

    Args:
        scores: true scores of the final designs.
        y_min: smallest score of the full data set.
        y_max: largest score of the full data set.
        percentiles: in percent.

    Raises:
        ValueError: no score, ``y_max`` not above ``y_min``.

    Example:
        >>> from proto_core.offline_optimization import percentile_scores
        >>> percentile_scores([0.0, 1.0, 2.0], 0.0, 4.0, (100, 50)).tolist()
        [0.5, 0.25]
    """
    values = scores.detach().cpu().double().numpy() if isinstance(scores, Tensor) else np.asarray(scores, dtype=float)
    if values.size == 0:
        raise ValueError(f"scores: found shape {values.shape}, needed one score at least")
    if not y_max > y_min:
        raise ValueError(f"y_min, y_max: found {y_min} and {y_max}, needed y_min < y_max")
    return np.percentile((values.reshape(-1) - y_min) / (y_max - y_min), list(percentiles))


class OfflineTask:
    """An analytic function on ``[-1, 1]^dim`` to maximise, known only at poor points.

    5,000 uniform points are drawn; of those with a score up to the median 1,000 are kept.

    Args:
        name: ``"ackley"`` (scaled by 5), ``"rosenbrock"`` (by 2) or ``"styblinski_tang"`` (by 5).
        dim: number of inputs.
        seed: of the points.

    Attributes:
        x: the recorded designs ``[1000, dim]``, float32.
        y: their scores ``[1000, 1]``.
        y_min: smallest score of all 5,000 points.
        y_max: largest score of all 5,000 points.

    Raises:
        ValueError: unknown name; fewer than one input (two for Rosenbrock's function).

    Example:
        >>> import torch
        >>> from proto_core.offline_optimization import OfflineTask
        >>> task = OfflineTask("ackley", dim=8, seed=0)
        >>> task.x.shape, task.score(torch.zeros(1, 8)).abs().round(decimals=4)
        (torch.Size([1000, 8]), tensor([0.]))
    """

    def __init__(self, name: str, dim: int = 8, seed: int = 0) -> None:
        self.name = check_option("name", name, *_SCORES)
        needed = 2 if name == "rosenbrock" else 1
        if dim < needed:
            raise ValueError(f"dim: found {dim}, needed at least {needed}")
        self.dim = dim
        generator = torch.Generator().manual_seed(1000 + seed)
        points = torch.rand(5000, dim, generator=generator) * 2 - 1
        scores = self.score(points)
        self.y_min, self.y_max = float(scores.min()), float(scores.max())
        poor = (scores <= scores.median()).nonzero().flatten()
        kept = poor[torch.randperm(len(poor), generator=generator)[:1000]]
        self.x, self.y = points[kept], scores[kept].unsqueeze(1)

    def score(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M"]:
        """True scores of designs; what lies outside the box is cut to it."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [M, {self.dim}]")
        return _SCORES[self.name](x.clamp(-1, 1))


def _ackley(x: Tensor) -> Tensor:
    z = 5 * x
    near = 20 * (-0.2 * z.square().mean(dim=1).sqrt()).exp()
    return near + (2 * math.pi * z).cos().mean(dim=1).exp() - 20 - math.e


def _rosenbrock(x: Tensor) -> Tensor:
    z = 2 * x
    return -(100 * (z[:, 1:] - z[:, :-1].square()).square() + (1 - z[:, :-1]).square()).sum(dim=1)


def _styblinski_tang(x: Tensor) -> Tensor:
    z = 5 * x
    return -0.5 * (z**4 - 16 * z.square() + 5 * z).sum(dim=1)


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "ackley": _ackley,
    "rosenbrock": _rosenbrock,
    "styblinski_tang": _styblinski_tang,
}
