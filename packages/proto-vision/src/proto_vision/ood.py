"""How known an image looks to a trained network: scores of image files and data sets, their table and picture.

Mahalanobis distance of features (PALM, arXiv 2402.02653), distance to the nearest training features (arXiv
2204.06507), the largest probability (arXiv 1610.02136), the energy of the logits (arXiv 2010.03759); higher always
means better known.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from proto_core.checks import check_option
from proto_core.files import atomic_write
from proto_core.ood import MahalanobisOOD, NearestNeighbourOOD
from proto_vision.data.images import find_images
from proto_vision.data.module import ImageDataModule
from proto_vision.feature_bank import evaluated, read_batches, training_features

__all__ = [
    "ImageScores",
    "KnownScore",
    "Score",
    "draw_histogram",
    "images_at",
    "on_accelerator",
    "score_images",
    "write_scores",
]

Score = Literal["mahalanobis", "knn", "probability", "energy"]


class KnownScore:
    """How known images look to a network, by one of four scores.

    Args:
        network: a classifier of this package, or a system with features
            (:func:`proto_vision.feature_bank.image_features`).
        score: of features ``"mahalanobis"`` or ``"knn"`` (minus the distance to the k-th nearest training image), of
            logits ``"probability"`` (the largest) or ``"energy"`` (their log-sum-exp).
        data: whose training images the network has learned, for the scores of features.
        neighbours: k.

    Raises:
        ValueError: an unknown score, or a network that lacks what the score is made of.

    Example:
        >>> from proto_vision import PALM, Digits
        >>> from proto_vision.ood import KnownScore
        >>> data = Digits(image_size=8)
        >>> score = KnownScore(PALM("conv3", image_size=8, in_channels=1), "knn", data)
        >>> score(data.model_input("digit-0000")[None]).shape
        torch.Size([1])
    """

    def __init__(self, network: Any, score: Score, data: ImageDataModule, neighbours: int = 50) -> None:
        self.network, self.kind = network, check_option("score", score, *get_args(Score))
        self.detector: MahalanobisOOD | NearestNeighbourOOD | None = None
        if score in ("mahalanobis", "knn"):
            detector = MahalanobisOOD() if score == "mahalanobis" else NearestNeighbourOOD(neighbours)
            self.detector = detector.fit(training_features(network, data)[0])
        elif not hasattr(network, "class_logits"):
            raise ValueError(f"score: found {score!r}, but system {network.system!r} gives no class logits")

    def __call__(self, images: Float[Tensor, "N channels S S"]) -> Float64[Tensor, "N"]:
        """Scores on the CPU, higher for known images."""
        if self.detector is not None:
            return self.detector.score(evaluated(self.network, images).cpu())
        logits = evaluated(self.network, images, lambda network, batch: network.class_logits(batch)).cpu().double()
        return logits.softmax(1).amax(1) if self.kind == "probability" else logits.logsumexp(1)


def on_accelerator(network: nn.Module) -> nn.Module:
    """The network on this machine's accelerator, where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return network if device is None else network.to(device)


class ImageScores(NamedTuple):
    """Scores of a set of images, in the order given.

    Attributes:
        names: as they shall be called.
        scores: float64, NaN where an image cannot be read.
        problems: what is wrong with an image, or nothing.
    """

    names: list[str]
    scores: np.ndarray
    problems: list[str]

    @property
    def readable(self) -> np.ndarray:
        """The scores of the images that could be read."""
        return self.scores[~np.isnan(self.scores)]


def score_images(score: KnownScore, data: ImageDataModule, places: list[str | Path], what: str) -> ImageScores:
    """Score images; those that cannot be read are named, not an end of the work.

    Args:
        score: the fitted score.
        data: prepares the images.
        places: ids of the data set (``str``) or files (``Path``).
        what: they are, for the progress bar and errors.

    Raises:
        ValueError: none of them can be read.
    """
    values: list[float] = []
    problems: list[str] = []
    for part in read_batches(data, places, what):
        images = [image for image, _ in part if image is not None]
        found = iter(score(torch.stack(images)).tolist() if images else ())
        values += [next(found) if image is not None else np.nan for image, _ in part]
        problems += [problem for _, problem in part]
    result = ImageScores([str(place) for place in places], np.array(values), problems)
    if not result.readable.size:
        raise ValueError(f"{what}: none of {len(places)} images can be read; the first: {problems[0]}")
    return result


def images_at(names: Iterable[str], data: ImageDataModule, argument: str) -> list[str | Path]:
    """Images that a person named: ids of a data set, files, and folders, which stand for all images under them.

    Args:
        names: what was named.
        data: whose ids come first.
        argument: name for the error.

    Raises:
        ValueError: a name of nothing, a folder without an image.
    """
    found: list[str | Path] = []
    for name in names:
        path = Path(name).expanduser()
        if data.find_row(name) is not None:
            found.append(name)
        elif path.is_dir():
            images = find_images(path)
            if not images:
                raise ValueError(f"{argument}: the folder {name!r} holds no image")
            found += images
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{argument}: found neither a file nor a folder {name!r}, nor an image of that name")
    return found


def write_scores(path: Path, known: ImageScores | None, asked: ImageScores, threshold: float | None) -> None:
    """Write a CSV of one row per image, the least known first, those that cannot be read last.

    Args:
        path: of the table.
        known: scores of known images, or ``None``.
        asked: scores of the images in question.
        threshold: below it an image counts as unknown; ``None``: nobody can say.
    """
    sets = [("asked", asked), *([("known", known)] if known is not None else [])]
    rows = [(kind, *row) for kind, part in sets for row in zip(part.names, part.scores.tolist(), part.problems)]
    rows.sort(key=lambda row: (row[3] != "", 0.0 if row[3] else row[2], row[1]))
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "set", "score", "unknown", "problem"])
        for kind, name, value, problem in rows:
            below = "" if threshold is None or problem else int(value < threshold)
            writer.writerow([name, kind, "" if problem else repr(value), below, problem])


def draw_histogram(path: str | Path, known: np.ndarray | None, unknown: np.ndarray, threshold: float | None) -> None:
    """Write a PNG of how the scores are spread.

    The axis spans the middle 98 % of all scores; what lies beyond is counted in the outermost bars.

    Args:
        path: of the picture.
        known: scores of known images, or ``None``.
        unknown: scores of the images in question.
        threshold: below it an image counts as unknown; ``None`` draws none.
    """
    from matplotlib.figure import Figure

    together = unknown if known is None else np.concatenate([known, unknown])
    low, high = np.percentile(together, [1, 99])
    edges = np.linspace(low, high if high > low else low + 1, 41)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    sets = [(unknown, "#d55e00", "images in question")]
    if known is not None:
        sets.insert(0, (known, "#0072b2", "known images"))
    for scores, colour, label in sets:
        weights = np.full(len(scores), 1 / len(scores))
        inside = np.clip(scores, edges[0], edges[-1])
        axes.hist(inside, edges.tolist(), weights=weights, color=colour, alpha=0.55, label=f"{label} ({len(scores)})")
    if threshold is not None:
        axes.axvline(threshold, color="#222222", linestyle="--", label="95 % of the known lie to the right")
    axes.set_xlabel("score (higher: better known)")
    axes.set_ylabel("share of the images")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
