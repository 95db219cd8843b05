"""How uncertain an explanation by random prototypes is: overlap of distances, and distance beyond the known.

Source: arXiv 2403.13740, section 4. The uncertainty of the prediction is in :mod:`proto_core.metrics`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proto_core.checks import CACHED, check_option, check_positive, readable
from proto_core.precision import full_precision

__all__ = ["explanatory_epistemic_uncertainty", "overlap_index"]


@torch.no_grad()
def overlap_index(
    distances: Float[Tensor, "N C S"],
    predicted: Int[Tensor, "N"],
    num_points: int = 1000,
    max_margin: float = 10.0,
    min_margin: float = 10.0,
) -> Float[Tensor, "N"]:
    """Largest overlap of the predicted class's distribution of distances with another class's (aleatoric).

    Densities are Gaussian kernel estimates of the S distances (Scott's rule). The overlap with class j is the integral
    of the smaller density by the midpoint rule on ``[-min_margin, max_s d_j + max_margin]``.

    Args:
        distances: to S samples of each class's prototype.
        predicted: classes.
        num_points: cells of the midpoint rule.
        max_margin: what the interval has beyond the largest distance.
        min_margin: what it has below 0.

    Returns:
        In [0, 1] up to the rule's error. A class whose distances are all equal has no density: its overlap is 0, with
        a warning.

    Raises:
        ValueError: another shape, fewer than two samples, a class outside 0..C-1, no point.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import overlap_index
        >>> same, far = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([91.0, 92.0, 93.0])
        >>> overlap_index(torch.stack([torch.stack([same, same]), torch.stack([same, far])]), torch.tensor([0, 0]))
        tensor([1.0000, 0.0000])
    """
    if distances.ndim != 3 or distances.shape[2] < 2:
        raise ValueError(f"distances: found shape {tuple(distances.shape)}, needed [N, C, S] with S at least 2")
    if predicted.shape != distances.shape[:1] or predicted.is_floating_point() or predicted.dtype == torch.bool:
        found = f"{predicted.dtype} {tuple(predicted.shape)}"
        raise ValueError(f"predicted: found {found}, needed {len(distances)} integers")
    classes, samples = distances.shape[1:]
    if readable(predicted) and not bool(((predicted >= 0) & (predicted < classes)).all()):
        raise ValueError(f"predicted: found classes {predicted.unique().tolist()}, needed 0 to {classes - 1}")
    check_positive(num_points=num_points)
    if not len(distances):
        return full_precision(distances).sum(dim=(1, 2))
    distances = full_precision(distances)
    collapsed = distances.amax(2) == distances.amin(2)
    if bool(collapsed.any()):
        warnings.warn("distances: all of a class are equal, so that their overlap is 0", stacklevel=2)
    width = torch.where(collapsed, 1, distances.std(2)) * samples**-0.2
    upper = distances.amax(2) + max_margin
    step = (upper + min_margin) / num_points
    cells = torch.arange(num_points, device=distances.device, dtype=distances.dtype) + 0.5
    own = predicted.unsqueeze(1)
    at_once = max(1, CACHED.get(distances.device.type, CACHED["cpu"]) // (classes * num_points * samples))
    parts = []
    for rows in torch.arange(len(distances), device=distances.device).split(at_once):
        grid = cells * step[rows].unsqueeze(2) - min_margin
        chosen = distances[rows, predicted[rows]].unsqueeze(1)
        mine = _density(grid, chosen, width[rows].gather(1, own[rows]))
        parts.append(torch.minimum(_density(grid, distances[rows], width[rows]), mine).sum(2))
    overlap = torch.cat(parts) * step
    silent = collapsed | collapsed.gather(1, own) | (torch.arange(classes, device=own.device) == own)
    return overlap.masked_fill(silent, 0).amax(1)


def _density(
    grid: Float[Tensor, "n C G"], points: Float[Tensor, "n K S"], width: Float[Tensor, "n K"]
) -> Float[Tensor, "n C G"]:
    """Gaussian kernel estimate at the grid; K is C, or 1 for all."""
    apart = (grid.unsqueeze(3) - points.unsqueeze(2)) / width[:, :, None, None]
    return apart.square_().mul_(-0.5).exp_().mean(3) / (width.unsqueeze(2) * math.sqrt(2 * math.pi))


@torch.no_grad()
def explanatory_epistemic_uncertainty(
    train_distances: Sequence[Any],
    mean_distances: Float[Tensor, "N C"],
    reference: str = "distance",
    class_probabilities: Float[Tensor, "N C"] | None = None,
) -> Float[Tensor, "N"]:
    """Share of a class's training images that are nearer to its prototype than the image is (epistemic).

    Args:
        train_distances: for each class the mean distances of its training images to its own prototype, ``[T_c]``.
        mean_distances: of the images to every prototype, averaged over samples.
        reference: which class counts: ``"distance"`` that of the nearest prototype, ``"class"`` the most probable one.
        class_probabilities: for ``"class"``.

    Returns:
        In [0, 1]; strictly nearer images count.

    Raises:
        ValueError: an unknown reference, ``"class"`` without probabilities, shapes that do not fit, a class without a
            training distance.

    Example:
        >>> import torch
        >>> from proto_vision.prob_psenn import explanatory_epistemic_uncertainty
        >>> known = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0])]
        >>> explanatory_epistemic_uncertainty(known, torch.tensor([[3.0, 9.0], [9.0, 6.0]]))
        tensor([0.5000, 1.0000])
    """
    check_option("reference", reference, "distance", "class")
    if mean_distances.ndim != 2 or mean_distances.shape[1] != len(train_distances):
        found = f"{tuple(mean_distances.shape)} and {len(train_distances)} classes"
        raise ValueError(f"mean_distances, train_distances: found {found}, needed [N, C] and C")
    mean_distances = full_precision(mean_distances)
    if reference == "class":
        if class_probabilities is None:
            raise ValueError("class_probabilities: found none, needed [N, C] for reference 'class'")
        if class_probabilities.shape != mean_distances.shape:
            shape = tuple(class_probabilities.shape)
            raise ValueError(f"class_probabilities: found shape {shape}, needed {tuple(mean_distances.shape)}")
        nearest = class_probabilities.argmax(1)
    else:
        nearest = mean_distances.argmin(1)
    shares = []
    for c, values in enumerate(train_distances):
        known = torch.as_tensor(values).to(mean_distances).flatten().sort().values
        if not len(known):
            raise ValueError(f"train_distances: found none of class {c}, needed one at least")
        nearer = torch.searchsorted(known, mean_distances[:, c].contiguous())
        shares.append(nearer.to(mean_distances.dtype) / len(known))
    return torch.stack(shares, 1).gather(1, nearest.unsqueeze(1)).squeeze(1)
