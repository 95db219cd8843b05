"""The measures of salient object detection, from one pass over the maps.

As BASNet (arXiv 2101.04704) reports them; S-, E- and weighted F-measure as pysodmetrics 1.6 computes them, whose values
these equal. Unlike there a block without a pixel counts 0 in the S-measure instead of NaN. The relaxed boundary measure
takes the 4-neighbour cross for the erosion, the image's outside being background.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from proto_core.checks import check_positive

__all__ = ["SaliencyMetrics", "saliency_metrics"]

EPS = 2.0**-52
LEVELS = 256


def saliency_metrics(
    preds: Float[Tensor, "N H W"],
    masks: Shaped[Tensor, "N H W"],
    beta2: float = 0.3,
    rho: float = 3,
    threshold: float = 0.5,
) -> dict[str, Tensor]:
    """All measures of a set of maps of one size; :class:`SaliencyMetrics` goes through a data set in batches.

    Every map is first scaled to [0, 1] by its minimum and maximum (a constant one is left as it is). With the curves
    over the thresholds 255/255 .. 0 of the map cut to 256 levels:

    - ``mae``: mean absolute error.
    - ``precision_curve``, ``recall_curve``: ``[256]``, means over images.
    - ``maxf_dataset``: largest F of these two curves; ``maxf_image``: largest of the mean of the images' F curves.
    - ``adpf``, ``e_adaptive``: F- and E-measure at twice the map's mean.
    - ``s_measure``, ``e_max``, ``e_mean``, ``weighted_f``.
    - ``relaxed_precision``, ``relaxed_recall``, ``relaxed_f``: boundaries within ``rho`` pixels of each other.

    Args:
        preds: maps in [0, 1].
        masks: objects, true above 0.5.
        beta2: weight of recall in F.
        rho: tolerance of the boundary, in pixels.
        threshold: of the map, for its boundary.

    Returns:
        float64 scalars and the two curves.

    Raises:
        ValueError: shapes that differ or are not ``[N, H, W]``, no image, values outside [0, 1], settings out of range.

    Example:
        >>> import torch
        >>> from proto_core.metrics import saliency_metrics
        >>> mask = torch.zeros(1, 8, 8)
        >>> mask[0, 2:6, 2:6] = 1
        >>> found = saliency_metrics(mask, mask)
        >>> [round(found[name].item(), 3) for name in ("mae", "maxf_dataset", "s_measure", "relaxed_f")]
        [0.0, 1.0, 1.0, 1.0]
    """
    metric = SaliencyMetrics(beta2, rho, threshold).to(preds.device)
    metric.update(preds, masks)
    return metric.compute()


class SaliencyMetrics(Metric):
    """:func:`saliency_metrics` over all batches; exact for any split and under DDP, batches may differ in size.

    Args:
        beta2: weight of recall in F.
        rho: tolerance of the boundary, in pixels.
        threshold: of the map, for its boundary.

    Raises:
        ValueError: settings out of range; on ``update``: see :func:`saliency_metrics`; on ``compute``: no image.

    Example:
        >>> import torch
        >>> from proto_core.metrics import SaliencyMetrics
        >>> metric = SaliencyMetrics()
        >>> metric.update(torch.rand(2, 16, 16), torch.rand(2, 16, 16) > 0.5)
        >>> len(metric.compute())
        14
    """

    full_state_update = False
    images: Tensor

    SCALARS = ("mae", "adpf", "s_measure", "e_adaptive", "weighted_f", "relaxed_precision", "relaxed_recall")
    CURVES = ("precision", "recall", "f", "e")

    def __init__(self, beta2: float = 0.3, rho: float = 3, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive(beta2=beta2)
        if not rho >= 0:
            raise ValueError(f"rho: found {rho}, needed at least 0")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: found {threshold}, needed 0 to 1")
        self.beta2 = beta2
        self.rho = rho
        self.threshold = threshold
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in self.SCALARS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in self.CURVES:
            self.add_state(f"{name}_curve", torch.zeros(LEVELS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Float[Tensor, "N H W"], masks: Shaped[Tensor, "N H W"]) -> None:
        """Add maps and objects."""
        if preds.ndim != 3 or preds.shape != masks.shape or preds.numel() == 0:
            shapes = f"{tuple(preds.shape)} and {tuple(masks.shape)}"
            raise ValueError(f"preds, masks: found shapes {shapes}, needed [N, H, W] both, not empty")
        if not bool(((preds >= 0) & (preds <= 1)).all()):
            raise ValueError(
                f"preds: found values from {float(preds.min()):g} to {float(preds.max()):g}, needed 0 to 1"
            )
        p, g = _scaled(preds.detach().double()), masks > 0.5
        for name, values in self._of_images(p, g).items():
            setattr(self, name, getattr(self, name) + values.sum(dim=0))
        self.images += len(p)

    def compute(self) -> dict[str, Tensor]:
        """All measures."""
        if not bool(self.images > 0):
            raise ValueError("SaliencyMetrics: found no image, needed one at least")
        mean = {name: getattr(self, name) / self.images for name in self.SCALARS}
        curve = {name: getattr(self, f"{name}_curve") / self.images for name in self.CURVES}
        return {
            **mean,
            "maxf_dataset": self._f(curve["precision"], curve["recall"]).max(),
            "maxf_image": curve["f"].max(),
            "e_max": curve["e"].max(),
            "e_mean": curve["e"].mean(),
            "relaxed_f": self._f(mean["relaxed_precision"], mean["relaxed_recall"]),
            "precision_curve": curve["precision"],
            "recall_curve": curve["recall"],
        }

    def _f(self, precision: Tensor, recall: Tensor) -> Tensor:
        both = precision * recall
        below = self.beta2 * precision + recall
        return torch.where(both > 0, (1 + self.beta2) * both / torch.where(below > 0, below, 1), 0)

    def _of_images(self, p: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Each measure of each image, ``[N]`` or ``[N, 256]``."""
        hits, found = _counts_by_threshold(p, g)
        inside = g.sum(dim=(1, 2)).double().unsqueeze(1)
        size = float(g[0].numel())
        precision, recall = hits / found.clamp_min(1), hits / inside.clamp_min(1)
        adaptive = p >= (2 * p.mean(dim=(1, 2), keepdim=True)).clamp_max(1)
        seen = adaptive.sum(dim=(1, 2)).double().unsqueeze(1)
        met = (adaptive & g).sum(dim=(1, 2)).double().unsqueeze(1)
        relaxed = _relaxed_boundary(p >= self.threshold, g, self.rho)
        return {
            "mae": (p - g.double()).abs().mean(dim=(1, 2)),
            "precision_curve": precision,
            "recall_curve": recall,
            "f_curve": self._f(precision, recall),
            "e_curve": _e_measure(hits, found, inside, size),
            "adpf": self._f(met / seen.clamp_min(1), met / inside.clamp_min(1))[:, 0],
            "e_adaptive": _e_measure(met, seen, inside, size)[:, 0],
            "s_measure": _s_measure(p, g),
            "weighted_f": _weighted_f(p, g),
            "relaxed_precision": relaxed[0],
            "relaxed_recall": relaxed[1],
        }


def _scaled(p: Float[Tensor, "N H W"]) -> Float[Tensor, "N H W"]:
    low, high = p.amin(dim=(1, 2), keepdim=True), p.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (p - low) / torch.where(high > low, high - low, 1), p)


def _counts_by_threshold(p: Tensor, g: Tensor) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Object pixels, and all pixels, at or above each level, from 255 down to 0."""
    levels = (255 * p).floor().long().clamp_(0, LEVELS - 1).flatten(1)
    empty = torch.zeros(len(p), LEVELS, dtype=torch.float64, device=p.device)
    counts = empty.scatter_add(1, levels, torch.ones_like(levels, dtype=torch.float64))
    hits = empty.scatter_add(1, levels, g.flatten(1).double())
    return hits.flip(1).cumsum(1), counts.flip(1).cumsum(1)


def _e_measure(hits: Tensor, found: Tensor, inside: Tensor, size: float) -> Tensor:
    """Of binary maps, from counts alone: agreement takes one value for each of the four kinds of pixels."""
    share_found, share_inside = found / size, inside / size
    total = torch.zeros_like(hits)
    for b, g, count in (
        (1, 1, hits),
        (1, 0, found - hits),
        (0, 1, inside - hits),
        (0, 0, size - found - inside + hits),
    ):
        db, dg = b - share_found, g - share_inside
        agreement = 2 * db * dg / (db.square() + dg.square() + EPS)
        total = total + count * (agreement + 1).square() / 4
    total = torch.where(inside == 0, size - found, torch.where(inside == size, found, total))
    return total / (size - 1 + EPS)


def _s_measure(p: Float[Tensor, "N H W"], g: Bool[Tensor, "N H W"]) -> Float[Tensor, "N"]:
    area, mean = g.double().mean(dim=(1, 2)), p.mean(dim=(1, 2))
    objects = area * _object(p, g) + (1 - area) * _object(1 - p, ~g)
    score = (0.5 * objects + 0.5 * _regions(p, g)).clamp_min(0)
    return torch.where(area == 0, 1 - mean, torch.where(area == 1, mean, score))


def _object(x: Tensor, where: Tensor) -> Float[Tensor, "N"]:
    count = where.sum(dim=(1, 2)).double()
    mean = x.masked_fill(~where, 0).sum(dim=(1, 2)) / count.clamp_min(1)
    squares = (x - mean[:, None, None]).square().masked_fill(~where, 0).sum(dim=(1, 2))
    deviation = (squares / (count - 1).clamp_min(1)).sqrt()
    return 2 * mean / (mean.square() + 1 + deviation + EPS)


def _regions(p: Tensor, g: Tensor) -> Float[Tensor, "N"]:
    """Structural similarity of four blocks around the object's centre, by their share of the area."""
    height, width = p.shape[1:]
    y = g.double()
    inside = y.sum(dim=(1, 2)).clamp_min(1)
    rows = torch.arange(height, dtype=torch.float64, device=p.device)
    columns = torch.arange(width, dtype=torch.float64, device=p.device)
    cut_row = ((y.sum(dim=2) @ rows) / inside).round() + 1
    cut_column = ((y.sum(dim=1) @ columns) / inside).round() + 1
    above, left = rows < cut_row[:, None], columns < cut_column[:, None]
    total = torch.zeros_like(inside)
    for down in (above, ~above):
        for across in (left, ~left):
            block = (down.unsqueeze(2) & across.unsqueeze(1)).double()
            count = block.sum(dim=(1, 2))
            full = count.clamp_min(1)
            mx, my = (block * p).sum(dim=(1, 2)) / full, (block * y).sum(dim=(1, 2)) / full
            dx, dy = block * (p - mx[:, None, None]), block * (y - my[:, None, None])
            degrees = (count - 1).clamp_min(1)
            vx, vy, cov = ((a * b).sum(dim=(1, 2)) / degrees for a, b in ((dx, dx), (dy, dy), (dx, dy)))
            top = 4 * mx * my * cov
            bottom = (mx.square() + my.square()) * (vx + vy)
            score = torch.where(top != 0, top / (bottom + EPS), (bottom == 0).double())
            total = total + torch.where(count > 0, count / (height * width) * score, 0)
    return total


def _weighted_f(p: Tensor, g: Tensor) -> Float[Tensor, "N"]:
    """Errors spread to their neighbours and weighed by their distance to the object."""
    y, error = g.double(), (p - g.double()).abs()
    distance, nearest = _to_object(g)
    seen = torch.where(g, error, error.flatten(1).gather(1, nearest.flatten(1)).reshape(error.shape))
    offsets = torch.arange(-3, 4, dtype=torch.float64, device=p.device)
    window = (-offsets.square() / (2 * 5.0**2)).exp()
    window = window / window.sum()
    spread = F.conv2d(seen.unsqueeze(1), window[None, None, :, None], padding=(3, 0))
    spread = F.conv2d(spread, window[None, None, None, :], padding=(0, 3)).squeeze(1)
    least = torch.where(g & (spread < error), spread, error)
    weight = torch.where(g, 1.0, 2 - (math.log(0.5) / 5 * distance).exp()).to(error)
    weighted = least * weight
    count = y.sum(dim=(1, 2))
    missed, false = (weighted * y).sum(dim=(1, 2)), (weighted * (1 - y)).sum(dim=(1, 2))
    recall = 1 - missed / count.clamp_min(1)
    hits = count - missed
    precision = hits / (hits + false + EPS)
    return torch.where(count > 0, 2 * recall * precision / (recall + precision + EPS), 0)


def _to_object(g: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of every pixel to the object of its image, and the flat place of the object's nearest pixel."""
    distances, places = [], []
    for mask in g.cpu().numpy():
        found, (rows, columns) = distance_transform_edt(~mask, return_indices=True)
        distances.append(torch.from_numpy(found))
        places.append(torch.from_numpy(rows.astype("int64") * mask.shape[1] + columns.astype("int64")))
    size = g[0].numel()
    return torch.stack(distances).to(g.device), torch.stack(places).clamp_(0, size - 1).to(g.device)


def _relaxed_boundary(b: Tensor, g: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Share of the map's boundary near the object's, and the other way round."""
    predicted, true = _boundary(b), _boundary(g)
    return _near(predicted, true, rho), _near(true, predicted, rho)


def _boundary(mask: Bool[Tensor, "N H W"]) -> Bool[Tensor, "N H W"]:
    around = F.pad(mask, (1, 1, 1, 1))
    kept = mask & around[:, :-2, 1:-1] & around[:, 2:, 1:-1] & around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    return mask ^ kept


def _near(one: Tensor, other: Tensor, rho: float) -> Float[Tensor, "N"]:
    reach = math.floor(rho)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=one.device)
    disc = (offsets[:, None].square() + offsets.square() <= rho**2).float()
    close = F.conv2d(other.float().unsqueeze(1), disc[None, None], padding=reach).squeeze(1) > 0.5
    count, others = one.sum(dim=(1, 2)).double(), other.sum(dim=(1, 2))
    share = (one & close).sum(dim=(1, 2)).double() / count.clamp_min(1)
    return torch.where((count == 0) & (others == 0), 1.0, share)
