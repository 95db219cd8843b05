"""Measuring the part prototypes of any network that explains itself by parts.

Sources: consistency and stability, EvalProtoPNet (ICCV 2023, arXiv 2212.05946); heat inside the object and deletion,
ST-ProtoPNet (ICCV 2023, arXiv 2301.04011). Differences from the authors' code: a network's sets of prototypes are
measured together and each alone; deletion takes 28 equal steps at any size of image (at 224 pixels the authors'); the
share of images in which a prototype's best place stays near where it was, which needs no annotation, is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from proto_core.explain import Evidence
from proto_core.metrics import (
    PartPrototypeScores,
    content_heatmap,
    deletion_auc,
    heatmap_iou,
    map_peaks,
    outside_inside_ratio,
    parts_near,
    perturb_images,
)
from proto_core.precision import full_precision
from proto_vision.data.dataset import evenly_spaced
from proto_vision.data.module import ImageDataModule
from proto_vision.explanation import PartEvidence
from proto_vision.quality.samples import AnnotatedBatch, AnnotatedImages

__all__ = ["PrototypeQuality", "class_heat", "deletion_scores", "measure_prototypes"]


@dataclass(frozen=True, eq=False)
class PrototypeQuality:
    """What came out. Figures of classes without an image are NaN; percentages are 0 to 100, shares 0 to 1.

    Attributes:
        prototypes: one record per prototype: its set, classes and case.
        images: how many images were looked at, per class ``[C]``.
        classes: ``[P]`` index of each prototype's class.
        figures: name of a measure -> its value over all prototypes or images; what cannot be had is not in it.
        sets: set of prototypes -> consistency, stability and kept place of that set alone.
        part_names: of the M annotated parts.
        shares: ``[P, M]`` in which share of the images that show a part the prototype meets it, or ``None``.
        stability: ``[P]`` share of images in which it meets the same parts under noise, or ``None``.
        kept_place: ``[P]`` share of images in which its best place stays within the box under noise.
        threshold: share from which a prototype is consistent.
        half_size: half the side of the box around a best place, in pixels.
        mask_kind: what the heat was compared with.
        curve: ``[steps + 1]`` mean probability while the hottest pixels are deleted; empty where that was left out.
        rows: ``[N]`` rows of the images.
        targets: ``[N]`` their classes.
        places: ``[N, K]`` their best places of the prototypes of their class, ``(x, y)`` in the last axis.
        members: ``[C, K]`` the prototypes of each class, in the order of ``places``.
    """

    prototypes: tuple[Evidence, ...]
    images: Int[Tensor, " C"]
    classes: Int[Tensor, " P"]
    figures: dict[str, float]
    sets: dict[str, dict[str, float]]
    part_names: tuple[str, ...]
    shares: Tensor | None
    stability: Tensor | None
    kept_place: Tensor
    threshold: float
    half_size: int
    mask_kind: str | None
    curve: tuple[float, ...]
    rows: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    places: Tensor = field(repr=False)
    members: Tensor = field(repr=False)

    def table(self) -> list[dict[str, Any]]:
        """One row per prototype: what it is, the part it meets most often, and how steady it is."""
        counts = self.images[self.classes].tolist()
        found = []
        for number, (item, count) in enumerate(zip(self.prototypes, counts)):
            row: dict[str, Any] = {"prototype": number, "set": item.group, "classes": ";".join(item.classes)}
            row |= {"case": item.case.sample_id if item.case else "", "images": count}
            if self.shares is not None:
                share, part = self.shares[number].max(0)
                row |= {"part": self.part_names[int(part)] if count else "", "share": float(share) if count else ""}
                row["consistent"] = int(float(share) >= self.threshold) if count else ""
            if self.stability is not None:
                row["stability"] = float(self.stability[number]) if count else ""
            row["kept_place"] = float(self.kept_place[number]) if count else ""
            found.append(row)
        return found


def class_members(sets: Sequence[PartEvidence]) -> list[Int[Tensor, "C K"]]:
    """For each set the prototypes of every class, as its layer's ``class_identity`` says.

    Raises:
        ValueError: classes with different numbers of prototypes, prototypes of several classes.
    """
    found = []
    for part in sets:
        identity = part.layer.class_identity
        shared = int(((identity != 0).sum(1) != 1).sum())
        if shared:
            raise ValueError(f"{part.group}: found {shared} prototypes of several classes, needed one class for each")
        counts = (identity != 0).sum(0)
        if int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
            few, many = int(counts.min()), int(counts.max())
            raise ValueError(f"{part.group}: found {few} to {many} prototypes per class, needed the same for each")
        found.append((identity != 0).T.nonzero()[:, 1].unflatten(0, (identity.shape[1], -1)))
    return found


def _own(part: PartEvidence, members: Tensor, targets: Tensor) -> Float[Tensor, "N K h w"]:
    """The maps of the prototypes of each image's class."""
    own = members.to(targets.device)[targets]
    return part.maps.gather(1, own[:, :, None, None].expand(-1, -1, *part.maps.shape[2:]))


def class_heat(sets: Sequence[PartEvidence], targets: Int[Tensor, " N"], size: int) -> Float[Tensor, "N S S"]:
    """Where each image's own class is seen: the mean map of its prototypes, each set counting the same, in [0, 1].

    Args:
        sets: of ``part_evidence``.
        targets: classes of the images.
        size: S; maps are enlarged to it by bicubic interpolation.

    Source:
        arXiv 2301.04011, section on interpretability; lowest and highest value of an image become 0 and 1.
    """
    whole = torch.zeros(len(targets), size, size, device=targets.device)
    for part, members in zip(sets, class_members(sets)):
        mean = full_precision(_own(part, members, targets)).mean(1, keepdim=True)
        whole = whole + F.interpolate(mean, (size, size), mode="bicubic", align_corners=False)[:, 0] / len(sets)
    low, high = whole.amin((1, 2), keepdim=True), whole.amax((1, 2), keepdim=True)
    return (whole - low) / (high - low).clamp_min(1e-12)


@torch.no_grad()
def deletion_scores(
    network: Any, images: Float[Tensor, "N channels S S"], heat: Float[Tensor, "N S S"], steps: int = 28
) -> Float[Tensor, "N scores"]:
    """Probability of the class predicted on the whole image while pixels are set to 0, the hottest first.

    Args:
        network: has ``evaluated``; a network of several sets has the mean of their probabilities.
        images: normalised, so that 0 is the data's mean.
        heat: of :func:`class_heat`.
        steps: equal shares of the pixels, deleted one after the other.

    Returns:
        ``[N, steps + 1]``, the whole image first.

    Raises:
        ValueError: fewer than one step, or more than pixels.

    Source:
        arXiv 2301.04011, deletion (DAUC).
    """
    pixels = heat[0].numel() if len(heat) else heat.shape[1] * heat.shape[2]
    if not 1 <= steps <= max(pixels, 1):
        raise ValueError(f"steps: found {steps}, needed 1 to {pixels}, the number of pixels")
    rank = heat.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(heat)[:, None]
    predicted, whole = _probabilities(network, images)
    chosen = predicted[:, None]
    found = [whole.gather(1, chosen)]
    for step in range(1, steps + 1):
        kept = images * (rank >= step * pixels // steps)
        found.append(_probabilities(network, kept)[1].gather(1, chosen))
    return torch.cat(found, 1)


def _probabilities(network: Any, images: Tensor) -> tuple[Int[Tensor, " N"], Float[Tensor, "N C"]]:
    """The network's decision, and the mean of what its sets say."""
    logits, sets = network.evaluated(images)
    each = [full_precision(part.similarities) @ full_precision(part.weight).T for part in sets]
    each = [value if part.bias is None else value + part.bias for value, part in zip(each, sets)]
    return logits.argmax(1), torch.stack([value.softmax(1) for value in each]).mean(0)


def measure_prototypes(
    network: Any,
    data: ImageDataModule,
    prototypes: Sequence[Evidence],
    *,
    fold: str = "test",
    limit: int | None = None,
    batch_size: int | None = None,
    threshold: float = 0.8,
    half_size: int | None = None,
    std: float = 0.2,
    eps: float = 0.25,
    steps: int = 28,
    seed: int = 0,
    progress: Callable[[Any], Any] = lambda batches: batches,
) -> PrototypeQuality:
    """All measures that can be had: consistency and stability need annotated parts, heat inside the object a mask.

    Args:
        network: explains itself by parts (``evaluated``, ``class_names``, ``image_size``).
        data: whose images are looked at.
        prototypes: records of the prototypes, in the order of the network's sets.
        fold: which images.
        limit: look at so many of them at most, evenly spaced.
        batch_size: images at once; by default the data's.
        threshold: share of images from which a prototype is consistent.
        half_size: half the side of the box around a best place, in pixels; by default 36 for every 224.
        std: of the noise, on normalised images.
        eps: bound of the noise.
        steps: of the deletion; 0 leaves it out, which is most of the work.
        seed: of the noise.
        progress: wraps the batches, to show how far the work is.

    Raises:
        ValueError: classes that are not the network's, a fold without an image of them, settings out of range.

    Source:
        arXiv 2212.05946, section 4; arXiv 2301.04011, section on interpretability.
    """
    rows = _rows(network, data, fold, limit)
    size = data.image_size
    half = round(36 * size / 224) if half_size is None else half_size
    at_once = data.batch_size if batch_size is None else batch_size
    for name, value, least in (("steps", steps, 0), ("half_size", half, 0), ("batch_size", at_once, 1)):
        if value < least:
            raise ValueError(f"{name}: found {value}, needed at least {least}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: found {threshold}, needed a share above 0, at most 1")
    members = _members(network, data, prototypes, rows)
    images = AnnotatedImages(data, rows)
    loader = DataLoader(images, batch_size=at_once, num_workers=data.num_workers)
    options: dict[str, Any] = {
        "half_size": half,
        "std": std,
        "eps": eps,
        "steps": steps,
        "masked": images.mask_kind is not None,
    }
    noise = torch.Generator().manual_seed(seed)
    parts = [_measure_batch(network, AnnotatedBatch(*batch), noise, **options) for batch in progress(loader)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _summarised(members, data, images, prototypes, joined, rows, threshold=threshold, half_size=half)


def _rows(network: Any, data: ImageDataModule, fold: str, limit: int | None) -> np.ndarray:
    found, needed = list(data.class_names), list(network.class_names)
    if found != needed:
        where = next((n for n, (one, other) in enumerate(zip(found, needed)) if one != other), None)
        differ = "" if where is None else f": number {where + 1}, found {found[where]!r}, needed {needed[where]!r}"
        raise ValueError(f"data: its {len(found)} classes are not the {len(needed)} of the network{differ}")
    rows = data.rows(fold)
    rows = rows[data.table.targets[rows] < network.num_classes]
    if not len(rows):
        raise ValueError(f"{data.root}: the {fold} fold holds no image of a class that the network knows")
    return evenly_spaced(rows, limit)


@torch.no_grad()
def _measure_batch(
    network: Any,
    batch: AnnotatedBatch,
    noise: torch.Generator,
    *,
    half_size: int,
    std: float,
    eps: float,
    steps: int,
    masked: bool,
) -> dict[str, Tensor]:
    """Figures of each image; everything comes back on the host."""
    device, size = network.device, batch.image.shape[-1]
    image, target = batch.image.to(device), batch.target.to(device)
    logits, clean = network.evaluated(image)
    _, noisy = network.evaluated(perturb_images(batch.image, std=std, eps=eps, generator=noise).to(device))
    members = class_members(clean)
    before, after = (
        torch.cat([map_peaks(_own(part, own, target), size) for part, own in zip(sets, members)], 1)
        for sets in (clean, noisy)
    )
    found = {"correct": logits.argmax(1) == target, "places": before}
    found["kept_place"] = (before - after).abs().amax(2) <= half_size
    if batch.parts.shape[1]:
        where, seen = batch.parts.to(device), batch.visible.to(device)
        near = {"img_size": size, "half_size": half_size}
        found |= {"met": parts_near(before, where, seen, **near), "visible": seen}
        found["met_noisy"] = parts_near(after, where, seen, **near)
    heat = class_heat(clean, target, size) if masked or steps else None
    if masked and heat is not None:
        mask = batch.mask.to(device)
        usable = mask.any(2).any(1) & ~mask.all(2).all(1)
        found |= _against_mask(heat, mask, usable)
    if steps and heat is not None:
        found["deletion"] = deletion_scores(network, image, heat, steps)
    return {name: value.cpu() for name, value in found.items()}


def _against_mask(heat: Tensor, mask: Tensor, usable: Tensor) -> dict[str, Tensor]:
    """The heat inside; NaN for images whose mask is empty or everything."""
    measures = {"content_heatmap": content_heatmap, "outside_inside_ratio": outside_inside_ratio}
    found = {}
    for name, measure in (measures | {"heatmap_iou": heatmap_iou}).items():
        found[name] = torch.full((len(heat),), torch.nan, device=heat.device)
        found[name][usable] = measure(heat[usable], mask[usable])
    return found


def _members(
    network: Any, data: ImageDataModule, prototypes: Sequence[Evidence], rows: np.ndarray
) -> dict[str, Int[Tensor, "C K"]]:
    """Set -> numbers of each class's prototypes among those of all sets, as the first image shows; fails early."""
    some = data.model_input(data.record_ids[int(rows[0])])[None]
    sets = network.evaluated(some)[1]
    found, start = {}, 0
    for part, own in zip(sets, class_members(sets)):
        found[part.group], start = own.cpu() + start, start + part.maps.shape[1]
    if len(prototypes) != start:
        raise ValueError(f"prototypes: found {len(prototypes)} records, needed {start}")
    return found


def _summarised(
    members: dict[str, Tensor],
    data: ImageDataModule,
    images: AnnotatedImages,
    prototypes: Sequence[Evidence],
    joined: dict[str, Tensor],
    rows: np.ndarray,
    *,
    threshold: float,
    half_size: int,
) -> PrototypeQuality:
    every = torch.cat(list(members.values()), 1)
    classes, width = every.shape
    targets = torch.from_numpy(data.table.targets[rows])
    counts = targets.bincount(minlength=classes)
    known = counts > 0
    stayed = torch.zeros(classes, width, dtype=torch.float64).index_add_(0, targets, joined["kept_place"].double())
    by_class = {"kept_place": (stayed / counts.clamp_min(1)[:, None])}
    shares = None
    if "met" in joined:
        scores = PartPrototypeScores(classes, width, joined["met"].shape[2], threshold=threshold)
        scores.update(joined["met"], joined["visible"], targets, joined["met_noisy"])
        shares = scores.shares()
        by_class |= {"consistency": (shares >= threshold).any(2).double(), "stability": scores.kept()}
    figures = {"accuracy": 100 * float(joined["correct"].double().mean())}
    figures |= {name: 100 * float(value[known].mean()) for name, value in by_class.items()}
    for name in ("content_heatmap", "outside_inside_ratio", "heatmap_iou"):
        if name in joined:
            figures[name] = float(joined[name].double().nanmean())
    curve: tuple[float, ...] = ()
    if "deletion" in joined:
        curve = tuple(joined["deletion"].double().mean(0).tolist())
        figures["deletion_auc"] = float(deletion_auc(joined["deletion"].double()).mean())
    column = np.cumsum([0, *(own.shape[1] for own in members.values())]).tolist()
    by_set = {
        group: {name: 100 * float(value[known, a:b].mean()) for name, value in by_class.items()}
        for group, a, b in zip(members, column, column[1:])
    }
    order = every.flatten()

    def by_prototype(values: Tensor) -> Tensor:
        """``[C, K, ...]`` -> ``[P, ...]``, NaN where a class has no image."""
        empty = torch.full_like(values[:1], torch.nan)
        values = torch.where(known.view(-1, *[1] * (values.ndim - 1)), values, empty)
        flat = torch.empty_like(values.flatten(0, 1))
        flat[order] = values.flatten(0, 1)
        return flat

    class_of = torch.empty(classes * width, dtype=torch.long)
    class_of[order] = torch.arange(classes).repeat_interleave(width)
    return PrototypeQuality(
        prototypes=tuple(prototypes),
        images=counts,
        classes=class_of,
        figures=figures,
        sets=by_set,
        part_names=tuple(images.part_names),
        shares=None if shares is None else by_prototype(shares),
        stability=None if shares is None else by_prototype(by_class["stability"]),
        kept_place=by_prototype(by_class["kept_place"]),
        threshold=threshold,
        half_size=half_size,
        mask_kind=images.mask_kind,
        curve=curve,
        rows=torch.from_numpy(rows),
        targets=targets,
        places=joined["places"],
        members=every,
    )
