"""Detectors of inputs that are not of the known distribution.

The distance to the k-th nearest known feature (ICML 2022, arXiv 2204.06507), and the Mahalanobis score of PALM (ICLR
2024, arXiv 2402.02653): one Gaussian over normalised, standardised features. PALM's authors subtract
the training mean a second time from features that already have mean 0; ``legacy_centering=True`` does so too, for
comparison with published numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from proto_core.checks import check_positive
from proto_core.metrics.ranking import nearest

__all__ = ["MahalanobisOOD", "NearestNeighbourOOD"]


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
        unit = _unit("train_features", _training(train_features))
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
        unit = _unit("features", _fitting(features, len(self.mean)))
        mean, std, precision = (part.to(unit) for part in (self.mean, self.std, self.precision))
        x = (unit - mean) / (std + 1e-10)
        if self.legacy_centering:
            x = x - mean
        return -((x @ precision) * x).sum(dim=1)

    def __repr__(self) -> str:
        return f"MahalanobisOOD(legacy_centering={self.legacy_centering})"


class NearestNeighbourOOD:
    """``score(f) = -|u - u_k|``: u of norm 1, ``u_k`` the k-th nearest training feature; higher for known inputs.

    Neighbours by the cosine, distances in float64.

    Args:
        k: which neighbour; the farthest where there are fewer. The paper takes 50 on CIFAR-10, 200 on CIFAR-100.

    Raises:
        ValueError: k below 1.

    Source:
        "Out-of-Distribution Detection with Deep Nearest Neighbors", arXiv 2204.06507, equation 2.

    Example:
        >>> import torch
        >>> from proto_core.ood import NearestNeighbourOOD
        >>> NearestNeighbourOOD(k=2).fit(torch.eye(2)).score(torch.tensor([[3.0, 4.0]]))
        tensor([-0.8944], dtype=torch.float64)
    """

    def __init__(self, k: int = 50) -> None:
        check_positive(k=k)
        self.k = k
        self.bank: Tensor | None = None

    def fit(self, train_features: Float[Tensor, "N F"]) -> NearestNeighbourOOD:
        """Keep features of known inputs.

        Raises:
            ValueError: not ``[N, F]`` with N at least 1, NaN.
        """
        self.bank = _unit("train_features", _training(train_features))
        return self

    def score(self, features: Float[Tensor, "M F"]) -> Float64[Tensor, "M"]:
        """Score of each input, on its device.

        Raises:
            RuntimeError: before ``fit``.
            ValueError: another number of features, NaN.
        """
        if self.bank is None:
            raise RuntimeError("NearestNeighbourOOD: fit comes before score")
        unit, bank = _unit("features", _fitting(features, self.bank.shape[1])), self.bank.to(features.device)
        if not len(unit):
            return unit.new_zeros(0)
        where = nearest(unit, bank, self.k)[1][:, -1]
        return -torch.linalg.vector_norm(unit - bank[where], dim=1)

    def __repr__(self) -> str:
        return f"NearestNeighbourOOD(k={self.k})"


def _training(features: Tensor) -> Tensor:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"train_features: found shape {tuple(features.shape)}, needed [N, F], N at least 1")
    return features


def _fitting(features: Tensor, size: int) -> Tensor:
    if features.ndim != 2 or features.shape[1] != size:
        raise ValueError(f"features: found shape {tuple(features.shape)}, needed [M, {size}]")
    return features


def _unit(name: str, features: Tensor) -> Tensor:
    wide = features.detach().double()
    if bool(wide.isnan().any()):
        raise ValueError(f"{name}: found {int(wide.isnan().any(dim=1).sum())} rows with NaN, needed numbers")
    return wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + 1e-10)
