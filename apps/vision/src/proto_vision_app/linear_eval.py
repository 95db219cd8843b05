"""``proto-vision linear-eval``: what frozen features are worth, by learning curves or by few-shot episodes.

Without ``--episodes``, naive Bayes and logistic regression learn from ever more training samples. With it, a classifier
learns from the few supports of each episode, drawn from the test fold, whose classes need not be those that trained.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from proto_core.checks import check_positive
from proto_core.cli import instantiate
from proto_core.cli.messages import plain_reason
from proto_core.cli.training import data_from_checkpoint, find_config
from proto_core.files import atomic_write, writable_folder
from proto_core.training import load_system
from proto_vision.data.module import ImageDataModule
from proto_vision.disc_vs_gen import (
    FrozenFeatures,
    LearningCurves,
    LinearEvaluation,
    draw_learning_curves,
    fold_features,
    image_set_features,
    read_features,
    read_test_features,
    write_features,
)
from proto_vision.disc_vs_gen.features import create_frozen
from proto_vision.few_shot import episode_accuracy

__all__ = ["run"]

SETTINGS = ("samples_per_class", "repeats", "seed", "eps", "C", "max_iter", "scaling")
"""Options that take the place of a config's."""
EPISODES: dict[str, Any] = {"ways": 5, "shots": [1], "queries": 15, "classifier": "logistic"}
"""Options of few-shot episodes, and what they are where they are not given."""


def run(arguments: Any) -> int:
    """Run the command."""
    out = _place(arguments.out, "--out", (".csv",))
    plot = _place(arguments.plot, "--plot", (".png", ".svg"))
    saved = _place(arguments.save_features, "--save_features", (".npz",))
    assert out is not None
    _check_kind(arguments)
    evaluation = _evaluation(arguments) if arguments.episodes is None else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    features, source = _features(arguments, device or torch.device("cpu"))
    if saved is not None:
        write_features(saved, features)
    if evaluation is None:
        rows = _episodes(arguments, features)
        _write(out, rows)
        _print_episodes(features, rows, source)
        _say_written(out, saved)
        return 0
    # heads are fitted in float64, which Apple's devices do not have
    place = torch.device("cpu") if device is not None and device.type == "mps" else device
    tensors = [part.to(place) for part in features[:4]]
    curves = evaluation(*tensors, progress=_progress)
    curves = curves._replace(accuracy={name: found.cpu() for name, found in curves.accuracy.items()})
    _write(out, list(curves.rows()))
    if plot is not None:
        with atomic_write(plot, "wb") as file:
            draw_learning_curves(curves, file, plot.suffix[1:].lower(), source)  # type: ignore[arg-type]  # see _place
    _print(features, curves, source)
    _say_written(out, plot, saved)
    return 0


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(out) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _say_written(*paths: Path | None) -> None:
    sys.stdout.writelines(f"written: {path}\n" for path in paths if path is not None)


def _check_kind(arguments: Any) -> None:
    """Refuse options of the other kind of evaluation, which would do nothing."""
    curves = ("config", "plot", *(name for name in SETTINGS if name not in ("seed", "C")))
    other, what = (curves, "learning curves, not") if arguments.episodes is not None else (EPISODES, "episodes, needed")
    strange = [f"--{name}" for name in other if getattr(arguments, name) is not None]
    if strange:
        raise ValueError(f"{', '.join(strange)}: for {what} --episodes")
    numbers = {name: getattr(arguments, name) for name in ("episodes", "ways", "queries", "C")}
    numbers["shots"] = None if arguments.shots is None else min(arguments.shots)
    check_positive(**{name: number for name, number in numbers.items() if number is not None})


def _episodes(arguments: Any, features: FrozenFeatures) -> list[dict[str, Any]]:
    """A row for each number of shots."""
    given = {name: value for name in EPISODES if (value := getattr(arguments, name)) is not None}
    options = EPISODES | given | {"episodes": arguments.episodes}
    every = options.pop("shots")
    own = {name: value for name in ("C", "seed") if (value := getattr(arguments, name)) is not None}
    rows = []
    for shots in every:
        found = episode_accuracy(*features[2:4], shots=shots, **options, **own, progress=_progress)
        figures = {"accuracy": found.mean, "half_width": found.half_width}
        rows.append({**options, "shots": shots, **figures})
    return rows


def _progress(steps: Iterable[Any], text: str) -> Iterable[Any]:
    return track(steps, text, transient=True)


def _place(name: str | None, option: str, endings: tuple[str, ...]) -> Path | None:
    """Where something is written, if it is; found out before the work."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix.lower() not in endings:
        raise ValueError(f"{option}: found {name!r}, needed a name that ends in {' or '.join(endings)}")
    writable_folder(path.parent, option)
    return path


def _evaluation(arguments: Any) -> LinearEvaluation:
    """The evaluation of a config, or of the defaults, with the options that were given."""
    from proto_vision_app.main import APP

    settings: dict[str, Any] = {}
    if arguments.config is not None:
        made, _ = instantiate(find_config(APP, arguments.config), [])
        if not isinstance(made, LinearEvaluation):
            raise ValueError(f"--config {arguments.config!r}: sets up a {type(made).__name__}, no LinearEvaluation")
        settings = made.settings()
    given = {name: getattr(arguments, name) for name in SETTINGS}
    return LinearEvaluation(**settings | {name: value for name, value in given.items() if value is not None})


def _features(arguments: Any, device: torch.device) -> tuple[FrozenFeatures, str]:
    """Features of the one source that was named, and its name."""
    named = [name for name in ("features", "ckpt_path", "backbone") if getattr(arguments, name) is not None]
    if len(named) != 1:
        given = " and ".join(f"--{name}" for name in named) or "none"
        raise ValueError(f"features: found {given}, needed one of --features, --ckpt_path and --backbone")
    if arguments.features is not None:
        name = Path(arguments.features).name
        if arguments.episodes is not None:
            return read_test_features(arguments.features), name
        found = read_features(arguments.features, test_fraction=arguments.test_fraction, seed=arguments.seed or 0)
        return found, name
    settings = dict(arguments.data or {})
    if arguments.ckpt_path is not None:
        network = load_system(arguments.ckpt_path, "proto-vision")
        if "class_path" in settings:
            like = {name: getattr(network, name) for name in ("image_size", "in_channels")}
            data = _data(like | settings)
        else:
            data = data_from_checkpoint(arguments.ckpt_path, settings)
        name = f"{network.system} ({Path(arguments.ckpt_path).name})"
    else:
        if not settings:
            raise ValueError("--data: found none, needed --data.root (a folder of classes) or --data.class_path")
        data = _data(settings)
        pl.seed_everything(arguments.seed or 0, verbose=False)
        network = create_frozen(arguments.backbone, data, pretrained=arguments.pretrained)
        untrained = arguments.backbone != "pixels" and not arguments.pretrained
        name = f"{arguments.backbone} (random weights)" if untrained else arguments.backbone
    data.list_skipped_in(Path(arguments.out).parent)
    asked = image_set_features if arguments.episodes is None else fold_features
    return asked(network.to(device), data, progress=_progress), f"{name}, {type(data).__name__}"


def _data(settings: dict[str, Any]) -> ImageDataModule:
    """A data module by its class and settings, as ``fit`` makes it."""
    import jsonargparse

    path = settings.pop("class_path", "proto_vision.ImageFolder")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    try:
        parsed = parser.parse_object({"data": {"class_path": path, "init_args": settings}})
        return parser.instantiate_classes(parsed).data
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"--data: {plain_reason(str(error))}") from error


def _print(features: FrozenFeatures, curves: LearningCurves, source: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    counts = f"{len(features.y_train)} training and {len(features.y_test)} test samples"
    classes = f"{len(features.class_names)} classes, {features.x_train.shape[1]} features"
    console.print(f"{source}: {counts}, {classes}", soft_wrap=True, highlight=False, markup=False)
    table = Table()
    for column in ("per class", "samples", "naive Bayes", "logistic regression"):
        table.add_column(column, justify="right")
    for row in curves.summary():
        cells = [f"{row[name]:.4f} ± {row[f'{name}_std']:.4f}" for name in curves.accuracy]
        table.add_row(str(row["samples_per_class"]), str(row["samples"]), *cells)
    console.print(table)
    crossing = curves.crossing()
    if crossing is None:
        console.print("naive Bayes is not behind at the largest size")
    else:
        console.print(f"logistic regression is ahead from {crossing} samples per class on")


def _print_episodes(features: FrozenFeatures, rows: list[dict[str, Any]], source: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    classes, first = len(features.y_test.unique()), rows[0]
    counts = f"{len(features.y_test)} test samples, {classes} classes, {features.x_test.shape[1]} features"
    console.print(f"{source}: {counts}", soft_wrap=True, highlight=False, markup=False)
    table = Table(title=f"{first['episodes']} episodes, {first['classifier'].replace('_', ' ')}", title_justify="left")
    for column in ("ways", "shots", "queries", "accuracy", "95 % interval"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row['accuracy']:.4f}", f"± {row['half_width']:.4f}")
        table.add_row(*(str(row[name]) for name in ("ways", "shots", "queries")), *figures)
    console.print(table)
