"""DivideMix, the semi-supervised host of CPC: which labels look clean by their loss, new labels, mixing, losses.

Source: "DivideMix: Learning with Noisy Labels as Semi-supervised Learning", ICLR 2020, arXiv 2002.07394, and its
authors' code (LiJunnan1992/DivideMix). Differences: the mixture takes a random state, so that runs repeat; it can be
fitted per class; logarithms never meet an exact zero; empty sets give a loss of zero.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_positive, readable
from proto_core.precision import full_precision

__all__ = [
    "SemiLoss",
    "gmm_clean_probability",
    "guess_labels",
    "mix_up",
    "negative_entropy",
    "refine_labels",
    "uniform_prior_penalty",
]

_TINY = 1e-12


def gmm_clean_probability(
    losses: Shaped[Tensor, "N"],
    *,
    labels: Int[Tensor, "N"] | None = None,
    num_classes: int | None = None,
    min_samples: int = 20,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
    random_state: int = 0,
) -> Float[Tensor, "N"]:
    """Probability that a label is right, from its loss alone: the posterior of the smaller of two Gaussians.

    The losses are scaled to [0, 1] and a mixture of two Gaussians is fitted; the component with the smaller mean is
    that of the clean labels. With ``labels`` each class has a mixture of its own, scaled within the class (ours, not
    DivideMix's); a class with fewer than ``min_samples`` samples takes its answer from the mixture of all.

    Args:
        losses: cross-entropy of each sample with its given label.
        labels: given labels, for a mixture per class.
        num_classes: K; by default the largest label + 1.
        min_samples: samples of a class below which it has no mixture of its own.
        max_iter: of expectation-maximisation.
        tol: gain in likelihood below which it stops.
        reg_covar: added to the variances.
        random_state: of the start.

    Returns:
        ``[N]`` float64 in [0, 1], on the device of ``losses``. Fewer than two samples, or equal losses, give ones and a
        warning.

    Raises:
        ValueError: losses that are not ``[N]`` or not finite, labels of another length or outside 0..K-1.

    Source:
        arXiv 2002.07394, section 3.1.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import gmm_clean_probability
        >>> gmm_clean_probability(torch.tensor([0.1, 0.12, 0.11, 2.0, 2.1])).round().tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    losses = torch.as_tensor(losses)
    values = losses.detach().double().cpu().numpy()
    if values.ndim != 1:
        raise ValueError(f"losses: found shape {values.shape}, needed [N]")
    if not np.isfinite(values).all():
        raise ValueError(f"losses: found {values[~np.isfinite(values)][0]}, needed finite numbers")

    def fit(part: np.ndarray) -> np.ndarray:
        return _clean_posterior(part, max_iter, tol, reg_covar, random_state)

    if labels is None:
        return torch.from_numpy(fit(values)).to(losses.device)
    classes = torch.as_tensor(labels).detach().cpu().numpy()
    count = num_classes if num_classes is not None else int(classes.max(initial=0)) + 1
    if classes.shape != values.shape or ((classes < 0) | (classes >= count)).any():
        raise ValueError(
            f"labels: found shape {classes.shape} with values {np.unique(classes)[:9].tolist()}, needed "
            f"{values.shape} with classes 0 to {count - 1}"
        )
    rows = [np.flatnonzero(classes == k) for k in range(count)]
    small = np.concatenate([np.zeros(0, dtype=np.int64), *(part for part in rows if len(part) < min_samples)])
    found = np.ones(len(values))
    if len(small):
        found[small] = fit(values)[small]
    for part in rows:
        if len(part) >= max(min_samples, 1):
            found[part] = fit(values[part])
    return torch.from_numpy(found).to(losses.device)


def _clean_posterior(values: np.ndarray, max_iter: int, tol: float, reg_covar: float, random_state: int) -> np.ndarray:
    spread = np.ptp(values) if len(values) else 0.0
    if len(values) < 2 or spread == 0:
        warnings.warn(
            f"losses: {len(values)} samples with equal losses cannot be told apart, all count as clean", stacklevel=3
        )
        return np.ones(len(values))
    scaled = ((values - values.min()) / spread)[:, None]
    mixture = GaussianMixture(2, max_iter=max_iter, tol=tol, reg_covar=reg_covar, random_state=random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = mixture.fit(scaled).predict_proba(scaled)
    return posterior[:, mixture.means_[:, 0].argmin()]


@torch.no_grad()
def refine_labels(
    labels: Int[Tensor, "N"],
    clean_probability: Float[Tensor, "N"],
    logits: Float[Tensor, "V N K"],
    *,
    temperature: float = 0.5,
) -> Float[Tensor, "N K"]:
    """Targets of samples whose label counts as clean: ``w onehot(y) + (1 - w) mean_v softmax``, sharpened.

    Sharpened means ``p^(1/T)``, normalised per row. Nothing has a gradient.

    Args:
        labels: given labels y.
        clean_probability: w, in [0, 1].
        logits: of V views.
        temperature: T.

    Raises:
        ValueError: shapes that do not fit, labels outside 0..K-1, probabilities outside [0, 1], T of 0 or less.

    Source:
        arXiv 2002.07394, equations 3 and 4.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import refine_labels
        >>> refine_labels(torch.tensor([0]), torch.tensor([0.5]), torch.zeros(2, 1, 2), temperature=1.0)
        tensor([[0.7500, 0.2500]])
    """
    mean = _mean_probability(logits, temperature)
    check_class_targets(mean, labels, what="logits (a view)", empty=True)
    if clean_probability.shape != labels.shape:
        raise ValueError(
            f"clean_probability: found shape {tuple(clean_probability.shape)}, needed {tuple(labels.shape)}"
        )
    check_share("clean_probability", clean_probability)
    trust = clean_probability.to(mean.dtype)[:, None]
    return _sharpened(trust * F.one_hot(labels.long(), mean.shape[1]) + (1 - trust) * mean, temperature)


@torch.no_grad()
def guess_labels(logits: Float[Tensor, "V N K"], *, temperature: float = 0.5) -> Float[Tensor, "N K"]:
    """Targets of samples whose label is dropped: the mean softmax over views and networks, sharpened; no gradient.

    Args:
        logits: of V views and networks (DivideMix: 2 views x 2 networks).
        temperature: T.

    Raises:
        ValueError: logits of another shape, T of 0 or less.

    Source:
        arXiv 2002.07394, section 3.2.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import guess_labels
        >>> guess_labels(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[0.5000, 0.5000]])
    """
    return _sharpened(_mean_probability(logits, temperature), temperature)


def _mean_probability(logits: Tensor, temperature: float) -> Tensor:
    if logits.ndim != 3 or len(logits) == 0:
        raise ValueError(f"logits: found shape {tuple(logits.shape)}, needed [V, N, K] with one view at least")
    check_positive(temperature=temperature)
    return full_precision(logits).softmax(2).mean(0)


def _sharpened(probability: Tensor, temperature: float) -> Tensor:
    """``p^(1/T)`` per row; divided by the largest first, so that no row vanishes."""
    sharp = (probability / probability.amax(1, keepdim=True)) ** (1 / temperature)
    return sharp / sharp.sum(1, keepdim=True)


def check_share(name: str, values: Tensor) -> None:
    """Refuse numbers outside [0, 1].

    Raises:
        ValueError: names one that was found.
    """
    if readable(values) and not bool(((values >= 0) & (values <= 1)).all()):
        wrong = values[~((values >= 0) & (values <= 1))].flatten()[0]
        raise ValueError(f"{name}: found {float(wrong)}, needed numbers from 0 to 1")


def mix_up(
    inputs: Shaped[Tensor, "M *rest"], targets: Float[Tensor, "M K"], alpha: float = 4.0
) -> tuple[Shaped[Tensor, "M *rest"], Float[Tensor, "M K"]]:
    """MixMatch's interpolation: ``l a + (1 - l) b``, b a random permutation of a, one ``l >= 1/2`` for all.

    Args:
        inputs: a batch.
        targets: its soft labels.
        alpha: of ``l ~ Beta(alpha, alpha)``, then ``max(l, 1 - l)``.

    Raises:
        ValueError: alpha of 0 or less.

    Source:
        arXiv 1905.02249, section 3.3.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import mix_up
        >>> _, targets = mix_up(torch.zeros(2, 3), torch.eye(2))
        >>> bool((targets.diagonal() >= 0.5).all())
        True
    """
    check_positive(alpha=alpha)
    size = torch.tensor(alpha, dtype=torch.float32)  # whatever the default is: there is no draw in bfloat16
    share = torch.distributions.Beta(size, size).sample().item()
    share = max(share, 1 - share)
    order = torch.randperm(len(inputs), device=inputs.device)
    return share * inputs + (1 - share) * inputs[order], share * targets + (1 - share) * targets[order]


class SemiLoss(nn.Module):
    """Cross-entropy on labelled rows, squared error of probabilities on unlabelled rows, and the weight of the latter.

    ``Lx = -mean_n sum_k t log softmax``, ``Lu = mean_{n,k} (softmax - t)^2``,
    ``weight = lambda_u clip((epoch - warm_up) / rampup_length, 0, 1)``. The caller adds ``Lx + weight Lu``.

    Args:
        lambda_u: largest weight.
        rampup_length: epochs until it is reached.

    Shapes:
        logits and targets ``[N, K]`` and ``[M, K]`` -> two scalars and a number. A set without rows has a loss of 0.

    Raises:
        ValueError: a negative ``lambda_u``, a length of 0 or less, logits and targets of different shapes.

    Source:
        arXiv 2002.07394, equations 7 to 9.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import SemiLoss
        >>> labelled, unlabelled, weight = SemiLoss()(
        ...     torch.zeros(1, 2), torch.eye(2)[:1], torch.zeros(1, 2), torch.eye(2)[:1], epoch=18.0, warm_up=10
        ... )
        >>> round(float(labelled), 4), float(unlabelled), weight
        (0.6931, 0.25, 12.5)
    """

    def __init__(self, lambda_u: float = 25.0, rampup_length: float = 16) -> None:
        super().__init__()
        check_positive(rampup_length=rampup_length)
        if lambda_u < 0:
            raise ValueError(f"lambda_u: found {lambda_u}, needed 0 or more")
        self.lambda_u, self.rampup_length = lambda_u, rampup_length

    def forward(
        self,
        logits_x: Float[Tensor, "N K"],
        targets_x: Float[Tensor, "N K"],
        logits_u: Float[Tensor, "M K"],
        targets_u: Float[Tensor, "M K"],
        epoch: float,
        warm_up: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], float]:
        """Losses of labelled and unlabelled rows, and the weight of the second at an epoch (may be fractional)."""
        for name, logits, targets in (("x", logits_x, targets_x), ("u", logits_u, targets_u)):
            if logits.ndim != 2 or logits.shape != targets.shape:
                shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
                raise ValueError(f"logits_{name}, targets_{name}: found shapes {shapes}, needed [N, K] twice")
        logits_x, logits_u = full_precision(logits_x), full_precision(logits_u)
        labelled = -(targets_x * logits_x.log_softmax(1)).sum() / max(len(logits_x), 1)
        unlabelled = ((logits_u.softmax(1) - targets_u) ** 2).sum() / max(logits_u.numel(), 1)
        return labelled, unlabelled, self.lambda_u * min(max((epoch - warm_up) / self.rampup_length, 0.0), 1.0)

    def extra_repr(self) -> str:
        """The settings."""
        return f"lambda_u={self.lambda_u}, rampup_length={self.rampup_length}"


def uniform_prior_penalty(logits: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """``sum_k (1/K) log((1/K) / mean_n softmax_k)``: keeps a network from answering one class for everything.

    No rows give 0. A class that nobody answers counts as 1e-12.

    Source:
        arXiv 2002.07394, equation 10.

    Example:
        >>> import torch
        >>> from proto_vision.cpc import uniform_prior_penalty
        >>> round(abs(float(uniform_prior_penalty(torch.zeros(3, 4)))), 6)
        0.0
    """
    logits = full_precision(logits)
    if len(logits) == 0:
        return logits.sum()
    mean = logits.softmax(1).mean(0).clamp_min(_TINY)
    return -(mean.log().mean() + math.log(logits.shape[1]))


def negative_entropy(logits: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """``mean_n sum_k p log p``: added in the warm-up under asymmetric noise, against over-confidence. No rows give 0.

    Source:
        arXiv 2002.07394, section 3.1 (confidence penalty).

    Example:
        >>> import torch
        >>> from proto_vision.cpc import negative_entropy
        >>> round(float(negative_entropy(torch.zeros(3, 4))), 4)
        -1.3863
    """
    logs = full_precision(logits).log_softmax(1)
    return (logs.exp() * logs.clamp_min(math.log(_TINY))).sum() / max(len(logs), 1)
