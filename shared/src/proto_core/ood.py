"""Detectors of inputs that are not of the known distribution.

The Mahalanobis score of PALM (ICLR 2024, arXiv 2402.02653): one Gaussian over normalised, standardised features. Its
authors subtract the training mean a second time from features that already have mean 0; ``legacy_centering=True`` does
so too, for comparison with published numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

__all__ = ["MahalanobisOOD"]


class MahalanobisOOD:
    """``score(f) = -x^T pinv(Sigma) x``, higher for known inputs; all in float64.

    ``x = (f / (|f| + 1e-10) - mean) / (std + 1e-10)`` with mean and population standard deviation of the training
    features, Sigma the population covariance of x over them. Singular values below ``F * 2.2e-16`` times the largest
    are dropped.

    Args:
        legacy_centering: subtract the mean twice from what is scored, as the authors do.

    Example:
        >>> import torch
        >>> from proto_core.ood import MahalanobisOOD
        >>> g = torch.Generator().manual_seed(0)
        >>> known = torch.tensor([1.0, 0.0, 0.0]) + 0.1 * torch.randn(50, 3, generator=g)
        >>> detector = MahalanobisOOD().fit(known)
        >>> detector.score(known).min() > detector.score(-known).max()
        tensor(True)
    """

    def __init__(self, legacy_centering: bool = False) -> None:
        self.legacy_centering = legacy_centering
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        self.precision: Tensor | None = None

    def fit(self, train_features: Float[Tensor, "N F"]) -> MahalanobisOOD:
        """Take mean, spread and covariance of features of known inputs.

        Raises:
            ValueError: not ``[N, F]`` with N at least 1, NaN.
        """
        if train_features.ndim != 2 or 0 in train_features.shape:
            raise ValueError(f"train_features: found shape {tuple(train_features.shape)}, needed [N, F], N at least 1")
        unit = _unit("train_features", train_features)
        self.mean, self.std = unit.mean(dim=0), unit.std(dim=0, correction=0)
        x = (unit - self.mean) / (self.std + 1e-10)
        x = x - x.mean(dim=0)
        covariance = x.T @ x / len(x)
        self.precision = torch.linalg.pinv(covariance, hermitian=True, rtol=len(covariance) * 2.2e-16)
        return self

    def score(self, features: Float[Tensor, "M F"]) -> Float64[Tensor, "M"]:
        """Score of each input, on its device.

        Raises:
            RuntimeError: before ``fit``.
            ValueError: another number of features, NaN.
        """
        if self.mean is None or self.std is None or self.precision is None:
            raise RuntimeError("MahalanobisOOD: fit comes before score")
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: found shape {tuple(features.shape)}, needed [M, {len(self.mean)}]")
        unit = _unit("features", features)
        mean, std, precision = (part.to(unit) for part in (self.mean, self.std, self.precision))
        x = (unit - mean) / (std + 1e-10)
        if self.legacy_centering:
            x = x - mean
        return -((x @ precision) * x).sum(dim=1)

    def __repr__(self) -> str:
        return f"MahalanobisOOD(legacy_centering={self.legacy_centering})"


def _unit(name: str, features: Tensor) -> Tensor:
    wide = features.detach().double()
    if bool(wide.isnan().any()):
        raise ValueError(f"{name}: found {int(wide.isnan().any(dim=1).sum())} rows with NaN, needed numbers")
    return wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + 1e-10)
