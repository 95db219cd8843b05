"""The page about a network's prototypes: which property matters to each, in pictures.

Source: arXiv 2011.02863, figures 1 and 4: what a prototype looks like, and bars of its scores. One HTML file without
script; every text from a file is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from proto_core.explain import Evidence, Explanation, Picture, render_page
from proto_vision.case_gallery import CaseGallery
from proto_vision.drawing import Location, draw_image
from proto_vision.explaining.perturbations import perturb_all
from proto_vision.explaining.scores import LocalScores, explain
from proto_vision.explaining.study import PropertyStudy

__all__ = ["ExplainedImage", "properties_page"]

FOOTER = (
    "Contrast, saturation and brightness are reduced, the hue is turned, the shape is bent by rolling rows and "
    "columns, texture is smoothed; always in the image's original size, before it is brought to the model's. The frame "
    "marks the pixels of the cell of the feature map where the prototype matched best; the network saw more than that."
)
PAIRS = 12


@dataclass(frozen=True, eq=False)
class ExplainedImage:
    """An image whose prototypes are looked at in detail.

    Attributes:
        name: of the image.
        pixels: ``[3, H, W]`` uint8 in its original size.
        view: the image in the geometry of the model's input.
        explanation: of the predicted class.
        scores: local scores of the image, N = 1.
    """

    name: str
    pixels: UInt8[Tensor, "3 H W"]
    view: Image.Image
    explanation: Explanation
    scores: LocalScores


def properties_page(
    study: PropertyStudy,
    images: Sequence[ExplainedImage],
    *,
    title: str,
    info: Mapping[str, str],
    read_case: Callable[[str], Image.Image],
    top: int = 3,
    limit: int = 60,
) -> str:
    """Write the page.

    Args:
        study: scores of all prototypes.
        images: to be shown in detail; may be empty.
        title: of the page.
        info: facts for its head, such as the model's name.
        read_case: gives a training image in the geometry of the model's input; one that cannot be read is a note.
        top: prototypes shown for each image, by their contribution.
        limit: prototypes that get a card; those of the images first, then those with the highest scores.

    Returns:
        HTML: one file, no script, pictures inside.
    """
    gallery = CaseGallery(study.prototypes, read_case)
    matches = {item.name: item.explanation.strongest_for(top) for item in images}
    chosen = [e.prototype for found in matches.values() for e in found]
    best = study.main.nan_to_num(-math.inf).amax(1).argsort(descending=True, stable=True).tolist()
    shown = sorted(list(dict.fromkeys([*chosen, *best]))[:limit])
    local = torch.cat([item.scores.delta.flatten() for item in images]) if images else torch.zeros(1)
    agreement = study.generalisation()
    names = study.characteristics
    described = [study.described(p) for p in range(len(study.prototypes))]
    firsts = [rows[0][0] for rows in described if rows[0][1] == rows[0][1]]
    known = [values for _, values in zip(study.scores, ("a", "b"))]
    rows = [
        {
            "name": name,
            "figures": [(agreement[name][f"mean_{k}"], agreement[name][f"std_{k}"]) for k in known],  # type: ignore[literal-required]
            "p": agreement[name]["welch_p"],
            "first": firsts.count(name),
        }
        for name in sorted(names, key=lambda name: -agreement[name]["mean_a"])
    ]
    table = study.rows()
    cards = [
        {
            **_who(study.prototypes[p], p),
            "whole": gallery.whole(p),
            "part": gallery.part(p),
            "scores": described[p],
            "nearest": (table[p]["nearest_of_class"], table[p]["distance"]) if table[p]["distance"] != "" else None,
        }
        for p in shown
    ]
    pairs = [
        {
            "classes": ", ".join(pair.classes),
            "numbers": (pair.one, pair.two),
            "distance": pair.distance,
            "one": gallery.part(pair.one),
            "two": gallery.part(pair.two),
        }
        for pair in study.alike()[:PAIRS]
    ]
    return render_page(
        "proto_vision",
        "prototype_properties.html",
        title=title,
        info=info,
        folds=list(study.images.items()),
        summary=rows,
        images=[_image(item, matches[item.name], names, gallery) for item in images],
        prototypes=cards,
        pairs=pairs,
        shown=frozenset(shown),
        count=len(study.prototypes),
        left_out=len(study.prototypes) - len(shown),
        scale=_scale(study.main),
        local_scale=_scale(local),
        footer=FOOTER,
    )


def _image(
    item: ExplainedImage, matches: Sequence[Evidence], names: Sequence[str], gallery: CaseGallery
) -> dict[str, object]:
    versions = [item.pixels, *perturb_all(item.pixels, names)]
    captions = ["as it is", *(f"{name} changed" for name in names)]
    sheet = [
        Picture(draw_image(F.to_pil_image(version), None, f"{item.name}, {text}"), text.capitalize() + ".")
        for version, text in zip(versions, captions)
    ]
    found = []
    for e in matches:
        place = cast("Location | None", e.location)
        here = Picture(draw_image(item.view, place, f"{item.name}, framed"), "This image, the best match framed.")
        found.append(
            {
                **_who(e, e.prototype),
                "similarity": e.similarity,
                "contribution": e.contribution,
                "here": here,
                "case": gallery.whole(e.prototype),
                "scores": explain(item.scores.delta[0, :, e.prototype], characteristics=names),
            }
        )
    probability = f"{item.explanation.label} with probability {item.explanation.probability:.3f}"
    return {"name": item.name, "verdict": probability, "versions": sheet, "matches": found}


def _who(item: Evidence, number: int) -> dict[str, object]:
    return {"number": number, "group": item.group, "classes": ", ".join(item.classes)}


def _scale(values: Tensor) -> float:
    """The length of a full bar."""
    return float(values[values.isfinite()].abs().amax()) if bool(values.isfinite().any()) else 1.0
