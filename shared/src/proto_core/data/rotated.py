"""A built-in set for metric learning: few informative dimensions, many of nuisance, and a rotation that mixes them.

It stands in where papers use images of birds, cars or faces: classes of the test half are not those of training, and
the raw distance is ruled by nuisance, so that a metric has to be learned.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

__all__ = ["rotated_classes"]


def rotated_classes(
    seed: int,
    classes: int,
    per_class: int,
    informative: int = 20,
    nuisance: int = 40,
    noise: float = 1.0,
    nuisance_scale: float = 1.0,
) -> tuple[Float32[np.ndarray, "N D"], Int64[np.ndarray, "N"]]:
    """Samples ``[mean of the class + noise N(0, I), nuisance_scale N(0, I)] Q`` with Q orthogonal; class means N(0, I).

    Args:
        seed: of ``numpy.random.default_rng``; drawn are, in this order, means, noise, nuisance, rotation.
        classes: number of classes.
        per_class: samples of each.
        informative: dimensions in which classes differ.
        nuisance: dimensions in which they do not.
        noise: standard deviation within a class.
        nuisance_scale: standard deviation of the nuisance.

    Returns:
        Samples in class order, ``D = informative + nuisance``, and their classes.

    Raises:
        ValueError: fewer than one class, sample or informative dimension, a negative number elsewhere.

    Example:
        >>> from proto_core.data import rotated_classes
        >>> x, y = rotated_classes(0, classes=3, per_class=2)
        >>> x.shape, y.tolist()
        ((6, 60), [0, 0, 1, 1, 2, 2])
    """
    for name, value in {"classes": classes, "per_class": per_class, "informative": informative}.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, needed at least 1")
    for name, size in {"nuisance": nuisance, "noise": noise, "nuisance_scale": nuisance_scale}.items():
        if size < 0:
            raise ValueError(f"{name}: found {size}, needed at least 0")
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes, informative))
    labels = np.repeat(np.arange(classes), per_class)
    told = means[labels] + noise * rng.normal(size=(len(labels), informative))
    untold = nuisance_scale * rng.normal(size=(len(labels), nuisance))
    width = informative + nuisance
    rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
    return (np.concatenate([told, untold], axis=1) @ rotation).astype(np.float32), labels.astype(np.int64)
