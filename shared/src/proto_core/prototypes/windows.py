"""Prototypes that are windows of a feature sequence, and the similarities that compare them.

A window of W steps of an F-channel sequence of T steps is compared at each of the T-W+1 places where it fits.

Source: ProtoECGNet (arXiv 2504.08713), 2D branches: ``s_i = floor(sqrt(F*W))/W * <A_i, B> /
(sqrt(|A_i|^2 + eps) sqrt(|B|^2 + eps))``, pooled by the mean over windows in training and inference.
Difference from the authors' code: the mean over windows is taken before the product with the prototypes (the formula
is linear in the normalised windows), so that no [N, P, T-W+1] array is made and the product is T-W+1 times cheaper.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from proto_core.precision import full_precision, no_autocast
from proto_core.prototypes.layers import PrototypeLayer

__all__ = [
    "Pooling",
    "WindowPrototypes",
    "log_similarity",
    "mean_window_similarity",
    "pool_windows",
    "window_l2_distance",
    "window_similarity",
]

Pooling = Literal["mean", "max", "topk"]


def _steps(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Feature sequences ``[N, F, T]`` and flattened prototypes ``[P, F*W]``, in float32 at least."""
    if features.ndim != 4 or prototypes.ndim != 4 or features.shape[1:3] != prototypes.shape[1:3]:
        raise ValueError(
            f"needed features [N, F, 1, T] and prototypes [P, F, 1, W], found {tuple(features.shape)} and "
            f"{tuple(prototypes.shape)}"
        )
    if features.shape[2] != 1:
        raise ValueError(f"features: found height {features.shape[2]}, needed [N, F, 1, T]")
    width = prototypes.shape[3]
    if width > features.shape[3]:
        raise ValueError(f"window of {width} steps is longer than the feature map of {features.shape[3]} steps")
    return full_precision(features).squeeze(2), full_precision(prototypes).flatten(1)


def _windows(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Windows ``[N, K, F*W]`` of the features and flattened prototypes ``[P, F*W]``, in float32 at least."""
    steps, flat = _steps(features, prototypes)
    return steps.unfold(-1, prototypes.shape[3], 1).permute(0, 2, 1, 3).flatten(2), flat


def _scale(prototypes: Tensor) -> float:
    channels, width = prototypes.shape[1], prototypes.shape[3]
    return math.floor(math.sqrt(channels * width)) / width


def window_similarity(
    features: Float[Tensor, "N F 1 T"], prototypes: Float[Tensor, "P F 1 W"], eps: float = 1e-4
) -> Float[Tensor, "N P K"]:
    """Scaled cosine of every prototype to every window, K = T-W+1.

    The scale ``floor(sqrt(F*W))/W`` is 13 for F=512, W=3, so values are not in [-1, 1].

    Args:
        features: feature sequences.
        prototypes: windows to look for.
        eps: added to the squared norms, inside the roots.

    Raises:
        ValueError: shapes that do not fit, or a window longer than the sequence.
    """
    with no_autocast(features):
        a, b = _windows(features, prototypes)
        a_norm = (a.square().sum(-1) + eps).sqrt()
        b_unit = b / (b.square().sum(-1, keepdim=True) + eps).sqrt()
        return _scale(prototypes) * torch.einsum("nkd,pd->npk", a, b_unit) / a_norm.unsqueeze(1)


def mean_window_similarity(
    features: Float[Tensor, "N F 1 T"], prototypes: Float[Tensor, "P F 1 W"], eps: float = 1e-4
) -> Float[Tensor, "N P"]:
    """Mean of :func:`window_similarity` over the windows, without making the ``[N, P, K]`` array.

    Raises:
        ValueError: as :func:`window_similarity`.
    """
    with no_autocast(features):
        steps, b = _steps(features, prototypes)
        width = prototypes.shape[3]
        places = steps.shape[2] - width + 1
        # squared norm of each window, from the squared norms of its steps
        squared = steps.square().sum(1).unfold(1, width, 1).sum(-1)
        share = (squared + eps).rsqrt() / places
        # spread[n, t, w] = share[n, t - w]: what step t of the sequence adds to step w of the mean normalised window
        spread = F.pad(share, (width - 1, width - 1)).unfold(1, width, 1).flip(-1)
        mean_window = (steps @ spread).flatten(1)
        b_norm = (b.square().sum(-1) + eps).rsqrt()
        return mean_window @ b.T * (_scale(prototypes) * b_norm)


def window_l2_distance(
    features: Float[Tensor, "N F 1 T"], prototypes: Float[Tensor, "P F 1 W"]
) -> Float[Tensor, "N P K"]:
    """Euclidean distance of every prototype to every window; the gradient at distance 0 is 0.

    Differences are taken before they are squared: a projected prototype is at distance 0 from its own window, where
    :func:`log_similarity` is steepest and the rounding of ``|a|^2 + |b|^2 - 2 <a, b>`` would halve it.

    Raises:
        ValueError: as :func:`window_similarity`.
    """
    with no_autocast(features):
        a, b = _windows(features, prototypes)
        distance = torch.cdist(a.flatten(0, 1), b, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.unflatten(0, a.shape[:2]).transpose(1, 2)


def log_similarity(d: Tensor, eps: float = 1e-4) -> Tensor:
    """``log((d + 1) / (d + eps))``: a similarity that falls with the distance ``d >= 0`` (ProtoPNet's)."""
    d = full_precision(d)
    return ((d + 1) / (d + eps)).log()


def pool_windows(s: Float[Tensor, "N P K"], mode: Pooling = "mean", k: int = 5) -> Float[Tensor, "N P"]:
    """Pool window similarities: mean, largest, or mean of the ``k`` largest.

    Raises:
        ValueError: unknown mode, or ``k`` larger than the number of windows.
    """
    if mode not in get_args(Pooling):
        raise ValueError(f"pooling: found {mode!r}, needed one of {get_args(Pooling)}")
    if mode == "mean":
        return s.mean(-1)
    if mode == "max":
        return s.amax(-1)
    if not 1 <= k <= s.shape[-1]:
        raise ValueError(f"k: found {k}, needed 1 to {s.shape[-1]} (the number of windows)")
    return s.topk(k, dim=-1).values.mean(-1)


class WindowPrototypes(PrototypeLayer):
    """Prototypes that are windows of ``window`` steps of an F-channel sequence.

    Args:
        channels: F.
        window: W; the whole sequence makes a global prototype with one window.
        class_identity: ``[P, C]``.
        pooling: how similarities of the windows become one: "mean", "max" or "topk".
        k: number of windows of "topk".

    Shapes:
        features ``[N, F, 1, T]`` -> similarities ``[N, P]``.

    Raises:
        ValueError: a window below 1, unknown pooling.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import WindowPrototypes, prototype_class_matrix
        >>> layer = WindowPrototypes(16, 3, prototype_class_matrix(4, 2))
        >>> layer(torch.randn(5, 16, 1, 32)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        channels: int,
        window: int,
        class_identity: Shaped[Tensor, "P C"],
        *,
        pooling: Pooling = "mean",
        k: int = 5,
    ) -> None:
        if window < 1:
            raise ValueError(f"window: found {window}, needed at least 1 step")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling: found {pooling!r}, needed one of {get_args(Pooling)}")
        super().__init__((channels, 1, window), class_identity)
        self.window, self.pooling, self.k = window, pooling, k

    def forward(self, features: Float[Tensor, "N F 1 T"]) -> Float[Tensor, "N P"]:
        """Pooled similarity of every sample to every prototype."""
        if self.pooling == "mean":
            return mean_window_similarity(features, self.prototypes)
        return pool_windows(window_similarity(features, self.prototypes), self.pooling, self.k)

    def match(self, features: Tensor, active: Int[Tensor, " A"]) -> Float[Tensor, "n A K"]:
        """See :class:`PrototypeLayer`; one position per window."""
        return window_similarity(features, self.prototypes[active])

    def take(self, features: Tensor, rows: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Tensor:
        """See :class:`PrototypeLayer`."""
        steps = positions[:, None] + torch.arange(self.window, device=positions.device)
        picked = features[rows].squeeze(2)
        return torch.gather(picked, 2, steps.unsqueeze(1).expand(-1, picked.shape[1], -1)).unsqueeze(2)

    def extra_repr(self) -> str:
        """Sizes and pooling."""
        return f"{super().extra_repr()}, pooling={self.pooling}"
