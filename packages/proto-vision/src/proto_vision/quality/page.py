"""The page about what part prototypes are worth: figures, the steadiest prototypes and the least steady, in pictures.

One HTML file without script; every text from a file is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from proto_core.explain import Picture, render_page
from proto_vision.case_gallery import CaseGallery
from proto_vision.drawing import draw_image
from proto_vision.quality.measure import PrototypeQuality

__all__ = ["MEASURES", "quality_page"]

MEASURES: dict[str, tuple[str, str, str]] = {
    "accuracy": ("accuracy", "%", "share of the images whose predicted class is right"),
    "consistency": ("consistency", "%", "prototypes that meet one and the same part in most images that show it"),
    "stability": ("stability", "%", "images in which a prototype meets the same parts after noise"),
    "kept_place": ("kept place", "%", "images in which a prototype's best place stays within the box after noise"),
    "content_heatmap": ("heat inside", "", "mean heat of the class's prototypes inside the object; higher is better"),
    "outside_inside_ratio": ("outside over inside", "", "mean heat outside over inside; lower is better"),
    "heatmap_iou": ("overlap", "", "of the hot half of the scale with the object; higher is better"),
    "deletion_auc": ("deletion", "", "area under the probability while the hottest pixels go; lower is better"),
}
"""Figure -> its name in words, its unit, what it says."""


def quality_page(
    quality: PrototypeQuality,
    *,
    title: str,
    info: Mapping[str, str],
    read: Callable[[str], Image.Image],
    record_ids: list[str],
    shown: int = 24,
    examples: int = 3,
) -> str:
    """Write the page.

    Args:
        quality: what was measured.
        title: of the page.
        info: facts for its head, such as the model's name.
        read: gives an image in the geometry of the model's input; one that cannot be read is a note.
        record_ids: row of the data set -> id.
        shown: prototypes with a card, half of them the steadiest, half the least steady.
        examples: images of its class in the card of each.

    Returns:
        HTML: one file, no script, pictures inside.
    """
    gallery = CaseGallery(quality.prototypes, read)
    order = _by_steadiness(quality)
    half = (shown + 1) // 2
    best, worst = (order, []) if len(order) <= shown else (order[:half], order[len(order) - shown // 2 :][::-1])
    images = _Images(quality, read, record_ids, examples)
    table = quality.table()
    groups = [
        (name, [_card(table[p], p, gallery, images) for p in numbers])
        for name, numbers in (
            ("The steadiest prototypes" if worst else "Prototypes", best),
            ("The least steady", worst),
        )
        if numbers
    ]
    rows = [
        {
            "name": words,
            "unit": unit,
            "meaning": meaning,
            "value": quality.figures[key],
            "sets": [found.get(key) for found in quality.sets.values()] if len(quality.sets) > 1 else [],
        }
        for key, (words, unit, meaning) in MEASURES.items()
        if key in quality.figures
    ]
    return render_page(
        "proto_vision",
        "prototype_quality.html",
        title=title,
        info=info,
        rows=rows,
        sets=list(quality.sets) if len(quality.sets) > 1 else [],
        threshold=quality.threshold,
        box=2 * quality.half_size + 1,
        parts=_parts(quality),
        curve=_curve(quality.curve),
        ends=(quality.curve[0], quality.curve[-1]) if quality.curve else (),
        groups=groups,
        left_out=len(quality.prototypes) - len(best) - len(worst),
        mask_kind=quality.mask_kind,
        notes=_notes(quality),
    )


def _by_steadiness(quality: PrototypeQuality) -> list[int]:
    """Prototypes of classes with images: by the share of their part, then by stability, then by kept place."""
    key = torch.zeros(len(quality.prototypes), 3, dtype=torch.float64)
    if quality.shares is not None and quality.stability is not None:
        key[:, 0], key[:, 1] = quality.shares.amax(1), quality.stability
    key[:, 2] = quality.kept_place
    values = key.tolist()
    known = [p for p, value in enumerate(quality.kept_place.tolist()) if value == value]
    return sorted(known, key=lambda p: ([-value for value in values[p]], p))


def _parts(quality: PrototypeQuality) -> list[tuple[str, int]]:
    """How many consistent prototypes each part has, by its own highest share."""
    if quality.shares is None:
        return []
    share, part = quality.shares.nan_to_num(0).max(1)
    counts = torch.bincount(part[share >= quality.threshold], minlength=len(quality.part_names)).tolist()
    return sorted(zip(quality.part_names, counts), key=lambda item: -item[1])


def _curve(values: tuple[float, ...]) -> str:
    """Points of the line in a box of 300 x 100."""
    if not values:
        return ""
    return " ".join(f"{300 * n / (len(values) - 1):.1f},{100 - 100 * v:.1f}" for n, v in enumerate(values))


def _notes(quality: PrototypeQuality) -> list[str]:
    notes = []
    if quality.shares is None:
        notes.append("The data has no annotated parts: consistency and stability are left out.")
    if quality.mask_kind is None:
        notes.append("The data has no masks of the objects: heat inside of them is left out.")
    elif quality.mask_kind == "box":
        notes.append("The data has no silhouettes: objects are the boxes of the data set.")
    empty = int((quality.images == 0).sum())
    if empty:
        notes.append(f"{empty} classes have no image here; their prototypes are left out.")
    return notes


def _card(row: dict[str, Any], number: int, gallery: CaseGallery, images: _Images) -> dict[str, Any]:
    facts = [f"Under noise its best place stays in {100 * row['kept_place']:.0f} % of {row['images']} images"]
    if "share" in row:
        facts.append(f"Under noise it meets the same parts in {100 * row['stability']:.0f} %")
    return {
        "number": number,
        "group": row["set"],
        "classes": row["classes"],
        "part": row.get("part"),
        "share": None if "share" not in row else 100 * row["share"],
        "consistent": bool(row.get("consistent")),
        "facts": facts,
        "case": gallery.whole(number),
        "examples": images.of(number),
    }


class _Images:
    """Images of a prototype's class with the box around its best place."""

    def __init__(
        self, quality: PrototypeQuality, read: Callable[[str], Image.Image], record_ids: list[str], count: int
    ) -> None:
        self.quality, self.read, self.record_ids, self.count = quality, read, record_ids, count
        self.order = quality.targets.argsort(stable=True)
        self.starts = (quality.images.cumsum(0) - quality.images).tolist()

    def of(self, number: int) -> list[Picture]:
        """The pictures of one prototype."""
        quality, c = self.quality, int(self.quality.classes[number])
        column = int((quality.members[c] == number).nonzero()[0])
        chosen = self.order[self.starts[c] :][: min(self.count, int(quality.images[c]))].tolist()
        return [self._picture(n, quality.places[n, column].tolist()) for n in chosen]

    def _picture(self, n: int, place: list[int]) -> Picture:
        name, half = self.record_ids[int(self.quality.rows[n])], self.quality.half_size
        try:
            image = self.read(name)
        except (OSError, ValueError, LookupError) as error:
            return Picture(None, f"{name}.", f"The image could not be read: {error}")
        left, top = (max(value - half, 0) for value in place)
        right, bottom = min(place[0] + half + 1, image.width), min(place[1] + half + 1, image.height)
        box = ((top, bottom - top), (left, right - left))
        return Picture(draw_image(image, box, f"best place in {name}"), f"{name}.")
