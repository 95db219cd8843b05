"""Verification: do two images show one identity? Scores of pairs, the figures of a fold or a list, and their curves.

Protocols of UNPG (2022, arXiv 2203.11593): pairs of images by cosine, templates of several media pooled first. Figures
are those of :mod:`proto_core.metrics.verification`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from proto_core.metrics import VerificationMetrics, rank1_accuracy
from proto_core.precision import unit_vectors

__all__ = ["FARS", "MOST_IMAGES", "all_pairs", "draw_curves", "first_and_rest", "pair_scores", "verification_figures"]

FARS = (1e-4, 1e-3, 1e-2)
"""False accept rates that figures are given at."""
MOST_IMAGES = 4096
"""Images of a fold that are compared with each other; of more, as many are taken, evenly over the fold."""


def pair_scores(embeddings: Float[Tensor, "N D"], first: Int[Tensor, "L"], second: Int[Tensor, "L"]) -> Tensor:
    """Cosines of pairs of rows.

    Args:
        embeddings: of any norm; a row of zeros has cosine 0 with everything.
        first: row of each pair's one image.
        second: row of the other.

    Returns:
        ``[L]`` float32.

    Raises:
        ValueError: another number of first than of second rows.

    Example:
        >>> import torch
        >>> from proto_vision.verification import pair_scores
        >>> pair_scores(torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), torch.tensor([1, 2]))
        tensor([1., 0.])
    """
    if first.shape != second.shape:
        raise ValueError(f"first, second: found shapes {tuple(first.shape)} and {tuple(second.shape)}, needed [L] both")
    unit = unit_vectors(embeddings.float())
    size = max(1, 2**24 // max(unit.shape[1], 1))
    parts = [(unit[a] * unit[b]).sum(dim=1) for a, b in zip(first.split(size), second.split(size))]
    return torch.cat(parts) if parts else unit.new_zeros(0)


def all_pairs(
    embeddings: Float[Tensor, "N D"], targets: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "L"], Int[Tensor, "L"]]:
    """Cosines of every two rows, each pair once, and 1 where they are of one identity, else 0.

    Example:
        >>> import torch
        >>> from proto_vision.verification import all_pairs
        >>> all_pairs(torch.eye(3), torch.tensor([4, 4, 5]))
        (tensor([0., 0., 0.]), tensor([1, 0, 0]))
    """
    unit = unit_vectors(embeddings.float())
    one, two = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    return (unit @ unit.T)[one, two], (targets[one] == targets[two]).long()


def first_and_rest(targets: Shaped[Tensor, "N"]) -> tuple[Int[Tensor, "G"], Int[Tensor, "Q"]]:
    """Rows of the first sample of each identity (a gallery), and all others (its queries).

    Example:
        >>> import torch
        >>> from proto_vision.verification import first_and_rest
        >>> first_and_rest(torch.tensor([3, 3, 1, 3]))
        (tensor([0, 2]), tensor([1, 3]))
    """
    order = targets.argsort(stable=True)
    ordered = targets[order]
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return order[begins].sort().values, order[~begins].sort().values


def verification_figures(
    embeddings: Float[Tensor, "N D"],
    targets: Int[Tensor, "N"],
    gallery: Float[Tensor, "G D"] | None = None,
    gallery_targets: Int[Tensor, "G"] | None = None,
    *,
    fars: Sequence[float] = FARS,
    mode: str = "upper",
    most: int = MOST_IMAGES,
) -> dict[str, float]:
    """Equal error rate, TAR at false accept rates and best accuracy over all pairs of a fold, and rank-1.

    With a gallery, pairs are of one query and one gallery image; without, every two images of the fold make one, and
    for rank-1 the first image of each identity is the gallery of all others.

    Args:
        embeddings: of the fold, or of its queries.
        targets: their identities.
        gallery: what queries are compared with.
        gallery_targets: its identities.
        fars: false accept rates.
        mode: see :func:`proto_core.metrics.tar_at_far`.
        most: of more images in one of the sets, as many are taken, evenly over it.

    Returns:
        ``eer``, ``tar@FAR``, ``accuracy`` and its ``threshold``, ``rank1``. What is not defined is NaN: all but rank-1
        without a pair of one and one of two identities, rank-1 without a second image of any.

    Example:
        >>> import torch
        >>> from proto_vision.verification import verification_figures
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> found = verification_figures(x, torch.tensor([0, 0, 1, 1]), fars=(0.1,))
        >>> {name: round(value, 3) for name, value in found.items()}
        {'eer': 0.0, 'tar@0.1': 1.0, 'accuracy': 1.0, 'threshold': 0.994, 'rank1': 1.0}
    """
    embeddings, targets = _thinned(embeddings, targets, most)
    metric = VerificationMetrics(fars, mode, sync_on_compute=False)  # the fold is that of all ranks already
    if gallery is None or gallery_targets is None:
        scores, labels = all_pairs(embeddings, targets)
        known, asked = first_and_rest(targets)
        query, query_ids, gallery, gallery_targets = (
            *(embeddings[asked], targets[asked]),
            *(embeddings[known], targets[known]),
        )
    else:
        query, query_ids = embeddings, targets
        gallery, gallery_targets = _thinned(gallery, gallery_targets, most)
        scores = (unit_vectors(query.float()) @ unit_vectors(gallery.float()).T).flatten()
        labels = (query_ids.unsqueeze(1) == gallery_targets).long().flatten()
    found = dict.fromkeys(["eer", *(f"tar@{far:g}" for far in fars), "accuracy", "threshold"], math.nan)
    if 0 < int(labels.sum()) < len(labels):
        metric.update(scores, labels)
        found |= metric.compute()
    rank1 = rank1_accuracy(query, query_ids, gallery, gallery_targets) if len(query) else math.nan
    return found | {"rank1": rank1}


def _thinned(embeddings: Tensor, targets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """All rows, or ``most`` of them, evenly spread."""
    if len(targets) <= most:
        return embeddings, targets
    rows = torch.arange(most, device=targets.device) * len(targets) // most
    return embeddings[rows], targets[rows]


def draw_curves(scores: Any, labels: Any, file: IO[Any], file_format: str) -> None:
    """Draw the ROC curve over a logarithmic false accept rate, and the DET curve on normal-deviate axes.

    Args:
        scores: ``[L]`` of pairs, higher means more alike.
        labels: ``[L]``, 1 for pairs of one identity, 0 otherwise, both present.
        file: binary file to write to.
        file_format: ``"png"`` or ``"svg"``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.stats import norm
    from sklearn.metrics import roc_curve

    labels = np.asarray(labels)
    false, true, _ = roc_curve(labels, np.asarray(scores, dtype=np.float64), drop_intermediate=True)
    same, other = int(labels.sum()), int(len(labels) - labels.sum())
    figure = Figure(figsize=(10.5, 4.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    least = 10 ** math.floor(math.log10(0.5 / other))
    left.plot(false.clip(min=least), true, drawstyle="steps-post", color="#1f5fa8")
    left.set(xscale="log", xlim=(least, 1), ylim=(0, 1.02), xlabel="false accept rate", ylabel="true accept rate")
    left.set_title(f"ROC: {same:,} pairs of one identity, {other:,} of two", fontsize=10)
    low_false, low_miss = 0.5 / other, 0.5 / same
    x, y = norm.ppf(false.clip(low_false, 1 - low_false)), norm.ppf((1 - true).clip(low_miss, 1 - low_miss))
    right.plot(x, y, color="#1f5fa8")
    rates = (1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
    ticks = [rate for rate in rates if rate >= min(low_false, low_miss)]
    names = [f"{100 * rate:g} %" for rate in ticks]
    ends = norm.ppf([min(low_false, low_miss), 0.99])
    right.plot(ends, ends, color="#9aa5b1", linewidth=0.8, linestyle="--", label="equal error rate")
    right.set_xticks(norm.ppf(ticks), names, fontsize=8)
    right.set_yticks(norm.ppf(ticks), names, fontsize=8)
    right.set(xlim=ends, ylim=ends, xlabel="false accept rate", ylabel="false reject rate")
    right.set_title("DET, normal-deviate axes", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(color="#e3e7ec", linewidth=0.6)
    figure.savefig(file, format=file_format)
