"""A linear layer's place taken by distances: class centres instead of class weights (arXiv 2603.10225, 2502.01628)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.checks import check_option, check_positive
from proto_core.distances import METRICS
from proto_core.precision import full_precision, no_autocast

__all__ = ["DistanceLayer"]


class DistanceLayer(nn.Module):
    """Distances to K learned centres, by any metric of :mod:`proto_core.distances`.

    ``mahalanobis`` learns its matrix. ``standard``: the symmetric part of ``precision + reg_lambda I``, plus
    ``10 eps I``. ``diagonal``: ``exp(clamp(log_diag, -10, 10)) + eps``. ``cholesky``: ``L L^T + eps I`` with L the
    lower triangle of ``chol``, its diagonal at least eps.

    Args:
        in_features: D.
        num_classes: K.
        metric: name of a distance.
        options: settings of the distance; for mahalanobis also ``variant`` and ``reg_lambda`` (at least 1e-4).

    Attributes:
        centers: Parameter ``[K, D]``, starts as a linear layer's weight.

    Raises:
        ValueError: an unknown metric, variant or option; sizes below 1; features that do not fit.

    Shapes:
        ``[..., D]`` -> distances ``[..., K]``.

    Example:
        >>> import torch
        >>> from proto_core.layers import DistanceLayer
        >>> DistanceLayer(8, 3, metric="cosine")(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """

    precision: Tensor
    log_diag: Tensor
    chol: Tensor

    def __init__(self, in_features: int, num_classes: int, *, metric: str = "sq_euclidean", **options: Any) -> None:
        super().__init__()
        check_positive(in_features=in_features, num_classes=num_classes)
        self.metric = check_option("metric", metric, *METRICS)
        self.variant, self.reg_lambda = "standard", 1e-2
        if metric == "mahalanobis":
            self.variant = check_option(
                "variant", options.pop("variant", "standard"), "standard", "diagonal", "cholesky"
            )
            self.reg_lambda = options.pop("reg_lambda", 1e-2)
            if not self.reg_lambda >= 1e-4:
                raise ValueError(f"reg_lambda: found {self.reg_lambda}, needed at least 1e-4")
        known = set(inspect.signature(METRICS[metric]).parameters) - {"x", "c", "precision", "training"}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{unknown[0]}: found for metric {metric!r}, which takes {', '.join(sorted(known))}")
        self.options = options
        self.eps = options.get("eps", 1e-4)
        self.in_features = in_features
        self.centers = nn.Parameter(torch.empty(num_classes, in_features))
        if metric == "mahalanobis":
            name = {"standard": "precision", "diagonal": "log_diag", "cholesky": "chol"}[self.variant]
            shape = (in_features,) if self.variant == "diagonal" else (in_features, in_features)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()
        with torch.no_grad():  # settings that the distance refuses are refused here
            self(torch.zeros(1, in_features))

    def reset_parameters(self) -> None:
        """Centres as a linear layer's weight; ``(1 + reg_lambda) I``, 0 or ``0.1 I`` for the matrix."""
        nn.init.kaiming_uniform_(self.centers, a=math.sqrt(5))
        if self.metric != "mahalanobis":
            return
        with torch.no_grad():
            if self.variant == "diagonal":
                self.log_diag.zero_()
            elif self.variant == "cholesky":
                self.chol.copy_(0.1 * torch.eye(self.in_features))
            else:
                self.precision.copy_((1 + self.reg_lambda) * torch.eye(self.in_features))

    def extra_repr(self) -> str:
        """Sizes, metric and its settings."""
        options = {"variant": self.variant, "reg_lambda": self.reg_lambda} if self.metric == "mahalanobis" else {}
        text = "".join(f", {name}={value!r}" for name, value in (options | self.options).items())
        return f"{self.in_features}, {len(self.centers)}, metric={self.metric!r}{text}"

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch K"]:
        """Distance of every point to every centre."""
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [..., {self.in_features}]")
        distance = METRICS[self.metric]
        if self.metric == "mahalanobis":
            return distance(x, self.centers, self._matrix(), **self.options)
        if self.metric == "hamming":
            return distance(x, self.centers, training=self.training, **self.options)
        return distance(x, self.centers, **self.options)

    def _matrix(self) -> Tensor:
        if self.variant == "diagonal":
            return full_precision(self.log_diag).clamp(-10, 10).exp() + self.eps
        identity = torch.eye(self.in_features, device=self.centers.device)
        if self.variant == "cholesky":
            lower = full_precision(self.chol)
            identity = identity.to(lower)
            lower = lower.tril(-1) + torch.diag_embed(lower.diagonal().clamp_min(self.eps))
            with no_autocast(lower):
                return lower @ lower.T + self.eps * identity
        matrix = full_precision(self.precision)
        identity = identity.to(matrix)
        matrix = matrix + self.reg_lambda * identity
        return (matrix + matrix.T) / 2 + 10 * self.eps * identity
