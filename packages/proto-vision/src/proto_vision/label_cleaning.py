"""Which given labels look wrong to a trained system, image by image: judgement, table, pictures to look at.

A system that judges labels has ``judge_labels(images, labels)``: how suspicious each label is, and the label that it
would give. CPC (arXiv 2212.10766) and FoPro (arXiv 2212.00465) do.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from proto_core.files import atomic_write
from proto_core.modes import evaluation_mode
from proto_vision.contact_sheet import SheetGroup, SheetItem, contact_sheet
from proto_vision.data.dataset import ImageBatch, ImageDataset
from proto_vision.data.module import ImageDataModule

__all__ = ["JudgedLabels", "JudgesLabels", "judge_data", "plain_batches", "suspicion_sheet", "write_suspicions"]


@runtime_checkable
class JudgesLabels(Protocol):
    """A trained system that says which labels look wrong."""

    class_names: list[str]

    def judge_labels(
        self, images: Float[Tensor, "N channels S S"], labels: Int[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """Suspicion in [0, 1] that each label is wrong, and the label that the system would give."""


def plain_batches(
    data: ImageDataModule, rows: Int[np.ndarray, " n"], what: str, *, shown: bool = True
) -> Iterator[ImageBatch]:
    """Rows of a data set as images look in testing, batch by batch, with a progress bar on stderr.

    Args:
        data: the data set.
        rows: of its table.
        what: they are, for the progress bar.
        shown: whether there is one.

    Example:
        >>> from proto_vision import Digits
        >>> from proto_vision.label_cleaning import plain_batches
        >>> data = Digits(image_size=8, batch_size=2, augment="affine")
        >>> [batch.index.tolist() for batch in plain_batches(data, data.rows("val")[:3], "images", shown=False)]
        [[3, 7], [11]]
    """
    loader: DataLoader[ImageBatch] = DataLoader(
        data.plain_set(rows),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=ImageDataset.collate,
    )
    yield from track(loader, what, transient=True, console=Console(stderr=True), disable=not shown)


class JudgedLabels(NamedTuple):
    """Labels of a data set's images, the most suspicious first.

    Attributes:
        rows: ``[N]`` of the data set's table.
        suspicion: ``[N]`` that the given label is wrong, in [0, 1]; 0 for trusted ones.
        suggested: ``[N]`` label that the system would give; the given one for trusted ones.
        given: ``[N]`` label in the table.
        trusted: ``[N]`` whether the given label is known to be right.
    """

    rows: Int[np.ndarray, " N"]
    suspicion: Float[np.ndarray, " N"]
    suggested: Int[np.ndarray, " N"]
    given: Int[np.ndarray, " N"]
    trusted: Bool[np.ndarray, " N"]


@torch.no_grad()
def judge_data(network: JudgesLabels, data: ImageDataModule, rows: Int[np.ndarray, " N"] | None = None) -> JudgedLabels:
    """Judge the labels of a data set's images.

    Args:
        network: on the device where it shall work; evaluated as it is in testing.
        data: with the classes that it was trained on.
        rows: of the table; ``None``: all that are in a fold.

    Raises:
        ValueError: other classes, no image, a system that is not trained far enough to judge.
    """
    assert isinstance(network, nn.Module)
    if data.class_names != network.class_names:
        own, known = data.class_names[:5], network.class_names[:5]
        raise ValueError(f"data: found classes such as {own}, needed those that the network was trained on: {known}")
    rows = np.flatnonzero(data.table.fold != "") if rows is None else rows
    if not len(rows):
        raise ValueError(f"{data.root}: found no image in a fold, needed at least one")
    device = next(network.parameters()).device
    found: list[tuple[Tensor, Tensor]] = []
    with evaluation_mode(network):
        for batch in plain_batches(data, rows, "labels"):
            found.append(network.judge_labels(batch.image.to(device), batch.target.to(device)))
    suspicion, suggested = (torch.cat(parts).cpu().numpy() for parts in zip(*found))
    table = data.table
    given = table.targets[rows]
    trusted = np.zeros(len(rows), dtype=bool) if table.trusted is None else np.asarray(table.trusted, dtype=bool)[rows]
    suspicion = np.where(trusted, 0, suspicion.astype(np.float64))
    suggested = np.where(trusted, given, suggested)
    order = np.argsort(-suspicion, kind="stable")
    return JudgedLabels(*(part[order] for part in (rows, suspicion, suggested, given, trusted)))


def write_suspicions(path: str | os.PathLike[str], judged: JudgedLabels, data: ImageDataModule) -> None:
    """Write a CSV: image, fold, given, suggested, suspicion, trusted, and the right label where an experiment knows it.

    Args:
        path: of the table; it is written whole.
        judged: of :func:`judge_data`.
        data: the same data set.
    """
    table, names = data.table, data.table.class_names
    true = table.true_targets
    with atomic_write(path) as file:
        writer = csv.writer(file)
        columns = ["image", "fold", "given", "suggested", "suspicion", "trusted"]
        writer.writerow([*columns, *(["true"] if true is not None else [])])
        for row, suspicion, suggested, given, trusted in zip(*judged):
            right = [names[true[row]]] if true is not None else []
            words = (names[given], names[suggested], f"{suspicion:.6f}", int(trusted))
            writer.writerow([table.record_ids[row], table.fold[row], *words, *right])


def suspicion_sheet(
    judged: JudgedLabels,
    data: ImageDataModule,
    *,
    shown: int = 120,
    title: str = "Labels that look wrong",
    info: dict[str, str] | None = None,
) -> str:
    """A page of the most suspicious images, group by group of given labels, to look through by eye.

    Args:
        judged: of :func:`judge_data`.
        data: the same data set.
        shown: how many images of all; groups with more suspicious images come first.
        title: of the page.
        info: facts for its head.

    Returns:
        HTML, one file, no script.

    Raises:
        ValueError: no image to show.
    """
    if shown < 1:
        raise ValueError(f"shown: found {shown}, needed 1 or more")
    names, ids = data.table.class_names, data.table.record_ids
    chosen = [place for place in range(len(judged.rows)) if not judged.trusted[place]][:shown]
    groups: dict[int, list[SheetItem]] = {}
    for place in chosen:
        row, given, suggested = int(judged.rows[place]), int(judged.given[place]), int(judged.suggested[place])
        says = f"rather {names[suggested]}" if suggested != given else "no other label"
        detail = f"{judged.suspicion[place]:.2f}, {ids[row]}"
        groups.setdefault(given, []).append(SheetItem(data.reader()(row), says, detail))
    doubtful = np.bincount(judged.given[judged.suspicion > 0.5], minlength=len(names))
    total = np.bincount(judged.given, minlength=len(names))
    order = sorted(groups, key=lambda given: (-len(groups[given]), given))
    notes = {k: f"{doubtful[k]} of {total[k]} images with this label have a suspicion above 0.5." for k in order}
    return contact_sheet(
        [SheetGroup(f"Labelled {names[k]}", notes[k], groups[k]) for k in order],
        title=title,
        info=info or {},
        note="The suspicion that the given label is wrong stands below each image. It comes from a model: look first.",
    )
