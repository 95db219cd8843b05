"""What a trained ProtoGCD says beyond clusters: how unlike everything an image is, and how many classes there are.

Source of the outlier scores: arXiv 2504.03755, section 4.5, and the authors' code. The number of classes: the paper's
formula could not be established. :func:`prototype_score` is a criterion of this project's own, the accuracy on labelled
samples plus a simplified silhouette of the prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from proto_core.checks import check_option, check_positive
from proto_core.metrics import cluster_accuracy
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_vision.protogcd.pseudo_labels import confidence

__all__ = ["estimate_num_classes", "outlier_score", "prototype_score"]


def _margin(probabilities: Tensor) -> Tensor:
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return second - first


_KINDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "msp": lambda logits, t, energy: -(logits / t).softmax(1).amax(1),
    "mls": lambda logits, t, energy: -logits.amax(1),
    "energy": lambda logits, t, energy: -energy * (logits / energy).logsumexp(1),
    "xent": lambda logits, t, energy: logits.mean(1) / t - (logits / t).logsumexp(1),
    "proto": lambda logits, t, energy: -confidence((logits / t).softmax(1)),
    "margin": lambda logits, t, energy: _margin((logits / t).softmax(1)),
}


def outlier_score(
    logits: Float[Tensor, "N K"], kind: str = "msp", *, temperature: float = 0.1, energy_temperature: float = 1.0
) -> Float[Tensor, "N"]:
    """How unlike every class an image is; higher means more so.

    Args:
        logits: cosine similarities, without temperature.
        kind: with ``p = softmax(l / tau)``: ``"msp"`` (``-max p``), ``"mls"`` (``-max l``), ``"energy"`` (``-T log sum
            exp(l / T)``), ``"xent"`` (``mean(l) / tau - log sum exp(l / tau)``), ``"proto"`` (``-p_(1) / (p_(2) +
            1e-6)``) or ``"margin"`` (``p_(2) - p_(1)``).
        temperature: tau.
        energy_temperature: T.

    Raises:
        ValueError: an unknown kind, one class for ``"proto"`` or ``"margin"``, a temperature that is not positive.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import outlier_score
        >>> outlier_score(torch.tensor([[1.0, 0.0], [0.2, 0.1]]), "mls")
        tensor([-1.0000, -0.2000])
    """
    check_option("kind", kind, *_KINDS)
    check_positive(temperature=temperature, energy_temperature=energy_temperature)
    if logits.ndim != 2 or logits.shape[1] < 1 + (kind in ("proto", "margin")):
        found = f"shape {tuple(logits.shape)} for kind {kind!r}"
        raise ValueError(f"logits: found {found}, needed [N, K] with K at least {1 + (kind in ('proto', 'margin'))}")
    return _KINDS[kind](full_precision(logits), temperature, energy_temperature)


def prototype_score(
    features: Float[Tensor, "N D"],
    prototypes: Float[Tensor, "K D"],
    labels: Int[Tensor, "N"],
    labelled: Shaped[Tensor, "N"],
) -> float:
    """How well K prototypes fit, to compare numbers of them: accuracy on labelled samples + simplified silhouette.

    The first is :func:`~proto_core.metrics.cluster_accuracy` of the labelled samples, each in the cluster of its
    nearest prototype by cosine among all K. The second is the mean over all samples of ``(b - a) / max(a, b, 1e-12)``,
    a and b the cosine distances to the nearest and to the second prototype. This is a criterion of this project's own.

    Args:
        features: of labelled and unlabelled samples.
        prototypes: of any length.
        labels: of the labelled samples; the others are not looked at.
        labelled: bool or 0/1.

    Returns:
        At most 2; higher is better.

    Raises:
        ValueError: shapes that do not fit, fewer than two prototypes, no labelled sample.

    Example:
        >>> import torch
        >>> from proto_vision.protogcd import prototype_score
        >>> prototype_score(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([True, False]))
        2.0
    """
    count = len(features)
    shapes = [tuple(part.shape) for part in (features, prototypes, labels, labelled)]
    fits = features.ndim == prototypes.ndim == 2 and features.shape[1] == prototypes.shape[1]
    if not fits or labels.shape != (count,) or labelled.shape != (count,):
        raise ValueError(
            f"features, prototypes, labels, labelled: found shapes {shapes}, needed [N, D], [K, D], [N] and [N]"
        )
    if len(prototypes) < 2:
        raise ValueError(f"prototypes: found {len(prototypes)}, needed 2 or more")
    known = labelled.bool()
    if not bool(known.any()):
        raise ValueError("labelled: found no labelled sample, needed at least one")
    x = unit_vectors(features)
    with no_autocast(x):
        cosine = x @ unit_vectors(prototypes).to(x).T
    places, near = cosine.argmax(1), cosine.topk(2, dim=1).values
    a, b = 1 - near[:, 0], 1 - near[:, 1]
    silhouette = (b - a) / torch.maximum(a, b).clamp_min(1e-12)
    accuracy = cluster_accuracy(labels[known], places[known])
    assert isinstance(accuracy, float)
    return accuracy + float(silhouette.mean())


def estimate_num_classes(scores: Mapping[int, float]) -> int:
    """The number of classes with the best score; the smaller one on a tie.

    Args:
        scores: number of classes -> :func:`prototype_score` of a network trained with as many prototypes.

    Raises:
        ValueError: nothing to choose from, or a score that is no number.

    Example:
        >>> from proto_vision.protogcd import estimate_num_classes
        >>> estimate_num_classes({8: 1.2, 10: 1.4, 9: 1.4})
        9
    """
    if not scores:
        raise ValueError("scores: found none, needed one number of classes at least")
    if wrong := [k for k, score in scores.items() if math.isnan(score)]:
        raise ValueError(f"scores: found NaN for {wrong}, needed numbers")
    return min(scores, key=lambda k: (-scores[k], k))
