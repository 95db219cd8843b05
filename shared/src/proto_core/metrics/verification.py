"""Verification: are two samples of one identity? Rates, thresholds, and templates of several media.

Definitions of UNPG (2022, arXiv 2203.11593), whose authors take TAR at the nearest point of the ROC curve, which may
lie above the rate asked for; ``mode="upper"`` never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from sklearn.metrics import roc_curve
from torch import Tensor

from proto_core.metrics.fold import SampleLists
from proto_core.metrics.ranking import nearest
from proto_core.precision import unit_vectors

__all__ = [
    "VerificationMetrics",
    "best_threshold_accuracy",
    "equal_error_rate",
    "rank1_accuracy",
    "tar_at_far",
    "template_features",
]


def tar_at_far(scores: Any, labels: Any, fars: Any, mode: str = "nearest") -> Float[Tensor, "F"]:
    """True accept rate at the false accept rates asked for.

    ``nearest``: of the points of scikit-learn's ``roc_curve`` (collinear points dropped) the one whose rate is nearest,
    the larger TAR on ties. ``upper``: the largest TAR over all thresholds with a false accept rate of at most that.

    Args:
        scores: ``[L]``, higher means more alike.
        labels: ``[L]``, 1 for pairs of one identity, 0 otherwise.
        fars: rates in [0, 1].
        mode: ``"nearest"`` or ``"upper"``.

    Returns:
        float64, one per rate.

    Raises:
        ValueError: shapes that do not fit, NaN, labels of one class only, a rate outside [0, 1], an unknown mode.

    Example:
        >>> from proto_core.metrics import tar_at_far
        >>> tar_at_far([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0], [0.1], mode="upper").tolist()
        [0.5]
    """
    scores, labels = _pairs(scores, labels)
    wanted = torch.as_tensor(fars, dtype=torch.float64).flatten()
    if not bool(((wanted >= 0) & (wanted <= 1)).all()):
        raise ValueError(f"fars: found {wanted.tolist()}, needed rates in [0, 1]")
    if mode == "nearest":
        curve = roc_curve(labels.numpy(), scores.numpy())
        false, true = (torch.from_numpy(rates) for rates in curve[:2])
        distance = (false - wanted.unsqueeze(1)).abs()
        return torch.where(distance == distance.amin(dim=1, keepdim=True), true, -1).amax(dim=1)
    if mode != "upper":
        raise ValueError(f"mode: found {mode!r}, needed 'nearest' or 'upper'")
    false, true = _rates(scores, labels)
    return true[torch.searchsorted(false, wanted, right=True) - 1]


def equal_error_rate(scores: Any, labels: Any) -> float:
    """Rate at which false accepts and false rejects are equally frequent, interpolated between thresholds.

    Thresholds are infinity and then the scores in falling order; at the first one where ``FPR - FNR >= 0`` the rate is
    read off, or interpolated linearly from the threshold before to where the difference is 0.

    Args:
        scores: ``[L]``, higher means more alike.
        labels: ``[L]``, 1 for pairs of one identity, 0 otherwise.

    Raises:
        ValueError: shapes that do not fit, NaN, labels of one class only.

    Example:
        >>> from proto_core.metrics import equal_error_rate
        >>> equal_error_rate([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
        0.5
    """
    false, true = _rates(*_pairs(scores, labels))
    gap = false - (1 - true)
    k = int((gap >= 0).nonzero()[0])
    if gap[k] == 0:
        return float(false[k])
    share = -gap[k - 1] / (gap[k] - gap[k - 1])
    return float(false[k - 1] + share * (false[k] - false[k - 1]))


def best_threshold_accuracy(scores: Any, labels: Any) -> tuple[float, float]:
    """Highest accuracy of "alike if the score is at least t" with t among the scores, and the first such score.

    Args:
        scores: ``[L]``, higher means more alike; their order decides between equally good thresholds.
        labels: ``[L]``, 1 for pairs of one identity, 0 otherwise.

    Raises:
        ValueError: shapes that do not fit, NaN, labels of one class only.

    Example:
        >>> from proto_core.metrics import best_threshold_accuracy
        >>> best_threshold_accuracy([0.25, 0.5, 0.75], [0, 1, 1])
        (1.0, 0.5)
    """
    scores, labels = _pairs(scores, labels)
    alike, other = scores[labels == 1].sort().values, scores[labels == 0].sort().values
    right = len(alike) - torch.searchsorted(alike, scores) + torch.searchsorted(other, scores)
    best = int(right.argmax())
    return int(right[best]) / len(scores), float(scores[best])


def rank1_accuracy(
    query: Float[Tensor, "Q D"],
    query_ids: Int[Tensor, "Q"],
    gallery: Float[Tensor, "G D"],
    gallery_ids: Int[Tensor, "G"],
) -> float:
    """Share of queries whose nearest gallery row by cosine (the first of equals) has their identity.

    Raises:
        ValueError: shapes that do not fit, nothing to search, NaN.

    Example:
        >>> import torch
        >>> from proto_core.metrics import rank1_accuracy
        >>> rank1_accuracy(torch.tensor([[2.0, 0.1]]), torch.tensor([7]), torch.eye(2), torch.tensor([7, 8]))
        1.0
    """
    for name, ids, rows in [("query_ids", query_ids, query), ("gallery_ids", gallery_ids, gallery)]:
        if ids.shape != rows.shape[:1]:
            raise ValueError(f"{name}: found shape {tuple(ids.shape)}, needed ({rows.shape[0]},)")
    _, index = nearest(query, gallery, normalize=True)
    return float((gallery_ids[index[:, 0]] == query_ids).double().mean())


def template_features(
    features: Float[Tensor, "M D"], templates: Shaped[Tensor, "M"], medias: Shaped[Tensor, "M"]
) -> tuple[Float[Tensor, "T D"], Shaped[Tensor, "T"]]:
    """One vector per template: features averaged within each medium, summed over its media, divided by the norm.

    Args:
        features: raw, of images.
        templates: template of each image.
        medias: medium of each image; a number counts within its template.

    Returns:
        Features of norm 1, and the templates in rising order.

    Raises:
        ValueError: shapes that do not fit, no image.

    Example:
        >>> import torch
        >>> from proto_core.metrics import template_features
        >>> template_features(torch.tensor([[2.0], [4.0]]), torch.tensor([5, 5]), torch.tensor([0, 1]))
        (tensor([[1.]]), tensor([5]))
    """
    if features.ndim != 2 or len(features) == 0 or not templates.shape == medias.shape == features.shape[:1]:
        shapes = f"{tuple(features.shape)}, {tuple(templates.shape)}, {tuple(medias.shape)}"
        raise ValueError(f"features, templates, medias: found shapes {shapes}, needed [M, D], [M], [M]")
    ids, of_image = templates.unique(return_inverse=True)
    media, of_medium = torch.stack([of_image, medias.unique(return_inverse=True)[1]], dim=1).unique(
        dim=0, return_inverse=True
    )
    wide = features.double() if features.dtype == torch.float64 else features.float()
    sums = wide.new_zeros(len(media), wide.shape[1]).index_add_(0, of_medium, wide)
    counts = torch.bincount(of_medium, minlength=len(media)).unsqueeze(1)
    pooled = wide.new_zeros(len(ids), wide.shape[1]).index_add_(0, media[:, 0], sums / counts)
    return unit_vectors(pooled), ids


class VerificationMetrics(SampleLists):
    """TAR at false accept rates, equal error rate and best accuracy of all pairs seen; exact for any split and DDP.

    Args:
        fars: false accept rates.
        mode: see :func:`tar_at_far`.

    Raises:
        ValueError: a rate outside [0, 1]; on ``compute`` what :func:`tar_at_far` refuses.

    Example:
        >>> import torch
        >>> from proto_core.metrics import VerificationMetrics
        >>> metric = VerificationMetrics(fars=(0.5,))
        >>> metric.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))
        >>> metric.compute()["tar@0.5"]
        1.0
    """

    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, fars: Sequence[float] = (1e-4, 1e-3, 1e-2), mode: str = "upper", **kwargs: Any) -> None:
        super().__init__("scores", "labels", **kwargs)
        if not all(0 <= far <= 1 for far in fars):
            raise ValueError(f"fars: found {tuple(fars)}, needed rates in [0, 1]")
        if mode not in ("nearest", "upper"):
            raise ValueError(f"mode: found {mode!r}, needed 'nearest' or 'upper'")
        self.fars = tuple(fars)
        self.mode = mode

    def update(self, scores: Float[Tensor, "L"], labels: Shaped[Tensor, "L"]) -> None:
        """Add pairs."""
        if scores.ndim != 1 or scores.shape != labels.shape:
            raise ValueError(
                f"scores, labels: found shapes {tuple(scores.shape)} and {tuple(labels.shape)}, needed [L] both"
            )
        self.scores.append(scores.detach())
        self.labels.append(labels.detach())

    def compute(self) -> dict[str, float]:
        """``tar@FAR`` for each rate, ``eer``, ``accuracy`` and its ``threshold``."""
        scores, labels = self.joined()
        accuracy, threshold = best_threshold_accuracy(scores, labels)
        rates = tar_at_far(scores, labels, self.fars, self.mode).tolist()
        found = {f"tar@{far:g}": rate for far, rate in zip(self.fars, rates)}
        return found | {"eer": equal_error_rate(scores, labels), "accuracy": accuracy, "threshold": threshold}


def _pairs(scores: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Scores in float64 and labels on the host, checked."""
    # plain numbers are float64, which as_tensor alone would cut to float32
    scores = (
        scores.detach().cpu().double() if isinstance(scores, Tensor) else torch.as_tensor(scores, dtype=torch.float64)
    )
    labels = torch.as_tensor(labels).detach().cpu()
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores, labels: found shapes {tuple(scores.shape)} and {tuple(labels.shape)}, needed [L] both"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: found {int(scores.isnan().sum())} NaN, needed numbers")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError("labels: found values other than 0 and 1")
    labels = labels.long()
    if int(labels.sum()) in (0, len(labels)):
        raise ValueError(f"labels: found {int(labels.sum())} of {len(labels)} pairs alike, needed both kinds")
    return scores, labels


def _rates(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """False and true accept rate at infinity and at every distinct score, falling."""
    order = scores.argsort(descending=True)
    scores, labels = scores[order], labels[order].double()
    last = torch.ones(len(scores), dtype=torch.bool)
    last[:-1] = scores[1:] != scores[:-1]
    true, false = labels.cumsum(0)[last], (1 - labels).cumsum(0)[last]
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, false / false[-1]]), torch.cat([zero, true / true[-1]])
