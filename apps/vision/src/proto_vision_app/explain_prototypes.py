"""``proto-vision explain-prototypes``: which visible property matters to each prototype, for images and over a set."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from proto_core.cli import instantiate
from proto_core.cli.training import find_config
from proto_core.files import atomic_write, writable_folder
from proto_vision.data.images import read_image
from proto_vision.explaining import CHARACTERISTICS, CheckpointInput, CheckpointMaps, PrototypeExplainer
from proto_vision.explaining.page import ExplainedImage, properties_page
from proto_vision.explaining.perturbations import require_opencv
from proto_vision.explaining.study import PropertyStudy, pixels_of_image, study_prototypes
from proto_vision.explanation import prototype_records

__all__ = ["run"]


def run(arguments: Any) -> int:
    """Run the command."""
    out = writable_folder(arguments.out, "--out")
    explainer, left_out = _explainer(arguments)
    network, data = _parts(explainer)
    places = [data.find_image(name) for name in arguments.images]
    data.prepare_in(out)
    if torch.accelerator.is_available():
        network.to(torch.accelerator.current_accelerator())
    records = prototype_records(network, data)
    versions = 1 + len(explainer.characteristics)
    study = study_prototypes(
        explainer,
        records,
        data,
        folds=("train", "test") if arguments.test else ("train",),
        limit=arguments.limit,
        batch_size=arguments.batch_size or max(1, data.batch_size // versions),
        progress=lambda batches, text: track(batches, text, transient=True),
    )
    images = [_explained(explainer, name, place) for name, place in zip(arguments.images, places)]
    _write_tables(study, images, out)
    html = properties_page(
        study,
        images,
        title="What matters to the prototypes",
        info={
            "model": f"{network.paper.title} ({network.system})",
            "checkpoint": Path(cast(CheckpointMaps, explainer.model).ckpt_path).name,
            "prototypes": str(len(records)),
            "images": ", ".join(f"{count} for {fold}ing" for fold, count in study.images.items()),
        },
        read_case=data.view,
        top=arguments.top,
        limit=arguments.shown,
    )
    with atomic_write(out / "report.html") as file:
        file.write(html)
    _print(study, out, left_out)
    return 0


def _explainer(arguments: Any) -> tuple[PrototypeExplainer, str]:
    """The explainer of a config, or of a checkpoint; and what was left out of it, in words."""
    from proto_vision_app.main import APP

    chosen, note = arguments.characteristics, ""
    if arguments.config is not None:
        explainer, _ = instantiate(find_config(APP, arguments.config), [])
        if not isinstance(explainer, PrototypeExplainer):
            raise ValueError(f"--config {arguments.config!r}: sets up a {type(explainer).__name__}, no explainer")
        path = arguments.ckpt_path or getattr(explainer.model, "ckpt_path", None)
        if path is None:
            raise ValueError(f"--config {arguments.config!r}: its model is no CheckpointMaps, needed --ckpt_path")
        chosen = chosen or explainer.characteristics
    elif arguments.ckpt_path is None:
        raise ValueError("--ckpt_path: found none, needed a checkpoint that fit or demo has written (or --config)")
    else:
        path = arguments.ckpt_path
        if not chosen:
            without = importlib.util.find_spec("cv2") is None
            chosen = [name for name in CHARACTERISTICS if name != "texture"] if without else CHARACTERISTICS
            note = "texture is left out: it needs the extra proto-vision[texture]" if without else ""
    if "texture" in chosen:
        try:
            require_opencv()
        except ImportError as error:
            raise ValueError(f"--characteristics: {error}, or leave texture out") from error
    maps, inputs = CheckpointMaps(path), CheckpointInput(path, root=arguments.root)
    return PrototypeExplainer(maps, inputs, characteristics=chosen), note


def _parts(explainer: PrototypeExplainer) -> tuple[Any, Any]:
    """Network and data module of the checkpoint."""
    return cast(CheckpointMaps, explainer.model).network, cast(CheckpointInput, explainer.preprocess).data


def _explained(explainer: PrototypeExplainer, name: str, place: str | Path) -> ExplainedImage:
    network, data = _parts(explainer)
    image = read_image(place) if isinstance(place, Path) else data.reader()(data.find_row(place))
    pixels = pixels_of_image(image)
    explanation = network.explain(explainer.preprocess(pixels)[None], [name])[0][0]
    return ExplainedImage(name, pixels, data.view(place), explanation, explainer.local(pixels))


def _write_tables(study: PropertyStudy, images: Sequence[ExplainedImage], out: Path) -> None:
    names = study.characteristics
    _write(out / "prototypes.csv", study.rows())
    alike = (
        {"classes": ";".join(pair.classes), "prototype": pair.one, "other": pair.two, "distance": pair.distance}
        for pair in study.alike()
    )
    _write(out / "redundancy.csv", alike)
    folds = list(study.scores)
    agreement = [{"characteristic": name, **values} for name, values in study.generalisation().items()]
    for row in agreement:
        for key, fold in (("a", folds[0]), ("b", folds[-1])):
            for figure in ("mean", "std"):
                row[f"{fold}_{figure}"] = row.pop(f"{figure}_{key}")  # type: ignore[misc]
    _write(out / "characteristics.csv", agreement)
    local = (
        {
            "image": item.name,
            "prototype": p,
            "set": record.group,
            "classes": ";".join(record.classes),
            "similarity": similarity,
            **dict(zip(names, deltas)),
        }
        for item in images
        for p, (record, similarity, deltas) in enumerate(
            zip(study.prototypes, item.scores.similarity[0].tolist(), item.scores.delta[0].T.tolist())
        )
    )
    if images:
        _write(out / "local.csv", local)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _print(study: PropertyStudy, out: Path, left_out: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    counts = ", ".join(f"{count} {fold} images" for fold, count in study.images.items())
    table = Table(title=f"{len(study.prototypes)} prototypes, {counts}: mean global scores", title_justify="left")
    both = len(study.scores) > 1
    for column in ("property", *study.scores, *(["Welch's p"] if both else []), "first for"):
        table.add_column(column, justify="left" if column == "property" else "right")
    firsts = [found[0][0] for p in range(len(study.prototypes)) if (found := study.described(p))[0][1] == found[0][1]]
    for name, row in sorted(study.generalisation().items(), key=lambda item: -item[1]["mean_a"]):
        figures = [f"{row['mean_a']:.4f}", *([f"{row['mean_b']:.4f}", f"{row['welch_p']:.3f}"] if both else [])]
        table.add_row(name, *figures, str(firsts.count(name)))
    console.print(table)
    if left_out:
        console.print(left_out, soft_wrap=True, markup=False)
    console.print(f"report and tables: {out}", soft_wrap=True, markup=False)
