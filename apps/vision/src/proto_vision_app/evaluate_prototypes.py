"""``proto-vision evaluate-prototypes``: are prototypes consistent, stable, on the object; what does deletion cost."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from proto_core.cli.training import data_from_checkpoint
from proto_core.files import atomic_write, writable_folder
from proto_core.training import load_system
from proto_vision.explanation import ExplainsParts, prototype_records
from proto_vision.quality import PrototypeQuality, measure_prototypes
from proto_vision.quality.page import MEASURES, quality_page

__all__ = ["run"]


def run(arguments: Any) -> int:
    """Run the command."""
    out = writable_folder(arguments.out, "--out")
    network: Any = load_system(arguments.ckpt_path, "proto-vision")
    part_prototypes: bool = isinstance(network, ExplainsParts)
    if not part_prototypes:
        found = f"checkpoint {arguments.ckpt_path!r}: system {network.system!r} has no part prototypes"
        raise ValueError(f"{found}, needed one that has, such as 'evalprotopnet' or 'st_protopnet'")
    data = data_from_checkpoint(arguments.ckpt_path, {"root": arguments.root})
    data.prepare_in(out)
    if torch.accelerator.is_available():
        network.to(torch.accelerator.current_accelerator())
    settings = {
        name: getattr(arguments, name) for name in ("fold", "limit", "threshold", "std", "eps", "steps", "seed")
    }
    quality = measure_prototypes(
        network,
        data,
        prototype_records(network, data),
        batch_size=arguments.batch_size,
        half_size=arguments.half_size,
        progress=lambda batches: track(batches, f"{arguments.fold} images", transient=True),
        **settings,
    )
    settings["half_size"] = quality.half_size
    _write_tables(quality, settings, network.system, out)
    html = quality_page(
        quality,
        title="What the prototypes are worth",
        info={
            "model": f"{network.paper.title} ({network.system})",
            "checkpoint": Path(arguments.ckpt_path).name,
            "prototypes": str(len(quality.prototypes)),
            "images": f"{len(quality.rows)} of the {arguments.fold} fold",
        },
        read=data.view,
        record_ids=data.record_ids,
        shown=arguments.shown,
    )
    with atomic_write(out / "report.html") as file:
        file.write(html)
    _print(quality, out)
    return 0


def _write_tables(quality: PrototypeQuality, settings: dict[str, Any], system: str, out: Path) -> None:
    rows = quality.table()
    with atomic_write(out / "prototypes.csv") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "system": system,
        "images": len(quality.rows),
        "prototypes": len(rows),
        "masks": quality.mask_kind,
        "settings": settings,
        "figures": _plain(quality.figures),
        "sets": {name: _plain(found) for name, found in quality.sets.items()},
        "deletion_curve": list(quality.curve),
    }
    with atomic_write(out / "summary.json") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: unknown ones are null."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _print(quality: PrototypeQuality, out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    title = f"{len(quality.prototypes)} prototypes, {len(quality.rows)} images"
    table = Table(title=title, title_justify="left")
    names = list(quality.sets) if len(quality.sets) > 1 else []
    for column in ("measure", "all", *names, "what it says"):
        table.add_column(column, justify="left" if column in ("measure", "what it says") else "right")
    for key, (words, unit, meaning) in MEASURES.items():
        if key in quality.figures:
            values = [quality.figures[key], *(quality.sets[name].get(key) for name in names)]
            cells = ["" if v is None else f"{v:.1f} %" if unit else f"{v:.4f}" for v in values]
            table.add_row(words, *cells, meaning)
    console.print(table)
    for wanted, missing in (("consistency", "annotated parts"), ("content_heatmap", "masks of the objects")):
        if wanted not in quality.figures:
            console.print(f"the data has no {missing}: {MEASURES[wanted][0]} is left out")
    console.print(f"report and tables: {out}", soft_wrap=True, markup=False)
