"""What a multi-label training set says about its labels: co-occurrence, positive weights, decision thresholds.

Co-occurrence and weights are those of ProtoECGNet (2025, arXiv 2504.08713). A class without a positive gets weight 1
where the authors' code gives infinity.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["choose_thresholds", "class_pos_weight", "label_cooccurrence"]


def label_cooccurrence(targets: Shaped[Tensor, "N C"]) -> Float[Tensor, "C C"]:
    """Jaccard co-occurrence ``n_ij / max(n_i + n_j - n_ij, 1e-6)`` of the labels of a training set.

    Args:
        targets: multi-hot.

    Returns:
        float64 for float64 targets, float32 otherwise. 1 on the diagonal, 0 there for a label that never occurs.

    Raises:
        ValueError: targets are not ``[N, C]`` of zeros and ones.

    Example:
        >>> import torch
        >>> from proto_core.data import label_cooccurrence
        >>> label_cooccurrence(torch.tensor([[1, 1], [1, 0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    labels = _multi_hot(targets)
    both = labels.T @ labels
    each = both.diagonal()
    either = each[:, None] + each[None, :] - both
    return (both / either.clamp_min(1e-6)).to(_dtype(targets))


def class_pos_weight(targets: Shaped[Tensor, "N C"]) -> Float[Tensor, "C"]:
    """Weight of each class's positives in the binary cross-entropy: ``(T - n_c) / n_c``.

    T is the number of label assignments (not of records), n_c the positives of class c. A class without a positive
    gets weight 1; a class that has all assignments (a label set with a single label) gets the formula's 0. Weights of
    rare classes can reach thousands.

    Args:
        targets: multi-hot.

    Returns:
        float64 for float64 targets, float32 otherwise.

    Raises:
        ValueError: targets are not ``[N, C]`` of zeros and ones.

    Example:
        >>> import torch
        >>> from proto_core.data import class_pos_weight
        >>> class_pos_weight(torch.tensor([[1, 1, 0], [1, 0, 0]]))
        tensor([0.5000, 2.0000, 1.0000])
    """
    positives = _multi_hot(targets).sum(dim=0)
    others = positives.sum() - positives
    return torch.where(positives > 0, others / positives.clamp_min(1), 1).to(_dtype(targets))


def choose_thresholds(scores: Float[Tensor, "N C"], targets: Shaped[Tensor, "N C"]) -> Float[Tensor, "C"]:
    """Per label the threshold that has the highest F1 on a validation fold; ``score >= threshold`` is a positive.

    All cuts between neighbouring scores are tried at once, by sorting. The threshold lies half-way between the scores
    on both sides of the best cut (half-way to 0 below the lowest score); of equally good cuts the one with fewer
    positives is taken.

    Args:
        scores: probabilities.
        targets: multi-hot.

    Returns:
        Thresholds in [0, 1]; 0.5 for a label without a positive or without a negative.

    Raises:
        ValueError: shapes that differ, scores outside [0, 1], targets other than 0 and 1.

    Example:
        >>> import torch
        >>> from proto_core.data import choose_thresholds
        >>> choose_thresholds(torch.tensor([[0.1], [0.2], [0.8]]), torch.tensor([[0], [1], [1]]))
        tensor([0.1500])
    """
    if scores.shape != targets.shape:
        raise ValueError(f"scores, targets: found shapes {tuple(scores.shape)} and {tuple(targets.shape)}, needed one")
    labels = _multi_hot(targets)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores: found values outside [0, 1], needed probabilities")
    if scores.dtype != torch.float64:
        scores = scores.float()
    if len(scores) == 0:
        return scores.new_full(scores.shape[1:], 0.5)
    ranked, order = scores.sort(dim=0, descending=True)
    true_positives = labels.gather(0, order).cumsum(dim=0)
    positives = labels.sum(dim=0)
    predicted = torch.arange(1, len(scores) + 1, device=scores.device, dtype=labels.dtype).unsqueeze(1)
    f1 = 2 * true_positives / (predicted + positives)
    below = torch.cat([ranked[1:], ranked.new_zeros(1, ranked.shape[1])])
    # no cut between equal scores; below the last one there always is
    possible = (ranked > below) | (predicted == len(scores))
    best = torch.where(possible, f1, -1).argmax(dim=0, keepdim=True)
    upper, lower = ranked.gather(0, best).squeeze(0), below.gather(0, best).squeeze(0)
    middle = lower + (upper - lower) / 2
    # the midpoint of two neighbouring floating-point numbers can be the lower one
    threshold = torch.where(middle > lower, middle, upper)
    return torch.where((positives > 0) & (positives < len(scores)), threshold, 0.5)


def _multi_hot(targets: Tensor) -> Tensor:
    if targets.ndim != 2:
        raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed [N, C]")
    if not ((targets == 0) | (targets == 1)).all():
        raise ValueError("targets: found values other than 0 and 1, needed multi-hot labels")
    return targets.double()


def _dtype(targets: Tensor) -> torch.dtype:
    return torch.float64 if targets.dtype == torch.float64 else torch.float32
