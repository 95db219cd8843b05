"""Prototypes that are Gaussian distributions of the embedding space.

Prob-PSENN (2024, arXiv 2403.13740): a class is represented by ``N(mu, L L^T)``, distances are to samples of it, so that
an explanation has an uncertainty of its own. With a diagonal covariance they are also the prototypes of GPAM (2024,
arXiv 2410.20320): ``log_prob(z) = -D distance - D/2 log(2 pi)``. Unlike the authors' code, fitting a diagonal
covariance stores standard deviations, not variances.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, check_positive, readable
from proto_core.distances import sq_euclidean
from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes.classes import check_class_identity

__all__ = ["GaussianPrototypes", "gaussian_log_prob", "sample_gaussian", "sampled_distances"]


def gaussian_log_prob(
    z: Shaped[Tensor, "N D"], loc: Shaped[Tensor, "P D"], scale_tril: Shaped[Tensor, "P D D"]
) -> Float[Tensor, "N P"]:
    """``log N(z; mu, L L^T)`` of every sample under every Gaussian, with its constant ``-D/2 log(2 pi)``.

    Args:
        z: samples.
        loc: means.
        scale_tril: Cholesky factors L; what stands above the diagonal is not read.

    Raises:
        ValueError: shapes that do not fit; a diagonal of L that is not positive (looked at on the CPU only).

    Example:
        >>> import torch
        >>> from proto_core.prototypes import gaussian_log_prob
        >>> gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.eye(2).unsqueeze(0))
        tensor([[-1.8379]])
    """
    _check_gaussian(loc, scale_tril)
    z, loc, scale_tril = _one_precision(z, loc, scale_tril)
    if z.ndim != 2 or z.shape[1] != loc.shape[1]:
        raise ValueError(f"z: found shape {tuple(z.shape)}, needed [N, {loc.shape[1]}]")
    with no_autocast(z):
        difference = (z.unsqueeze(0) - loc.unsqueeze(1)).mT  # [P, D, N]
        standard = torch.linalg.solve_triangular(scale_tril.tril(), difference, upper=False)
        half_log_det = scale_tril.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        constant = 0.5 * loc.shape[1] * math.log(2 * math.pi)
        return (-0.5 * standard.square().sum(dim=1) - half_log_det.unsqueeze(1) - constant).T


def sample_gaussian(
    loc: Shaped[Tensor, "P D"], scale_tril: Shaped[Tensor, "P D D"], noise: Shaped[Tensor, "S P D"]
) -> Float[Tensor, "S P D"]:
    """``mu + L noise``: with noise from N(0, I), samples whose gradient reaches mu and L.

    Raises:
        ValueError: shapes that do not fit, a diagonal of L that is not positive.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import sample_gaussian
        >>> sample_gaussian(torch.ones(1, 2), 2 * torch.eye(2).unsqueeze(0), torch.ones(1, 1, 2))
        tensor([[[3., 3.]]])
    """
    _check_gaussian(loc, scale_tril)
    loc, scale_tril, noise = _one_precision(loc, scale_tril, noise)
    if noise.ndim != 3 or noise.shape[1:] != loc.shape:
        raise ValueError(f"noise: found shape {tuple(noise.shape)}, needed [S, {loc.shape[0]}, {loc.shape[1]}]")
    with no_autocast(loc):
        return loc + torch.einsum("pij,spj->spi", scale_tril.tril(), noise)


def sampled_distances(z: Shaped[Tensor, "N D"], samples: Shaped[Tensor, "S P D"]) -> Float[Tensor, "N P S"]:
    """Squared Euclidean distance of every embedding to every sample of every prototype.

    One matrix product around the samples' mean; no array over D.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import sampled_distances
        >>> sampled_distances(torch.zeros(1, 2), torch.tensor([[[3.0, 4.0]]]))
        tensor([[[25.]]])
    """
    if z.ndim != 2 or samples.ndim != 3 or z.shape[1] != samples.shape[2]:
        shapes = f"{tuple(z.shape)} and {tuple(samples.shape)}"
        raise ValueError(f"z, samples: found shapes {shapes}, needed [N, D] and [S, P, D]")
    count, prototypes, _ = samples.shape
    return sq_euclidean(z, samples.flatten(0, 1)).unflatten(1, (count, prototypes)).mT


class GaussianPrototypes(nn.Module):
    """P Gaussian prototypes ``N(mu, L L^T)``.

    Parameters: means, and raw numbers for L. Full: the strict lower part of the raw matrix plus
    ``diag(softplus(raw diagonal) + min_scale)``. Diagonal: standard deviations ``softplus(raw)``.

    Args:
        num_prototypes: P.
        dim: D.
        covariance: ``"full"`` or ``"diag"``.
        prior_std: standard deviation from which means are drawn, and of the prior of :meth:`kl_to_prior`.
        min_scale: smallest diagonal entry of a full L.
        class_identity: ``[P, C]``, 1 where prototype p stands for class c; ``None``: one class per prototype.

    Attributes:
        class_identity: buffer ``[P, C]`` float.

    Raises:
        ValueError: sizes below 1, prior_std or min_scale not positive, an unknown covariance, a class identity that
            does not fit.

    Shapes:
        embeddings ``[N, D]`` -> log-densities ``[N, P]``.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import GaussianPrototypes
        >>> layer = GaussianPrototypes(3, 8)
        >>> layer(torch.randn(5, 8)).shape, layer.distances(torch.randn(5, 8), num_samples=10).shape
        (torch.Size([5, 3]), torch.Size([5, 3, 10]))
    """

    class_identity: Tensor

    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        covariance: str = "full",
        prior_std: float = 1.0,
        min_scale: float = 1e-5,
        *,
        class_identity: Shaped[Tensor, "P C"] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_prototypes=num_prototypes, dim=dim, prior_std=prior_std, min_scale=min_scale)
        self.covariance = check_option("covariance", covariance, "full", "diag")
        self.prior_std = prior_std
        self.min_scale = min_scale
        identity = torch.eye(num_prototypes) if class_identity is None else class_identity
        check_class_identity(identity)
        if len(identity) != num_prototypes:
            raise ValueError(f"class_identity: found {len(identity)} prototypes, needed {num_prototypes}")
        self.register_buffer("class_identity", identity.float().clone())
        self.loc = nn.Parameter(torch.empty(num_prototypes, dim))
        shape = (num_prototypes, dim, dim) if covariance == "full" else (num_prototypes, dim)
        self.raw_scale = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Means from N(0, prior_std^2); full: raw entries from N(0.2, 0.1^2); diagonal: a fifth of prior_std, or so."""
        nn.init.normal_(self.loc, std=self.prior_std)
        if self.covariance == "full":
            nn.init.normal_(self.raw_scale, mean=0.2, std=0.1)
        else:
            nn.init.normal_(self.raw_scale, mean=self.prior_std / 5, std=self.prior_std / 10)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        prototypes, dim = self.loc.shape
        return (
            f"{prototypes}, {dim}, covariance={self.covariance!r}, prior_std={self.prior_std}, "
            f"min_scale={self.min_scale}, classes={self.class_identity.shape[1]}"
        )

    @property
    def num_prototypes(self) -> int:
        """P."""
        return len(self.loc)

    @property
    def scale_tril(self) -> Float[Tensor, "P D D"]:
        """Cholesky factors L, positive on the diagonal."""
        raw = full_precision(self.raw_scale)
        if self.covariance == "diag":
            return torch.diag_embed(F.softplus(raw))
        return raw.tril(-1) + torch.diag_embed(F.softplus(raw.diagonal(dim1=1, dim2=2)) + self.min_scale)

    @torch.no_grad()
    def set_parameters(self, loc: Shaped[Tensor, "P D"], scale_tril: Shaped[Tensor, "P D D"]) -> None:
        """Become the Gaussians given.

        A full diagonal below ``min_scale`` becomes ``min_scale``; a diagonal covariance takes L's diagonal.

        Raises:
            ValueError: shapes that do not fit, a diagonal that is not positive, entries off the diagonal where the
                covariance is diagonal.
        """
        shape = (*self.loc.shape, self.loc.shape[1])
        if loc.shape != self.loc.shape or tuple(scale_tril.shape) != shape:
            shapes = f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            raise ValueError(f"loc, scale_tril: found shapes {shapes}, needed {tuple(self.loc.shape)} and {shape}")
        _check_gaussian(loc, scale_tril)
        scale = scale_tril.to(self.raw_scale)
        diagonal = scale.diagonal(dim1=1, dim2=2)
        if self.covariance == "full":
            kept = scale.tril(-1) + torch.diag_embed(_inverse_softplus(diagonal - self.min_scale))
        else:
            if bool(scale.tril(-1).any()):
                raise ValueError("scale_tril: found entries off the diagonal, needed none for covariance 'diag'")
            kept = _inverse_softplus(diagonal)
        self.loc.copy_(loc)
        self.raw_scale.copy_(kept)

    @torch.no_grad()
    def fit(self, z: Shaped[Tensor, "N D"], labels: Int[Tensor, "N"]) -> GaussianPrototypes:
        """Mean and covariance (ddof 1) of the samples of each prototype's class.

        With fewer than D + 1 samples a full covariance is singular: 1e-6 times its mean variance (at least 1e-6) is
        added to the diagonal, with a warning.

        Args:
            z: embeddings.
            labels: class of each; the prototypes of a class all become its Gaussian.

        Raises:
            ValueError: shapes that do not fit, a class outside 0..C-1, a prototype whose class has no sample.
        """
        check_class_targets(z, labels, "z", classes=self.class_identity.shape[1])
        if z.shape[1] != self.loc.shape[1]:
            raise ValueError(f"z: found {z.shape[1]} features, needed {self.loc.shape[1]}")
        dim = z.shape[1]
        labels = labels.to(self.class_identity.device, torch.long)
        member = (self.class_identity[:, labels] > 0).to(torch.float64)  # [P, N]
        counts = member.sum(dim=1)
        if bool((counts == 0).any()):
            missing = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(f"labels: found no sample of the class of prototypes {missing}, needed at least one each")
        points = z.detach().to(member.device, torch.float64)
        loc = member @ points / counts.unsqueeze(1)
        apart = [points[own > 0] - mean for own, mean in zip(member, loc)]
        square = torch.stack([rows.T @ rows for rows in apart])
        covariance = square / (counts - 1).clamp_min(1)[:, None, None]
        variances = covariance.diagonal(dim1=1, dim2=2)
        few = counts < (dim + 1 if self.covariance == "full" else 2)
        floor = (1e-6 * variances.mean(dim=1)).clamp_min(1e-6)
        if bool(few.any()):
            who = few.nonzero().flatten().tolist()
            warnings.warn(
                f"prototypes {who} have {counts[few].int().tolist()} samples in {dim} dimensions: "
                "their covariance is singular, 1e-6 of the mean variance is added",
                stacklevel=2,
            )
        if self.covariance == "full":
            covariance = covariance + torch.diag_embed(torch.where(few, floor, 0).unsqueeze(1).expand(-1, dim))
            factor, failed = torch.linalg.cholesky_ex(covariance)
            if bool(failed.any()):  # enough samples, but on a line
                covariance = covariance + torch.diag_embed(floor.unsqueeze(1).expand(-1, dim))
                factor = torch.linalg.cholesky(covariance)
        else:
            floor = floor.unsqueeze(1)
            factor = torch.diag_embed(torch.where(variances > 0, variances, floor).sqrt())
        self.set_parameters(loc, factor)
        return self

    def sample(self, num_samples: int, noise: Shaped[Tensor, "S P D"] | None = None) -> Float[Tensor, "S P D"]:
        """Samples of every prototype, with gradient; ``noise`` instead of a draw from N(0, I)."""
        if noise is None:
            if num_samples < 1:
                raise ValueError(f"num_samples: found {num_samples}, needed at least 1")
            loc = full_precision(self.loc)
            noise = torch.randn(num_samples, *loc.shape, device=loc.device, dtype=loc.dtype)
        elif len(noise) != num_samples:
            raise ValueError(f"noise: found {len(noise)} samples, needed num_samples = {num_samples}")
        return sample_gaussian(self.loc, self.scale_tril, noise)

    def forward(self, z: Shaped[Tensor, "N D"]) -> Float[Tensor, "N P"]:
        """Log-density of every embedding under every prototype."""
        return self.log_prob(z)

    def log_prob(self, z: Shaped[Tensor, "N D"]) -> Float[Tensor, "N P"]:
        """See :func:`gaussian_log_prob`."""
        return gaussian_log_prob(z, self.loc, self.scale_tril)

    def distances(
        self, z: Shaped[Tensor, "N D"], num_samples: int, noise: Shaped[Tensor, "S P D"] | None = None
    ) -> Float[Tensor, "N P S"]:
        """Squared distances to ``num_samples`` samples of each prototype, which all of the batch share."""
        return sampled_distances(z, self.sample(num_samples, noise))

    def mode(self) -> Float[Tensor, "P D"]:
        """Most probable point of each prototype: its mean."""
        return self.loc

    def entropy(self) -> Float[Tensor, "P"]:
        """``D/2 (1 + log(2 pi)) + log det L``, in nats."""
        dim = self.loc.shape[1]
        return 0.5 * dim * (1 + math.log(2 * math.pi)) + self._log_diagonal()

    def kl_to_prior(self, prior_loc: Any = 0.0, prior_std: float | None = None) -> Float[Tensor, "P"]:
        """``KL(N(mu, L L^T) || N(prior_loc, prior_std^2 I))``, in nats.

        Args:
            prior_loc: a number or a tensor that broadcasts to ``[P, D]``.
            prior_std: ``None``: the layer's own.

        Raises:
            ValueError: prior_std not positive.
        """
        std = self.prior_std if prior_std is None else prior_std
        check_positive(prior_std=std)
        loc, scale = full_precision(self.loc), self.scale_tril
        dim = loc.shape[1]
        trace = scale.square().sum(dim=(1, 2)) / std**2
        shift = ((loc - prior_loc) / std).square().sum(dim=1)
        return 0.5 * (trace + shift - dim) + dim * math.log(std) - self._log_diagonal()

    def _log_diagonal(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=1, dim2=2).log().sum(dim=1)


def _inverse_softplus(x: Tensor) -> Tensor:
    """The number whose softplus is x; x at least 1e-30."""
    x = x.clamp_min(1e-30)
    return x + (-(-x).expm1()).log()


def _one_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check_gaussian(loc: Tensor, scale_tril: Tensor) -> None:
    if loc.ndim != 2 or tuple(scale_tril.shape) != (*loc.shape, loc.shape[1]):
        shapes = f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
        raise ValueError(f"loc, scale_tril: found shapes {shapes}, needed [P, D] and [P, D, D]")
    if readable(scale_tril):
        diagonal = scale_tril.detach().diagonal(dim1=1, dim2=2)
        if not bool((diagonal > 0).all()):
            raise ValueError(f"scale_tril: found {float(diagonal.min())} on a diagonal, needed positive numbers")
