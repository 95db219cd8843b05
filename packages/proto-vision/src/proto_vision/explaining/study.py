"""The properties that matter to every prototype of a network, over whole folds of a data set, as tables.

Source: arXiv 2011.02863, section 4. Images are read and changed in the data module's worker processes, pass through
the network in batches on its device, and only sums are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from proto_core.explain import Evidence
from proto_vision.data.dataset import evenly_spaced
from proto_vision.data.module import ImageDataModule
from proto_vision.explaining.explainer import PrototypeExplainer, image_versions
from proto_vision.explaining.scores import Generalisation, explain, generalisation_test, redundancy

__all__ = ["AlikePair", "PropertyStudy", "pixels_of_image", "study_prototypes"]


class AlikePair(NamedTuple):
    """Two prototypes of a class, and how far apart their scores lie."""

    classes: tuple[str, ...]
    one: int
    two: int
    distance: float


@dataclass(frozen=True, eq=False)
class PropertyStudy:
    """What came out.

    Attributes:
        prototypes: one record per prototype, in the order of the scores: its set, classes and case.
        characteristics: axis Q.
        scores: fold -> ``[P, Q]`` global scores; the first fold is the one that prototypes are described by.
        images: fold -> how many images were looked at.
    """

    prototypes: tuple[Evidence, ...]
    characteristics: tuple[str, ...]
    scores: dict[str, Tensor]
    images: dict[str, int]

    @property
    def main(self) -> Tensor:
        """``[P, Q]`` scores of the first fold."""
        return next(iter(self.scores.values()))

    def described(self, prototype: int) -> list[tuple[str, float]]:
        """A prototype's properties, from high to low."""
        return explain(self.main[prototype], characteristics=self.characteristics)

    def generalisation(self) -> dict[str, Generalisation]:
        """Agreement of the first two folds; of the first with itself where there is no other."""
        folds = [scores.cpu() for scores in self.scores.values()]
        return generalisation_test(folds[0], folds[-1], characteristics=self.characteristics)

    def alike(self) -> list[AlikePair]:
        """All pairs of prototypes of a class, the nearest scores first; pairs without a score are left out."""
        members: dict[tuple[str, ...], list[int]] = {}
        for number, item in enumerate(self.prototypes):
            members.setdefault(item.classes, []).append(number)
        found = []
        for classes, numbers in members.items():
            distance = redundancy(self.main[numbers]).cpu()
            one, two = torch.triu_indices(len(numbers), len(numbers), 1).tolist()
            values = distance[one, two].tolist()
            found += [AlikePair(classes, numbers[a], numbers[b], d) for a, b, d in zip(one, two, values) if d == d]
        return sorted(found, key=lambda pair: pair.distance)

    def rows(self) -> list[dict[str, Any]]:
        """One row per prototype: what it is, its scores in every fold, its strongest properties, its twin."""
        nearest: dict[int, tuple[int, float]] = {}
        for _, one, two, distance in self.alike():
            nearest.setdefault(one, (two, distance))
            nearest.setdefault(two, (one, distance))
        table = []
        values = {fold: scores.tolist() for fold, scores in self.scores.items()}
        for number, item in enumerate(self.prototypes):
            row: dict[str, Any] = {"prototype": number, "set": item.group, "classes": ";".join(item.classes)}
            row["case"] = item.case.sample_id if item.case else ""
            for fold, scores in values.items():
                row |= {f"{fold}_{name}": value for name, value in zip(self.characteristics, scores[number])}
            first = [name for name, value in self.described(number) if value == value]
            row |= {"first": first[0] if first else "", "second": first[1] if len(first) > 1 else ""}
            twin: tuple[int | str, float | str] = nearest.get(number, ("", ""))
            table.append(row | {"nearest_of_class": twin[0], "distance": twin[1]})
        return table


def study_prototypes(
    explainer: PrototypeExplainer,
    prototypes: Sequence[Evidence],
    data: ImageDataModule,
    *,
    folds: Sequence[str] = ("train", "test"),
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[Any, str], Any] = lambda batches, text: batches,
) -> PropertyStudy:
    """Global scores of all prototypes over folds of a data set.

    Args:
        explainer: its sums are begun anew.
        prototypes: records of the prototypes, in the order of the model's maps.
        data: whose images, in their original size (cropped where the data set is), are changed.
        folds: such as ``("train", "test")``; one without an image is left out, except the first.
        limit: look at so many images of a fold at most, evenly spaced.
        batch_size: images that pass through the model at once, each in all its versions.
        progress: wraps the batches of a fold, to show how far the work is.

    Raises:
        ValueError: a first fold without an image, a limit or batch size below 1, prototypes that do not fit the model.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, needed at least 1")
    scores: dict[str, Tensor] = {}
    images: dict[str, int] = {}
    for fold in folds:
        if scores and not (data.table.fold == fold).any():
            continue
        rows = evenly_spaced(data.rows(fold), limit)
        changed = _Versions(data, rows, explainer.preprocess, explainer.characteristics)
        loader = DataLoader(changed, batch_size=batch_size, num_workers=data.num_workers)
        explainer.reset()
        for inputs in progress(loader, f"{fold} images"):
            explainer.update(inputs)
        scores[fold], images[fold] = explainer.global_scores(), explainer.num_images
        if len(scores[fold]) != len(prototypes):
            raise ValueError(f"prototypes: found {len(prototypes)} records for maps of {len(scores[fold])}")
    return PropertyStudy(tuple(prototypes), explainer.characteristics, scores, images)


class _Versions(Dataset[Tensor]):
    """Row -> model inputs of an image and of its changed versions."""

    def __init__(
        self, data: ImageDataModule, rows: np.ndarray, preprocess: Callable[..., Any], characteristics: Sequence[str]
    ) -> None:
        self.read, self.rows = data.reader(), rows
        self.preprocess, self.characteristics = preprocess, tuple(characteristics)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Tensor:
        image = pixels_of_image(self.read(int(self.rows[position])))
        return image_versions(image, self.preprocess, self.characteristics)


def pixels_of_image(image: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """An RGB image as uint8 ``[3, H, W]``."""
    return F.pil_to_tensor(image)
