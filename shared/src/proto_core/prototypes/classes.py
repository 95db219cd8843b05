"""Which prototype stands for which class, and the classifier weights that follow from it.

Source: ProtoECGNet (arXiv 2504.08713); class-major order is also that of ProtoPNet and ST-ProtoPNet.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["check_class_identity", "check_identity_on_cpu", "init_classifier_weight", "prototype_class_matrix"]


def prototype_class_matrix(num_classes: int, per_class: int, per_pair: int = 0) -> Float[Tensor, "P C"]:
    """Class identity of prototypes in class-major order, then class pairs in lexicographic order.

    Args:
        num_classes: number of classes C, at least 1.
        per_class: prototypes of each single class.
        per_pair: prototypes of each pair of classes; the row of such a prototype has two ones.

    Returns:
        ``[P, C]`` float, 1 where prototype p stands for class c; ``P = per_class*C + per_pair*C*(C-1)/2``.

    Raises:
        ValueError: a negative count, no class, or no prototype at all.

    Example:
        >>> from proto_core.prototypes import prototype_class_matrix
        >>> prototype_class_matrix(2, 1, per_pair=1).tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    if num_classes < 1 or per_class < 0 or per_pair < 0:
        raise ValueError(
            f"needed num_classes >= 1 and per_class, per_pair >= 0, found {num_classes}, {per_class}, {per_pair}"
        )
    single = torch.eye(num_classes).repeat_interleave(per_class, dim=0)
    pairs = torch.tensor(list(combinations(range(num_classes), 2)), dtype=torch.long).reshape(-1, 2)
    double = torch.zeros(len(pairs), num_classes).scatter_(1, pairs, 1.0).repeat_interleave(per_pair, dim=0)
    identity = torch.cat([single, double])
    if len(identity) == 0:
        raise ValueError(f"no prototype: per_class={per_class}, per_pair={per_pair} with {num_classes} classes")
    return identity


def check_class_identity(class_identity: Tensor) -> None:
    """Refuse a class identity that is not ``[P, C]`` or holds a prototype without a class.

    Raises:
        ValueError: names the shape found, or the first prototype without a class.
    """
    if class_identity.ndim != 2:
        raise ValueError(f"class_identity: found shape {tuple(class_identity.shape)}, needed [P, C]")
    if bool(class_identity.any(dim=1).all()):
        return
    empty = (class_identity != 0).any(dim=1).logical_not().nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"class_identity: prototype {empty[0]} stands for no class ({len(empty)} such rows)")


def check_identity_on_cpu(class_identity: Tensor) -> None:
    """:func:`check_class_identity` where it costs no synchronisation; elsewhere layers have made it when built."""
    if not torch.compiler.is_compiling() and class_identity.device.type == "cpu":
        check_class_identity(class_identity)


def init_classifier_weight(
    prototype_class: Shaped[Tensor, "P C"], correct: float = 1.0, incorrect: float = -0.5
) -> Float[Tensor, "C P"]:
    """Classifier weight that starts at ``correct`` for own-class prototypes and ``incorrect`` elsewhere.

    Args:
        prototype_class: class identity ``[P, C]``.
        correct: weight from a prototype to each of its classes.
        incorrect: weight to all other classes.

    Returns:
        In the class identity's precision; float32 where that is bool or integer.

    Raises:
        ValueError: not ``[P, C]``, or a prototype without a class.

    Example:
        >>> from proto_core.prototypes import init_classifier_weight, prototype_class_matrix
        >>> init_classifier_weight(prototype_class_matrix(2, 1)).tolist()
        [[1.0, -0.5], [-0.5, 1.0]]
    """
    check_class_identity(prototype_class)
    own = prototype_class.T != 0
    dtype = prototype_class.dtype if prototype_class.is_floating_point() else torch.float32
    return torch.full(own.shape, incorrect, dtype=dtype, device=own.device).masked_fill_(own, correct)
