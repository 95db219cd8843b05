"""Required inductive bias (IJCAI 2024, arXiv 2406.15941): how much must be known to generalise as well as asked.

Hypotheses that fit the training data are drawn from a base distribution; the bias that test loss e requires is
``I(e) = -log P(test loss <= e)``. That probability is mostly far too small to count, so the sampled losses are modelled
as a scaled noncentral chi-squared variable (squared error of Gaussian predictions is a weighted sum of those) whose
tail is read off. Biases are in nats and never negative.

Unlike the authors' code: the kernel hypotheses' two linear systems are solved, not descended; a network's test loss is
the mean over samples and outputs; nothing is cached by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor, nn

from proto_core.distances import sq_euclidean
from proto_core.systems import Paper

__all__ = [
    "ScaledNCX2",
    "fit_loss_distribution",
    "inductive_bias_from_params",
    "rbf_kernel",
    "required_inductive_bias",
    "sample_kernel_losses",
    "sample_network_losses",
    "sankaran_inductive_bias",
]


@dataclass(frozen=True)
class ScaledNCX2:
    """Losses as ``loc + scale * noncentral chi-squared(df, nc)``.

    Args:
        df: degrees of freedom.
        nc: noncentrality.
        loc: location.
        scale: scale, in units of the loss.

    Example:
        >>> from proto_core.theory.inductive_bias import ScaledNCX2
        >>> round(ScaledNCX2(df=2.0, nc=0.0, loc=0.0, scale=0.5).inductive_bias(0.01), 4)
        4.6102
    """

    paper: ClassVar[Paper] = Paper(
        title="Towards Exact Computation of Inductive Bias",
        year=2024,
        arxiv="2406.15941",
        code="FieteLab/Exact-Inductive-Bias@8afae31",
        evidence="code",
        summary="nats of inductive bias that a task requires, from sampled hypotheses",
        claim="kernel hypotheses require more inductive bias the more dimensions the inputs have",
    )

    df: float
    nc: float
    loc: float
    scale: float

    def inductive_bias(self, target: float) -> float:
        """``-log P(loss <= target)`` in nats; see :func:`inductive_bias_from_params`."""
        return inductive_bias_from_params(target, self.df, self.nc, self.loc, self.scale)

    def cdf(self, x: Any) -> Any:
        """Share of losses up to ``x``."""
        return stats.ncx2.cdf(x, self.df, self.nc, loc=self.loc, scale=self.scale)

    def rvs(self, n: int, seed: int = 0) -> Float64[np.ndarray, "n"]:
        """``n`` losses drawn from the distribution."""
        return stats.ncx2.rvs(self.df, self.nc, loc=self.loc, scale=self.scale, size=n, random_state=seed)


def required_inductive_bias(losses: Any, target: float, *, method: str = "ncx2", base: float | None = None) -> float:
    """Inductive bias that the test loss ``target`` requires, from losses of sampled hypotheses (section 3).

    Far below the smallest sample the answer is as good as the model: report that sample and their number beside it.

    Args:
        losses: test losses ``[S]`` of hypotheses that fit the training data.
        target: test loss asked for.
        method: ``"ncx2"`` (fit, then tail) or ``"empirical"`` (minus log of the share up to the target).
        base: of the logarithm, 2 for bits; ``None``: nats.

    Returns:
        At least 0; infinite where the target cannot be reached.

    Raises:
        ValueError: fewer than 10 losses for ``"ncx2"``, negative or non-finite losses, a target that is no number, an
            unknown method, a base not above 1.

    Example:
        >>> from proto_core.theory.inductive_bias import required_inductive_bias
        >>> required_inductive_bias([1.0, 2.0, 3.0, 4.0], 1.5, method="empirical", base=2)
        2.0
    """
    values = _losses(losses)
    if not math.isfinite(target):
        raise ValueError(f"target: found {target}, needed a finite loss")
    if base is not None and not base > 1:
        raise ValueError(f"base: found {base}, needed a number above 1")
    unit = 1.0 if base is None else math.log(base)
    if method == "empirical":
        share = float(np.mean(values <= target))
        return -math.log(share) / unit + 0.0 if share > 0 else math.inf
    if method != "ncx2":
        raise ValueError(f"method: found {method!r}, needed 'ncx2' or 'empirical'")
    _enough(values)
    if np.ptp(values) == 0:
        return 0.0 if target >= values[0] else math.inf
    if target <= 0:
        return math.inf
    return fit_loss_distribution(values).inductive_bias(target) / unit


def fit_loss_distribution(losses: Any) -> ScaledNCX2:
    """Maximum-likelihood fit with location 0, scipy's from its own start on the losses as they are.

    Often on the boundary (nc near 0), where df and nc cannot be told apart: compare biases, never parameters. Where the
    fit fails, moments with nc = 0 are matched and a warning says so.

    Args:
        losses: ``[S]``, at least 10, not all equal.

    Raises:
        ValueError: too few, negative, non-finite or equal losses.

    Example:
        >>> from proto_core.theory.inductive_bias import ScaledNCX2, fit_loss_distribution
        >>> found = fit_loss_distribution(ScaledNCX2(6.0, 0.0, 0.0, 0.1).rvs(500))
        >>> bool(abs(found.cdf(0.6) - 0.577) < 0.05)
        True
    """
    values = _losses(losses)
    _enough(values)
    if np.ptp(values) == 0:
        raise ValueError(f"losses: found {len(values)} times {values[0]}, needed losses that differ")
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = [float(value) for value in stats.ncx2.fit(values, floc=0)]
        failed = "non-finite parameters" if not np.isfinite(found).all() or min(found[0], found[3]) <= 0 else ""
    except (RuntimeError, ValueError, FloatingPointError) as error:
        failed = str(error)
    if failed:
        mean, variance = float(values.mean()), float(values.var())
        warnings.warn(f"the maximum-likelihood fit failed ({failed}): moments are matched with nc = 0", stacklevel=2)
        found = [2 * mean**2 / variance, 0.0, 0.0, variance / (2 * mean)]
    return ScaledNCX2(*found)


def inductive_bias_from_params(target: float, df: float, nc: float, loc: float, scale: float) -> float:
    """``-log P(loss <= target)`` of a scaled noncentral chi-squared variable, in nats.

    Where the tail underflows, :func:`sankaran_inductive_bias` takes over with a warning; it is 1 to 5 % off, so that
    the bias jumps where it starts.

    Args:
        target: loss asked for.
        df: degrees of freedom, positive.
        nc: noncentrality, at least 0.
        loc: location.
        scale: scale, positive.

    Raises:
        ValueError: df or scale not positive, nc negative, a target that is no number.

    Example:
        >>> from proto_core.theory.inductive_bias import inductive_bias_from_params
        >>> round(inductive_bias_from_params(0.02, 2.0, 0.0, 0.0, 1.0), 4)  # an exponential with mean 2
        4.6102
    """
    _check_parameters(target, df, nc, scale)
    if target <= loc:
        return math.inf
    with np.errstate(all="ignore"):
        tail = float(stats.ncx2.logcdf(target, df, nc, loc=loc, scale=scale))
    if math.isfinite(tail):
        return max(-tail, 0.0)
    warnings.warn(f"the tail at {target} underflows: Sankaran's approximation is used", stacklevel=2)
    return sankaran_inductive_bias(target, df, nc, loc, scale)


def sankaran_inductive_bias(target: float, df: float, nc: float, loc: float, scale: float) -> float:
    """``z^2 / 2`` with z of Sankaran's normal approximation: the leading term of the far lower tail.

    Args:
        target: loss asked for.
        df: degrees of freedom, positive.
        nc: noncentrality, at least 0.
        loc: ignored, as in the authors' code.
        scale: scale, positive.

    Returns:
        In nats; it says something only far below the mean.

    Raises:
        ValueError: df or scale not positive, nc negative, a target that is no number.

    Example:
        >>> from proto_core.theory.inductive_bias import sankaran_inductive_bias
        >>> round(sankaran_inductive_bias(1e-4, 50.0, 1.0, 0.0, 1.0))
        109
    """
    _check_parameters(target, df, nc, scale)
    if target <= 0:
        return math.inf
    x, s, q = target / scale, df + nc, df + 2 * nc
    h = 1 - 2 / 3 * s * (df + 3 * nc) / q**2
    p = q / s**2
    m = (h - 1) * (1 - 3 * h)
    z = ((x / s) ** h - (1 + h * p * (h - 1 - 0.5 * (2 - h) * m * p))) / (h * math.sqrt(2 * p) * (1 + 0.5 * m * p))
    return z * z / 2


def rbf_kernel(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], sigma: float = 1.0) -> Float[Tensor, "n m"]:
    """``exp(-|a - b|^2 / (2 sigma^2))``.

    Raises:
        ValueError: sigma not positive, shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.theory.inductive_bias import rbf_kernel
        >>> rbf_kernel(torch.zeros(1, 2), torch.ones(1, 2)).item() == torch.tensor(-1.0).exp().item()
        True
    """
    if not sigma > 0:
        raise ValueError(f"sigma: found {sigma}, needed a positive number")
    return (sq_euclidean(a, b) / (-2 * sigma**2)).exp()


def sample_kernel_losses(
    x_train: Float[Tensor, "n d"],
    y_train: Float[Tensor, "n k"],
    x_test: Float[Tensor, "t d"],
    y_test: Float[Tensor, "t k"],
    *,
    num_samples: int = 10_000,
    sigma: float = 1.0,
    jitter: float = 1e-8,
    noise: Float[Tensor, "t k S"] | None = None,
    generator: torch.Generator | None = None,
    return_moments: bool = False,
) -> Any:
    """Test losses of Gaussian-process draws that pass through the training data (section 4).

    With ``K`` the RBF kernel: ``mean = K(test, train) K_tt^-1 Y`` and ``cov = K(test, test) - K(test, train) K_tt^-1
    K(train, test)``; a draw is ``mean + R xi`` with R the symmetric root of cov, its loss the mean squared error over
    test points and outputs.

    Args:
        x_train: training inputs.
        y_train: training outputs, one-hot for classes.
        x_test: test inputs.
        y_test: test outputs.
        num_samples: draws S.
        sigma: width of the kernel.
        jitter: added to the diagonal of the training kernel.
        noise: standard normal numbers instead of a draw.
        generator: source of the draw.
        return_moments: also give mean ``[t, k]`` and cov ``[t, t]``.

    Returns:
        Losses ``[S]`` in float64, or ``(losses, mean, cov)``.

    Raises:
        ValueError: shapes that do not fit, sigma not positive, a negative jitter.

    Example:
        >>> import torch
        >>> from proto_core.theory.inductive_bias import sample_kernel_losses
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> sample_kernel_losses(x, x, x, x, num_samples=3).max() < 1e-4  # nothing is left to guess
        tensor(True)
    """
    for name, x, y in [("train", x_train, y_train), ("test", x_test, y_test)]:
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"x_{name}, y_{name}: found shapes {shapes}, needed [n, d] and [n, k]")
    if x_train.shape[1] != x_test.shape[1] or y_train.shape[1] != y_test.shape[1]:
        raise ValueError(
            f"x_test, y_test: found {x_test.shape[1]} inputs and {y_test.shape[1]} outputs, needed "
            f"{x_train.shape[1]} and {y_train.shape[1]} as in training"
        )
    if jitter < 0:
        raise ValueError(f"jitter: found {jitter}, needed at least 0")
    x_train, y_train, x_test, y_test = (part.detach().double() for part in (x_train, y_train, x_test, y_test))
    inside = rbf_kernel(x_train, x_train, sigma)
    inside = inside + jitter * torch.eye(len(inside), dtype=inside.dtype, device=inside.device)
    across = rbf_kernel(x_test, x_train, sigma)
    solved = torch.linalg.solve(inside, torch.cat([y_train, across.T], dim=1))
    outputs = y_train.shape[1]
    mean = across @ solved[:, :outputs]
    covariance = rbf_kernel(x_test, x_test, sigma) - across @ solved[:, outputs:]
    covariance = (covariance + covariance.T) / 2
    shape = (len(x_test), outputs)
    if noise is None:
        source = generator.device if generator is not None else mean.device
        noise = torch.randn(*shape, num_samples, generator=generator, dtype=mean.dtype, device=source)
    elif noise.ndim != 3 or tuple(noise.shape[:2]) != shape:
        raise ValueError(f"noise: found shape {tuple(noise.shape)}, needed {shape} and a number of samples")
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    draws = torch.einsum("st,tkn->skn", root, noise.to(mean))
    losses = (draws + (mean - y_test).unsqueeze(-1)).square().mean(dim=(0, 1))
    return (losses, mean, covariance) if return_moments else losses


def sample_network_losses(
    model_fn: Callable[[], nn.Module],
    train_set: torch.utils.data.Dataset,
    test_set: torch.utils.data.Dataset,
    *,
    num_trials: int,
    epochs: int,
    batch_size: int,
    lr: float = 1e-3,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Float64[Tensor, "trials"]:
    """Test losses of freshly initialised networks, each trained by Adam on the mean squared error.

    Args:
        model_fn: makes a network ``[N, ...] -> [N, k]`` with its own random start.
        train_set: pairs of input and output ``[k]``, one-hot for classes.
        test_set: the same for the test.
        num_trials: networks.
        epochs: passes over the training data.
        batch_size: of both.
        lr: Adam's rate.
        device: where to train; ``None``: the CPU.
        seed: trial i starts from ``seed + i``; torch's global random state is left as it was.

    Returns:
        Mean squared error over all test samples and outputs, one per trial.

    Raises:
        ValueError: a count below 1, or an empty set.

    Example:
        >>> import torch
        >>> from proto_core.theory.inductive_bias import sample_network_losses
        >>> data = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
        >>> make = lambda: torch.nn.Linear(2, 1)
        >>> sample_network_losses(make, data, data, num_trials=2, epochs=1, batch_size=4).shape
        torch.Size([2])
    """
    for name, value in {"num_trials": num_trials, "epochs": epochs, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, needed at least 1")
    for name, data in [("train_set", train_set), ("test_set", test_set)]:
        if len(data) == 0:  # type: ignore[arg-type]
            raise ValueError(f"{name}: found no sample, needed at least one")
    place = torch.device(device or "cpu")
    devices = [place] if place.type == "cuda" else []
    losses = []
    for trial in range(num_trials):
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed + trial)
            model = model_fn().to(place).train()
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            order = torch.utils.data.DataLoader(train_set, batch_size=batch_size, shuffle=True)
            for _ in range(epochs):
                for x, y in order:
                    optimizer.zero_grad(set_to_none=True)
                    nn.functional.mse_loss(model(x.to(place)), y.to(place).float()).backward()
                    optimizer.step()
            losses.append(_test_loss(model.eval(), test_set, batch_size, place))
    return torch.tensor(losses, dtype=torch.float64)


@torch.no_grad()
def _test_loss(model: nn.Module, data: Any, batch_size: int, place: torch.device) -> float:
    total = torch.zeros((), dtype=torch.float64, device=place)
    entries = 0
    for x, y in torch.utils.data.DataLoader(data, batch_size=batch_size):
        error = model(x.to(place)).double() - y.to(place).double()
        total += error.square().sum()
        entries += error.numel()
    return float(total) / entries


def _losses(losses: Any) -> Float64[np.ndarray, "S"]:
    values = losses.detach().cpu().numpy() if isinstance(losses, Tensor) else np.asarray(losses)
    values = values.astype(np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"losses: found shape {values.shape}, needed [S] with S at least 1")
    if not np.isfinite(values).all() or (values < 0).any():
        wrong = values[~(np.isfinite(values) & (values >= 0))][0]
        raise ValueError(f"losses: found {wrong}, needed finite numbers of at least 0")
    return values


def _enough(values: np.ndarray) -> None:
    if len(values) < 10:
        raise ValueError(f"losses: found {len(values)}, needed at least 10 to fit a distribution")


def _check_parameters(target: float, df: float, nc: float, scale: float) -> None:
    if not math.isfinite(target):
        raise ValueError(f"target: found {target}, needed a finite loss")
    for name, value in {"df": df, "scale": scale}.items():
        if not value > 0:
            raise ValueError(f"{name}: found {value}, needed a positive number")
    if not nc >= 0:
        raise ValueError(f"nc: found {nc}, needed at least 0")
