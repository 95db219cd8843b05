"""``proto-vision clean-labels``: which images of a folder have a wrong label, as a table and as a page to look at."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from proto_core.cli import instantiate
from proto_core.cli.demo import quiet_lightning, staged_trainer
from proto_core.cli.training import data_from_checkpoint, find_config
from proto_core.files import atomic_write, writable_folder
from proto_core.metrics import auroc
from proto_core.training import load_system
from proto_vision.data.module import ImageDataModule
from proto_vision.label_cleaning import JudgedLabels, judge_data, suspicion_sheet, write_suspicions
from proto_vision.ood import on_accelerator

__all__ = ["run"]


def run(arguments: Any) -> int:
    """Run the command."""
    out, sheet = Path(arguments.out), Path(arguments.sheet)
    for path, argument in ((out, "--out"), (sheet, "--sheet")):
        writable_folder(path.parent, argument)
    if arguments.shown < 1:
        raise ValueError(f"--shown: found {arguments.shown}, needed 1 or more")
    if (arguments.folder is None) == (arguments.ckpt_path is None):
        raise ValueError("folder, --ckpt_path: needed one of them, a folder to train on or a checkpoint")
    if arguments.ckpt_path is None:
        with quiet_lightning():
            network, data, source = _trained(arguments)
    else:
        if arguments.config is not None or arguments.trusted is not None:
            raise ValueError("--config, --trusted: these are for a folder; a checkpoint has settings of its own")
        network = load_system(arguments.ckpt_path, "proto-vision")
        data = data_from_checkpoint(arguments.ckpt_path, {"root": arguments.root})
        data.prepare_in(out.parent)
        source = Path(arguments.ckpt_path).name
    _check_judges(network)
    judged = judge_data(on_accelerator(network), data)  # type: ignore[arg-type]
    write_suspicions(out, judged, data)
    info = {"model": f"{network.paper.title} ({network.system})", "data": str(data.root), "checkpoint": source}
    with atomic_write(sheet) as file:
        file.write(suspicion_sheet(judged, data, shown=arguments.shown, info=info))
    _say(judged, data, out, sheet)
    return 0


def _check_judges(network: Any) -> None:
    if not hasattr(network, "judge_labels"):
        raise ValueError(f"system {network.system!r} judges no labels, needed one that does, such as cpc or fopro")


def _data_settings(config: Path, places: dict[str, str]) -> dict[str, Any]:
    """The data part of a config, with its folders put in.

    Raises:
        ValueError: a config whose system judges no labels, or whose data is no folder.
    """
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    for part in ("model", "data"):
        path = str((settings.get(part) or {}).get("class_path"))
        module, _, name = path.rpartition(".")
        try:
            target = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--config {str(config)!r}: {part}.class_path {path!r} cannot be imported") from error
        if part == "model":
            _check_judges(target)
        elif lacking := [place for place in places if place not in inspect.signature(target).parameters]:
            raise ValueError(f"--config {str(config)!r}: {path} has no {lacking[0]}, needed a data class that has one")
    return settings["data"] | {"init_args": (settings["data"].get("init_args") or {}) | places}


def _trained(arguments: Any) -> tuple[Any, ImageDataModule, str]:
    """A network trained on the folder, its data, and the name of its checkpoint."""
    from proto_vision_app.main import APP

    root = writable_folder(arguments.run, "--run")
    default = "cpc/clean.yaml" if arguments.trusted is None else "fopro/clean.yaml"
    config = find_config(APP, arguments.config or default)
    places = {"root": str(Path(arguments.folder).expanduser().resolve())}
    if arguments.trusted is not None:
        places["trusted"] = str(Path(arguments.trusted).expanduser().resolve())
    kept = _data_settings(config, places)
    overrides = [part for name, place in places.items() for part in (f"--data.{name}", place)]
    pl.seed_everything(arguments.seed, workers=True, verbose=False)
    network, data = instantiate(config, overrides)
    trainer = staged_trainer(root, "checkpoints", yaml.safe_dump({"data": kept}, sort_keys=False))
    trainer.fit(network, datamodule=data)
    return network, data, str(root / "checkpoints" / "final.ckpt")


def _say(judged: JudgedLabels, data: ImageDataModule, out: Path, sheet: Path) -> None:
    doubtful = int((judged.suspicion > 0.5).sum())
    lines = [f"{len(judged.rows)} images, {doubtful} with a label that is more likely wrong than right"]
    true = data.table.true_targets
    if true is not None:
        wrong = (judged.given != true[judged.rows]) & ~judged.trusted
        right = ~wrong & ~judged.trusted & (data.table.fold[judged.rows] == "train")
        if wrong.any() and right.any():
            found = auroc(judged.suspicion[wrong], judged.suspicion[right])
            lines.append(f"AUROC of wrong labels among training images: {found:.4f} ({int(wrong.sum())} wrong)")
    lines += [f"table: {out}", f"page: {sheet}"]
    sys.stdout.write("\n".join(lines) + "\n")
