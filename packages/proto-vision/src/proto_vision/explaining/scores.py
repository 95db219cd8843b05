"""Scores of prototypes: how far a similarity falls, at its own place, when one property of the image is changed.

Source: arXiv 2011.02863, section 3. Own definition: :func:`redundancy`, for which the paper gives no formula. A
prototype whose similarities add up to nothing has no global score (NaN) instead of a division by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from proto_core.precision import full_precision
from proto_vision.explaining.perturbations import CHARACTERISTICS, check_characteristics

__all__ = [
    "Generalisation",
    "LocalScores",
    "explain",
    "generalisation_test",
    "global_scores",
    "local_scores",
    "redundancy",
    "weighted_mean",
]


class LocalScores(NamedTuple):
    """What each change does to each prototype in each image.

    Attributes:
        delta: ``[N, Q, P]`` similarity lost at the best place of the original image; negative: gained.
        similarity: ``[N, P]`` of the original image at that place, its highest.
        location: ``[N, P]`` int64, the place, counted row by row.
    """

    delta: Tensor
    similarity: Tensor
    location: Tensor


class Generalisation(TypedDict):
    """Scores of one property over prototypes, on two sets of images.

    Attributes:
        mean_a: over the prototypes.
        mean_b: of the other set.
        std_a: with one degree of freedom less than there are prototypes.
        std_b: of the other set.
        welch_t: statistic of Welch's test of equal means (unequal variances).
        welch_p: its two-sided p-value; small: the scores of the sets differ.
    """

    mean_a: float
    mean_b: float
    std_a: float
    std_b: float
    welch_t: float
    welch_p: float


def local_scores(maps: Float[Tensor, "N P h w"], perturbed_maps: Float[Tensor, "N Q P h w"]) -> LocalScores:
    """``delta = s(x)[l*] - s(x^q)[l*]`` with ``l*`` the best place of the ORIGINAL image, also in the changed one.

    Args:
        maps: similarities of the images; the first of equal places counts.
        perturbed_maps: of their changed versions.

    Raises:
        ValueError: shapes that do not fit, no image, an empty axis, NaN.

    Source:
        arXiv 2011.02863, equation of the local score.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import local_scores
        >>> maps = torch.tensor([[[[1.0, 5.0]]]])
        >>> local_scores(maps, torch.tensor([[[[[9.0, 3.0]]]]])).delta
        tensor([[[2.]]])
    """
    fits = maps.ndim == 4 and perturbed_maps.ndim == 5 and maps.numel() > 0 and perturbed_maps.numel() > 0
    if not fits or perturbed_maps.shape != (len(maps), perturbed_maps.shape[1], *maps.shape[1:]):
        shapes = f"{tuple(maps.shape)} and {tuple(perturbed_maps.shape)}"
        raise ValueError(f"maps, perturbed_maps: found shapes {shapes}, needed [N, P, h, w] and [N, Q, P, h, w]")
    for name, values in (("maps", maps), ("perturbed_maps", perturbed_maps)):
        if bool(values.isnan().any()):
            raise ValueError(f"{name}: found NaN, needed similarities")
    clean, changed = full_precision(maps).flatten(2), full_precision(perturbed_maps).flatten(3)
    location = clean.argmax(2)
    similarity = clean.gather(2, location[:, :, None])[:, :, 0]
    places = location[:, None, :, None].expand(-1, changed.shape[1], -1, 1)
    return LocalScores(similarity[:, None] - changed.gather(3, places)[..., 0], similarity, location)


def global_scores(delta: Float[Tensor, "N Q P"], similarity: Float[Tensor, "N P"]) -> Float[Tensor, "P Q"]:
    """Mean of the local scores over images, weighted by the original similarity: images like the prototype count most.

    Similarities that may be below zero (cosines) can add up to nothing: a prototype whose sum is nearer to zero than
    1e-12 gets NaN.

    Args:
        delta: of :func:`local_scores`, over all training images of all classes.
        similarity: likewise.

    Raises:
        ValueError: shapes that do not fit, no image.

    Source:
        arXiv 2011.02863, equation of the global score.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import global_scores
        >>> global_scores(torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([[3.0], [1.0]]))
        tensor([[2.]])
    """
    if delta.ndim != 3 or len(delta) == 0 or similarity.shape != (len(delta), delta.shape[2]):
        shapes = f"{tuple(delta.shape)} and {tuple(similarity.shape)}"
        raise ValueError(f"delta, similarity: found shapes {shapes}, needed [N, Q, P] and [N, P] with N at least 1")
    weights = full_precision(similarity)
    return weighted_mean((full_precision(delta) * weights[:, None]).sum(0).T, weights.sum(0))


def weighted_mean(total: Float[Tensor, "P Q"], weight: Float[Tensor, "P"]) -> Float[Tensor, "P Q"]:
    """``total / weight``, NaN where the weight is nearer to zero than 1e-12."""
    known = weight.abs() >= 1e-12
    return torch.where(known, total.T / torch.where(known, weight, 1), torch.nan).T


def redundancy(scores: Float[Tensor, "P Q"]) -> Float[Tensor, "P P"]:
    """Euclidean distances between the global scores of prototypes; 0 on the diagonal.

    Two prototypes of a class that look alike and have about the same scores carry the same concept. The distance is
    our own definition.

    Raises:
        ValueError: scores that are no matrix.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import redundancy
        >>> redundancy(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0., 5.],
                [5., 0.]])
    """
    if scores.ndim != 2:
        raise ValueError(f"scores: found shape {tuple(scores.shape)}, needed [P, Q]")
    scores = full_precision(scores)
    return torch.cdist(scores, scores, compute_mode="donot_use_mm_for_euclid_dist")


def explain(
    score_row: Float[Tensor, "Q"] | Sequence[float],
    k: int | None = None,
    *,
    characteristics: Sequence[str] = CHARACTERISTICS,
) -> list[tuple[str, float]]:
    """The properties that matter to a prototype, from high to low; unknown scores (NaN) come last.

    Args:
        score_row: local or global scores of one prototype: one for each of ``characteristics``, or all six, of which
            ``characteristics`` names those wanted (the paper has the first five).
        k: how many at most; ``None``: all.
        characteristics: what the scores are of.

    Raises:
        ValueError: another number of scores, k below 1, an unknown characteristic.

    Example:
        >>> from proto_vision.explaining import explain
        >>> explain([0.25, 0.5, 2.0, 1.0, 0.75, 0.0], k=2)
        [('hue', 2.0), ('shape', 1.0)]
    """
    names = check_characteristics(characteristics)
    row = torch.as_tensor(score_row).detach().double()
    if row.ndim == 1 and len(row) == len(CHARACTERISTICS) > len(names):
        row = row[[CHARACTERISTICS.index(name) for name in names]]
    if row.shape != (len(names),):
        raise ValueError(f"score_row: found shape {tuple(row.shape)}, needed {len(names)} scores: {list(names)}")
    if k is not None and k < 1:
        raise ValueError(f"k: found {k}, needed at least 1")
    found = sorted(zip(names, row.tolist()), key=lambda item: (item[1] != item[1], -item[1]))
    return found[:k]


def generalisation_test(
    scores_a: Float[Tensor, "P Q"],
    scores_b: Float[Tensor, "others Q"],
    *,
    characteristics: Sequence[str] = CHARACTERISTICS,
) -> dict[str, Generalisation]:
    """Whether global scores of two sets of images agree: their means, deviations and Welch's test, per property.

    Prototypes without a score (NaN) are left out. With fewer than two left, deviation and test are NaN.

    Args:
        scores_a: such as those of the training images.
        scores_b: such as those of the test images.
        characteristics: what the columns are.

    Raises:
        ValueError: scores that are no matrix with a column for each characteristic.

    Source:
        arXiv 2011.02863, section 4; ``scipy.stats.ttest_ind``.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import generalisation_test
        >>> a = torch.tensor([[1.0], [2.0], [3.0]])
        >>> found = generalisation_test(a, a + 1, characteristics=("hue",))["hue"]
        >>> found["mean_a"], found["mean_b"], round(found["welch_t"], 4)
        (2.0, 3.0, -1.2247)
    """
    names = check_characteristics(characteristics)
    for argument, scores in (("scores_a", scores_a), ("scores_b", scores_b)):
        if scores.ndim != 2 or scores.shape[1] != len(names):
            raise ValueError(f"{argument}: found shape {tuple(scores.shape)}, needed [P, {len(names)}]")
    a, b = (scores.detach().double().cpu().numpy() for scores in (scores_a, scores_b))
    results: dict[str, Generalisation] = {}
    for q, name in enumerate(names):
        one, two = (column[np.isfinite(column)] for column in (a[:, q], b[:, q]))
        enough = min(len(one), len(two)) > 1
        with np.errstate(invalid="ignore", divide="ignore"):
            test = stats.ttest_ind(one, two, equal_var=False) if enough else (np.nan, np.nan)
        results[name] = {
            "mean_a": float(one.mean()) if len(one) else np.nan,
            "mean_b": float(two.mean()) if len(two) else np.nan,
            "std_a": float(one.std(ddof=1)) if len(one) > 1 else np.nan,
            "std_b": float(two.std(ddof=1)) if len(two) > 1 else np.nan,
            "welch_t": float(test[0]),
            "welch_p": float(test[1]),
        }
    return results
