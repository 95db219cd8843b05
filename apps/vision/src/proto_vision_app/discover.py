"""``proto-vision discover``: sort a folder of images of which few have labels into known and new classes."""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import yaml

from proto_core.cli import instantiate
from proto_core.cli.demo import quiet_lightning, staged_trainer
from proto_core.cli.training import find_config
from proto_core.files import atomic_write, writable_folder
from proto_vision import PartlyLabelled, ProtoGCDModule
from proto_vision.contact_sheet import SheetGroup, SheetItem, contact_sheet
from proto_vision.ood import on_accelerator
from proto_vision.protogcd import estimate_num_classes
from proto_vision.protogcd.system import Discovered

__all__ = ["run"]

STEPS = 8
"""Batches of an epoch, at least, where the batch is not asked for."""


def run(arguments: Any) -> int:
    """Run the command."""
    with quiet_lightning():
        return _run(arguments)


def _run(arguments: Any) -> int:
    started = time.monotonic()
    out = writable_folder(arguments.out, "--out")
    if arguments.shown < 1:
        raise ValueError(f"--shown: found {arguments.shown}, needed 1 image of each class at least")
    settings = _settings(arguments)
    source = PartlyLabelled(arguments.folder, unlabelled=arguments.unlabelled, labels=arguments.labels)
    candidates = _candidates(arguments, len(source.known_names))
    if arguments.batch_size is None:
        wanted = settings["data"]["init_args"].get("batch_size", 64)
        settings["data"]["init_args"]["batch_size"] = max(2, min(wanted, len(source.record_ids) // STEPS))
    scores: dict[int, float] = {}
    best: tuple[ProtoGCDModule, PartlyLabelled, Discovered] | None = None
    for number, count in enumerate(candidates, 1):
        sys.stdout.write(f"{count} classes ({number} of {len(candidates)}): training\n")
        sys.stdout.flush()
        trained = _trained(settings, count, out)
        scores[count] = trained[0].fit_score(trained[2])
        sys.stdout.write(f"{count} classes: score {scores[count]:.4f}\n")
        if best is None or estimate_num_classes(scores) == count:
            best = trained
    assert best is not None
    network, data, found = best
    _write_candidates(scores, out / "candidates.csv")
    _write_clusters(network, data, found, out / "clusters.csv")
    with atomic_write(out / "contact_sheet.html") as file:
        file.write(_sheet(network, data, found, arguments.shown, scores))
    _say(network, data, found, scores, out)
    sys.stdout.write(f"time: {time.monotonic() - started:.0f} s\n")
    return 0


def _settings(arguments: Any) -> dict[str, Any]:
    """Model and data of the config, with what the command line names in its place."""
    from proto_vision_app.main import APP

    path = find_config(APP, arguments.config)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or settings.get("model", {}).get("class_path") != "proto_vision.ProtoGCDModule":
        raise ValueError(f"--config {arguments.config!r}: needed one of proto_vision.ProtoGCDModule")
    model, data = (dict(settings[part].get("init_args") or {}) for part in ("model", "data"))
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    model |= {name: given[name] for name in ("backbone", "pretrained", "trained") if name in given}
    if arguments.epochs is not None:
        model["schedule"] = (model.get("schedule") or {}) | {"epochs": arguments.epochs}
    if arguments.augment is not None:
        data |= {"augment": arguments.augment, "views": [arguments.augment]}
    named = ("image_size", "in_channels", "resize", "batch_size", "num_workers", "unlabelled", "labels")
    data |= {name: given[name] for name in named if name in given}
    data |= {"root": str(Path(arguments.folder).expanduser().resolve()), "skip_corrupt": True}
    return {
        "seed_everything": arguments.seed,
        "model": {"class_path": "proto_vision.ProtoGCDModule", "init_args": model},
        "data": {"class_path": "proto_vision.PartlyLabelled", "init_args": data},
    }


def _candidates(arguments: Any, known: int) -> list[int]:
    """Numbers of classes to try: the one that is known, those asked for, or as many as have labels to thrice that."""
    if arguments.classes is not None and arguments.candidates:
        raise ValueError("--classes, --candidates: needed one of them: the number of classes, or numbers to try")
    least = max(known, 2)
    asked = [arguments.classes] if arguments.classes is not None else arguments.candidates
    numbers = asked or [max(least, round(known * (1 + half / 2))) for half in range(5)]
    if wrong := [number for number in numbers if number < least]:
        raise ValueError(f"--classes, --candidates: found {wrong}, needed at least {least}: {known} have labels")
    return sorted(set(numbers))


def _trained(settings: dict[str, Any], count: int, out: Path) -> tuple[ProtoGCDModule, PartlyLabelled, Discovered]:
    """A network of so many classes, its data, and what it says about every image."""
    data_settings = settings["data"] | {"init_args": settings["data"]["init_args"] | {"num_classes": count}}
    kept = yaml.safe_dump(settings | {"data": data_settings}, sort_keys=False)
    pl.seed_everything(settings["seed_everything"], workers=True, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "discover.yaml"
        config.write_text(kept, encoding="utf-8")
        network, data = instantiate(config, [])
    trainer = staged_trainer(out, f"checkpoints/{count}", kept)
    trainer.fit(network, datamodule=data)
    return network, data, on_accelerator(network).discover(data)  # type: ignore[operator]


def _write_candidates(scores: dict[int, float], path: Path) -> None:
    best = estimate_num_classes(scores)
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["classes", "score", "chosen"])
        writer.writerows((count, f"{score:.6f}", int(count == best)) for count, score in scores.items())


def _label(data: PartlyLabelled, row: int) -> str:
    """The label that an image had, or nothing."""
    target = int(data.table.targets[row])
    return data.known_names[target] if target < len(data.known_names) else ""


def _write_clusters(network: ProtoGCDModule, data: PartlyLabelled, found: Discovered, path: Path) -> None:
    """One row for each image, in the order of the data."""
    probability, place = found.probabilities.max(1)
    names = network.label_names
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "cluster", "probability"])
        for row, cluster, sure in zip(found.rows.tolist(), place.tolist(), probability.tolist()):
            writer.writerow([data.record_ids[row], _label(data, row), names[cluster], f"{sure:.6f}"])


def _counts(network: ProtoGCDModule, found: Discovered) -> list[tuple[int, int]]:
    """Images and labelled images of each cluster."""
    place = found.probabilities.argmax(1)
    every, labelled = (places.bincount(minlength=network.num_classes) for places in (place, place[found.labelled]))
    return list(zip(every.tolist(), labelled.tolist()))


def _sheet(
    network: ProtoGCDModule, data: PartlyLabelled, found: Discovered, shown: int, scores: dict[int, float]
) -> str:
    """The clusters, largest first within known and within new ones; of each the surest images without a label."""
    probability, place = found.probabilities.max(1)
    sure, cluster, free = probability.numpy(), place.numpy(), ~found.labelled.numpy()
    groups = []
    for number, (name, (images, labelled)) in enumerate(zip(network.label_names, _counts(network, found))):
        mine = np.flatnonzero((cluster == number) & free)
        best = mine[np.argsort(-sure[mine], kind="stable")][:shown]
        kind = "known class" if bool(network.old[number]) else "new class"
        note = f"{kind}, images: {images}, of which {labelled} had a label"
        groups.append(
            (-int(network.old[number]), -images, SheetGroup(name, note, [_item(data, found, sure, n) for n in best]))
        )
    groups.sort(key=lambda group: group[:2])
    unlabelled = int((~found.labelled).sum())
    return contact_sheet(
        [group for _, _, group in groups],
        title="Discovered classes",
        info={
            "images": str(len(found.rows)),
            "with a label": str(len(found.rows) - unlabelled),
            "classes": f"{len(data.known_names)} known, {network.num_classes - len(data.known_names)} new",
            "tried": ", ".join(f"{count} ({score:.3f})" for count, score in scores.items()),
        },
        note=f"At most {shown} images of each class, the surest first; images that had a label are left out. "
        "clusters.csv lists all of them.",
    )


def _item(data: PartlyLabelled, found: Discovered, sure: np.ndarray, position: int) -> SheetItem:
    name = data.record_ids[int(found.rows[position])]
    return SheetItem(data.view(name), Path(name).name, f"probability {sure[position]:.2f}")


def _say(network: ProtoGCDModule, data: PartlyLabelled, found: Discovered, scores: dict[int, float], out: Path) -> None:
    counts = _counts(network, found)
    width = max(map(len, network.label_names))
    lines: Sequence[str] = [
        f"{name:<{width}}  {images:>6} images, {labelled} with a label"
        for name, (images, labelled) in zip(network.label_names, counts)
    ]
    chosen = estimate_num_classes(scores)
    tried = f"estimated among {list(scores)}" if len(scores) > 1 else "as asked for"
    empty = sum(images == 0 for images, _ in counts)
    if empty:
        lines = [*lines, f"{empty} classes have no image: train longer (--epochs) or from pretrained weights"]
    sys.stdout.write(
        "\n".join(
            [
                f"\nclasses: {chosen} ({tried})",
                *lines,
                f"clusters: {out / 'clusters.csv'}",
                f"contact sheet: {out / 'contact_sheet.html'}",
                f"checkpoint: {out / 'checkpoints' / str(chosen) / 'final.ckpt'}\n",
            ]
        )
    )
