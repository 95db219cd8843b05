"""``proto-vision verify``: how well a checkpoint tells whether two images show one identity."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from proto_core.cli.demo import quiet_lightning
from proto_core.cli.training import data_from_checkpoint
from proto_core.files import atomic_write, writable_folder
from proto_core.metrics import VerificationMetrics, rank1_accuracy, template_features
from proto_core.training import load_system
from proto_vision import ImageFolder
from proto_vision.data.dataset import ImageDataset
from proto_vision.data.images import FileReader
from proto_vision.data.module import ImageDataModule
from proto_vision.data.pairs import PairList, Templates, read_packed_pairs, read_pairs, read_templates
from proto_vision.embedding import EmbeddingModule
from proto_vision.verification import all_pairs, draw_curves, first_and_rest, pair_scores

__all__ = ["run"]

MOST_PAIRS = 5 * 10**7
"""All pairs of a folder are compared up to so many."""


class _Work(NamedTuple):
    """What is embedded, and what is compared of it.

    ``people`` are the identities of the images where they are known; without ``pairs`` every two images make one.
    """

    images: str
    size: int
    read: Callable[[int], Image.Image]
    pairs: PairList | None
    people: np.ndarray | None
    templates: Templates | None = None


def run(arguments: Any) -> int:
    """Run the command."""
    out = Path(arguments.out)
    writable_folder(out.parent, "--out")
    plot = _plot(arguments.plot)
    if not all(0 <= far <= 1 for far in arguments.far):
        raise ValueError(f"--far: found {arguments.far}, needed rates in [0, 1]")
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        found = f"{arguments.batch_size} and {arguments.num_workers}"
        raise ValueError(f"--batch_size, --num_workers: found {found}, needed 1 and 0 at least")
    network = load_system(arguments.ckpt_path, "proto-vision")
    if not isinstance(network, EmbeddingModule):
        raise ValueError(
            f"checkpoint {arguments.ckpt_path!r}: system {network.system!r} gives no embeddings to compare"
        )
    data = data_from_checkpoint(arguments.ckpt_path, {"root": arguments.root})
    work = _work(arguments, data)
    if work.templates is not None and hasattr(network, "flip"):
        network.flip = False  # type: ignore[assignment]  # of UNPG: a plain attribute, no part of the module
    embeddings = _embed(network, data, work, arguments)
    scores, labels = _compare(work, embeddings)
    metric = VerificationMetrics(arguments.far, arguments.mode)
    metric.update(scores, labels)
    figures = metric.compute()
    figures = {"eer": figures.pop("eer"), **figures, "rank1": _rank1(work, embeddings)}
    counts = {"images": work.size, "pairs": len(labels), "of one identity": int(labels.sum())}
    _write(figures | counts, out)
    if plot is not None:
        with atomic_write(plot, "wb") as file:
            draw_curves(scores.numpy(), labels.numpy(), file, plot.suffix[1:].lower())
    _print(work, figures, counts, [out, *([plot] if plot else [])])
    return 0


def _plot(name: str | None) -> Path | None:
    """Where curves are drawn, if they are."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot: found {name!r}, needed a name that ends in .png or .svg")
    writable_folder(path.parent, "--plot")
    return path


def _work(arguments: Any, data: ImageDataModule) -> _Work:
    """Packed pairs, a list, templates, a folder of identities, or the test fold, as the arguments have it."""
    if arguments.templates is not None:
        if arguments.pairs is None or arguments.faces is None:
            raise ValueError("--templates: needed --pairs (of templates) and --faces (the images' folder) with it")
        templates, pairs = read_templates(arguments.templates, arguments.pairs, arguments.faces)
        return _Work(str(arguments.pairs), len(templates.names), templates.read, pairs, None, templates)
    if arguments.pairs is not None and Path(arguments.pairs).suffix.lower() == ".bin":
        pairs = read_packed_pairs(arguments.pairs)
    elif arguments.pairs is not None:
        pairs = read_pairs(arguments.pairs, data.root if arguments.faces is None else arguments.faces)
    else:
        return _folder(arguments.faces, data, Path(arguments.out).parent)
    assert pairs.read is not None
    return _Work(str(arguments.pairs), len(pairs.names), pairs.read, pairs, pairs.people())


def _folder(faces: str | None, data: ImageDataModule, out: Path) -> _Work:
    """Every two images of a folder of identities, or of the test fold."""
    if faces is None:
        data.prepare_in(out)
        source, rows, read = f"test fold of {data}", data.rows("test"), data.reader()
        people = data.table.targets[rows]
    else:
        table = ImageFolder(faces).table
        source, rows, people = str(faces), np.arange(len(table.record_ids)), table.targets
        read = FileReader(Path(faces).expanduser(), table.record_ids)
    pairs = len(rows) * (len(rows) - 1) // 2
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"{source}: found {pairs:,} pairs of {len(rows):,} images, needed {MOST_PAIRS:,} at most, or --pairs"
        )
    sizes = np.bincount(people)
    if sizes.max() < 2 or (sizes > 0).sum() < 2:
        found = f"{len(rows)} images of {(sizes > 0).sum()} identities, at most {sizes.max()} of one"
        raise ValueError(f"{source}: found {found}, needed two identities and two images of one")
    return _Work(source, len(rows), lambda place: read(int(rows[place])), None, people)


def _embed(network: EmbeddingModule, data: ImageDataModule, work: _Work, arguments: Any) -> Tensor:
    """``[M, D]`` embeddings of all images, in their order."""
    rows = np.arange(work.size)
    dataset = ImageDataset(work.read, data.eval_transform(), torch.zeros(work.size, dtype=torch.long), rows)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        collate_fn=ImageDataset.collate,
    )
    with quiet_lightning():
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, devices=1)
        parts: Any = trainer.predict(network, loader)
    return torch.cat([part["embeddings"].cpu() for part in parts])


def _compare(work: _Work, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and labels of the pairs."""
    if work.pairs is None:
        assert work.people is not None
        return all_pairs(embeddings, torch.from_numpy(work.people))
    if work.templates is not None:
        found = work.templates
        embeddings, _ = template_features(embeddings, torch.from_numpy(found.templates), torch.from_numpy(found.medias))
    first, second, same = (torch.from_numpy(part) for part in work.pairs[1:4])
    return pair_scores(embeddings, first, second), same


def _rank1(work: _Work, embeddings: Tensor) -> float:
    """Share of images found by the first image of their identity; NaN where identities are not known."""
    if work.people is None:
        return math.nan
    people = torch.from_numpy(work.people)
    known, asked = first_and_rest(people)
    return rank1_accuracy(embeddings[asked], people[asked], embeddings[known], people[known])


def _write(figures: dict[str, float], out: Path) -> None:
    with atomic_write(out) as file:
        csv.writer(file).writerows([["figure", "value"], *figures.items()])


def _print(work: _Work, figures: dict[str, float], counts: dict[str, int], places: Sequence[Path]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    pairs = f"{counts['pairs']} pairs, {counts['of one identity']} of one identity"
    console.print(f"{counts['images']} images, {pairs}", soft_wrap=True, highlight=False)
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, "-" if math.isnan(value) else f"{value:.4f}")
    console.print(table)
    if math.isnan(figures["rank1"]):
        console.print("no rank1: the paths do not say who is who (first folder = identity in every pair)")
    console.print(work.images, soft_wrap=True, markup=False)
    for path in places:
        console.print(f"written: {path}", soft_wrap=True, markup=False)
