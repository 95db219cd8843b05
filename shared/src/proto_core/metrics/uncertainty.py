"""Uncertainty of sampled class probabilities, split in two as Prob-PSENN does (2024, arXiv 2403.13740).

What remains when each sample is certain of its own answer but samples disagree is epistemic; what each sample is
uncertain of by itself is aleatoric.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from proto_core.checks import readable
from proto_core.precision import full_precision

__all__ = ["aleatoric_uncertainty", "epistemic_uncertainty", "predictive_entropy"]

EPS = 1e-8


def predictive_entropy(probs: Float[Tensor, "N S C"]) -> Float[Tensor, "N"]:
    """Entropy of the mean over samples, ``-sum_c p log(p + 1e-8)``, in nats.

    Args:
        probs: probabilities of C classes in S samples.

    Raises:
        ValueError: another shape, no sample, or entries outside [0, 1] (looked at on the CPU only).

    Example:
        >>> import torch
        >>> from proto_core.metrics import predictive_entropy
        >>> predictive_entropy(torch.eye(2).unsqueeze(0))
        tensor([0.6931])
    """
    return _entropy(_checked(probs).mean(dim=1))


def aleatoric_uncertainty(probs: Float[Tensor, "N S C"]) -> Float[Tensor, "N"]:
    """Mean entropy of the samples, in nats; arguments and errors as of :func:`predictive_entropy`.

    Example:
        >>> import torch
        >>> from proto_core.metrics import aleatoric_uncertainty
        >>> aleatoric_uncertainty(torch.full((1, 3, 2), 0.5))
        tensor([0.6931])
    """
    return _entropy(_checked(probs)).mean(dim=1)


def epistemic_uncertainty(probs: Float[Tensor, "N S C"]) -> Float[Tensor, "N"]:
    """Mutual information of class and sample: predictive entropy minus aleatoric uncertainty, in nats.

    0 up to rounding for a single sample; arguments and errors as of :func:`predictive_entropy`.

    Example:
        >>> import torch
        >>> from proto_core.metrics import epistemic_uncertainty
        >>> epistemic_uncertainty(torch.eye(2).unsqueeze(0))
        tensor([0.6931])
    """
    return predictive_entropy(probs) - aleatoric_uncertainty(probs)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * (probs + EPS).log()).sum(dim=-1)


def _checked(probs: Tensor) -> Tensor:
    if probs.ndim != 3 or probs.shape[1] == 0 or not probs.is_floating_point():
        raise ValueError(f"probs: found shape {tuple(probs.shape)} of {probs.dtype}, needed floats [N, S, C]")
    if readable(probs) and not bool(((probs >= 0) & (probs <= 1)).all()):
        raise ValueError("probs: found numbers outside [0, 1], needed probabilities")
    return full_precision(probs)
