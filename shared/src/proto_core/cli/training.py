"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a curriculum, and settings kept in checkpoints."""

from __future__ import annotations

import csv
import inspect
import logging
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from proto_core.cli.app import App
from proto_core.cli.messages import plain_reason
from proto_core.files import atomic_write, writable_folder
from proto_core.training import Curriculum, WholeFileCheckpointIO, read_checkpoint
from proto_core.training.stages import HasStages

__all__ = ["ProtoCLI", "data_from_checkpoint", "data_settings", "find_config", "instantiate", "run", "write_results"]

log = logging.getLogger(__name__)

_LINKS = (
    *("label_names", "branch_labels", "num_samples", "sampling_rate"),
    *("num_classes", "class_names", "image_size", "in_channels"),
    *("mean", "std"),
)
"""Attributes of a data module that become arguments of a model that has an argument of that name."""
_SUBCOMMANDS = ("fit", "validate", "test", "predict")


class KeepSettings(pl.Callback):
    """Puts the run's model and data settings into every checkpoint, so that it can be tested and explained alone."""

    def __init__(self, settings: str) -> None:
        self.settings = settings

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Add the settings."""
        checkpoint["proto_run"] = self.settings


class WritePredictions(pl.Callback):
    """Collects predictions of all ranks and writes one table when prediction ends.

    Args:
        out: the table; ``.parquet`` or ``.csv``.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.written = out, 0
        self.parts: list[dict[str, torch.Tensor]] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Keep what the table needs."""
        kept = ("index", "probabilities", "decisions", "embeddings")
        self.parts.append({key: outputs[key].detach().cpu() for key in kept if key in outputs})

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, drop a distributed sampler's repeats, write."""
        joined = {key: torch.cat([part[key] for part in self.parts]) for key in self.parts[0]}
        shares: list[Any] = [joined]
        if dist.is_available() and dist.is_initialized():
            shares = [None] * dist.get_world_size()
            dist.all_gather_object(shares, joined)
        if trainer.is_global_zero:
            joined = {key: torch.cat([share[key] for share in shares]) for key in joined}
            self.written = write_predictions(joined, pl_module, trainer.datamodule, self.out)  # type: ignore[attr-defined]


def write_predictions(joined: dict[str, torch.Tensor], module: Any, data: Any, out: Path) -> int:
    """Write probabilities and decisions, or embeddings, one row per sample in data order.

    Parquet by the ending ``.parquet``. Embeddings of D numbers are the columns ``e0`` to ``e{D-1}``.

    Returns:
        The number of rows.
    """
    order = {int(index): row for row, index in reversed(list(enumerate(joined["index"])))}
    rows = [order[index] for index in sorted(order)]
    names = [data.record_ids[index] for index in sorted(order)]
    columns: dict[str, list[Any]] = {"record": names}
    if "embeddings" in joined:
        columns |= {f"e{number}": values.tolist() for number, values in enumerate(joined["embeddings"][rows].T)}
    labels = module.label_names if "probabilities" in joined else []
    for column, label in enumerate(labels):
        columns[label] = joined["probabilities"][rows, column].tolist()
    if "decisions" in joined:
        decided = joined["decisions"][rows]
        columns["predicted"] = [";".join(label for label, flag in zip(labels, row) if flag) for row in decided.tolist()]
    if out.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f"--out {str(out)!r}: Parquet needs the package pyarrow; .csv needs nothing") from error

        with atomic_write(out, "wb") as file:
            pyarrow.parquet.write_table(pyarrow.table(columns), file)
    else:
        with atomic_write(out) as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values()))
    return len(rows)


def write_results(results: dict[str, Any], out: Path) -> None:
    """Print a test's figures as a table and write those of each label as CSV."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['records']} records", title_justify="left")
    rows = results["labels"]
    columns = list(rows[0]) if rows else []
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*[f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()])
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, value in results["summary"].items():
        console.print(f"{name:>24}  {value:.4f}")
    with atomic_write(out) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(out.with_name(out.stem + "_summary.csv")) as file:
        csv.writer(file).writerows([["metric", "value"], *results["summary"].items()])
    console.print(f"figures: {out}", soft_wrap=True)


class ProtoCLI(LightningCLI):
    """LightningCLI for systems with a curriculum; ``out`` names the table that test and predict write."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The curriculum, the output file, and what the model learns from the data."""
        parser.add_lightning_class_args(Curriculum, "curriculum")
        parser.add_argument("--out", type=str | None, default=None, help="table that test and predict write")
        for name in _LINKS:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with checkpoints that are written whole and hold the run's settings.

        A curriculum writes its own checkpoints: Lightning's come beside them only where they are asked for.
        """
        asked = self._get(self.config_init, "trainer", default={})
        own = any(isinstance(item, pl.callbacks.Checkpoint) for item in _listed(asked.get("callbacks")))
        if (
            isinstance(getattr(self, "model", None), HasStages)
            and asked.get("enable_checkpointing") is None
            and not own
        ):
            kwargs["enable_checkpointing"] = False
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(self.model, pl.LightningModule):
            trainer.strategy.checkpoint_io = WholeFileCheckpointIO()
        config = self.config[self.subcommand] if self.subcommand else self.config
        plain = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True))
        kept = {key: plain.get(key) for key in ("seed_everything", "model", "data")}
        kept["trainer"] = {"default_root_dir": plain["trainer"]["default_root_dir"]}
        settings = yaml.safe_dump(kept, sort_keys=False)
        trainer.callbacks.insert(0, KeepSettings(settings))  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        """Turn ``--ckpt_path last`` into the run's own last checkpoint."""
        config = self.config_init["fit"]
        root = Path(self.trainer.default_root_dir)
        writable_folder(root, "--trainer.default_root_dir")
        if config.get("ckpt_path") == "last":
            folder = Path(config["curriculum"].dirpath or root / "checkpoints")
            path = folder / "last.ckpt"
            if not path.is_file():
                log.warning("nothing to resume at %s: training starts from the beginning", path)
            config["ckpt_path"] = str(path) if path.is_file() else None

    def _out(self, subcommand: str, default: str) -> Path:
        config = self.config_init[subcommand]
        out = Path(config.get("out") or Path(self.trainer.default_root_dir) / default)
        writable_folder(out.parent, "--out")
        return out

    def before_test(self) -> None:
        """Find out before the work whether the output can be written; a model's own table replaces Lightning's."""
        self._out("test", "test_metrics.csv")
        if hasattr(self.model, "test_results"):
            self.config_init["test"]["verbose"] = False

    def after_test(self) -> None:
        """Print and write the figures."""
        results = getattr(self.model, "test_results", None)
        if results and self.trainer.is_global_zero:
            write_results(results, self._out("test", "test_metrics.csv"))

    def before_predict(self) -> None:
        """Collect predictions into a table."""
        self.table = WritePredictions(self._out("predict", "predictions.csv"))
        self.trainer.callbacks.append(self.table)  # type: ignore[attr-defined]
        self.config_init["predict"]["return_predictions"] = False

    def after_predict(self) -> None:
        """Say where the table is."""
        if self.trainer.is_global_zero:
            sys.stdout.write(f"{self.table.written} predictions: {self.table.out}\n")


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks]


def find_config(app: App | None, name: str) -> Path:
    """The file ``name``, or the shipped config of that name where there is no such file.

    Raises:
        ValueError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = app.configs / name if app is not None else Path(name)
    if not shipped.is_file():
        known = sorted(str(path.relative_to(app.configs)) for path in app.configs.glob("*/*.yaml")) if app else []
        raise ValueError(f"--config: no file {name!r}, and the shipped configs are {known}")
    return shipped


def _find_configs(app: App | None, arguments: Sequence[str]) -> list[str]:
    """Replace ``--config NAME`` by the shipped file of that name where there is no such file here."""
    found, expect = [], False
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if expect:
            found.append(str(find_config(app, argument)))
        elif flag in ("-c", "--config") and value:
            found.append(f"{flag}={find_config(app, value)}")
        else:
            found.append(argument)
        expect = argument in ("-c", "--config")
    return found


def _value(arguments: Sequence[str], option: str) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
    return None


def run(app: App, subcommand: str, arguments: list[str]) -> int:
    """Run one of LightningCLI's subcommands; test, predict and validate take their settings from the checkpoint."""
    arguments = _find_configs(app, arguments)
    checkpoint = _value(arguments, "--ckpt_path")
    known = read_checkpoint(checkpoint) if checkpoint and not (subcommand == "fit" and checkpoint == "last") else {}
    if subcommand != "fit" and not known and not {"-h", "--help"} & set(arguments):
        raise ValueError("--ckpt_path: found none, needed a checkpoint that fit has written")
    with tempfile.TemporaryDirectory() as folder:
        if subcommand != "fit" and known.get("proto_run"):
            stored = Path(folder) / "stored.yaml"
            stored.write_text(known["proto_run"], encoding="utf-8")
            arguments = ["--config", str(stored), *arguments]
        del known
        strict = {"exit_on_error": False, "allow_abbrev": False}
        try:
            ProtoCLI(
                args=[subcommand, *arguments],
                save_config_callback=SaveConfigCallback if subcommand == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": app.name, **strict} | dict.fromkeys(_SUBCOMMANDS, strict),
                trainer_defaults={"max_epochs": -1, "num_sanity_val_steps": 0, "logger": subcommand == "fit"},
            )
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--ckpt_path {checkpoint}: the weights do not fit this model ({reason})") from error
    return 0


def instantiate(config: str | Path, overrides: list[str]) -> tuple[Any, Any]:
    """See :func:`proto_core.cli.instantiate`."""
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "class_path" not in (settings.get("model") or {}):
        raise ValueError(f"config {str(config)!r}: found no model.class_path, needed the system that it sets up")
    target = _import(settings["model"]["class_path"], config)
    if not (isinstance(target, type) and issubclass(target, pl.LightningModule)):
        return _plain(target, settings["model"], config, overrides), None
    cli = ProtoCLI(
        args=["--config", str(config), *overrides],
        run=False,
        save_config_callback=None,
        trainer_defaults={"logger": False, "accelerator": "cpu", "enable_progress_bar": False},
    )
    return cli.model, cli.datamodule


def _import(path: str, config: str | Path) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"config {str(config)!r}: model.class_path {path!r} cannot be imported: {error}") from error


def _plain(target: Any, model: dict[str, Any], config: str | Path, overrides: list[str]) -> Any:
    """A system that does not train by itself: the object of a class, or a function with its settings filled in."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    is_class = isinstance(target, type)
    add = parser.add_class_arguments if is_class else parser.add_function_arguments
    settings = dict(model.get("init_args") or {})
    names = set(inspect.signature(target).parameters)
    needed = {
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    unknown = sorted(set(settings) - names)
    if unknown:
        raise ValueError(f"config {str(config)!r}: unknown init_args {unknown}, needed some of {sorted(names)}")
    # The inputs of a function (arrays) are no settings, and neither are the required ones that the config leaves out.
    skipped: set[str | int] = {name for name in needed if name not in settings}
    if is_class and skipped:
        raise ValueError(f"config {str(config)!r}: init_args lacks {sorted(map(str, skipped))}")
    add(target, "model", skip=skipped)
    try:
        parser.set_defaults({f"model.{name}": value for name, value in settings.items()})
        parsed = parser.parse_args(overrides)
        if is_class:
            return parser.instantiate_classes(parsed).model
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"config {str(config)!r}: {error}") from error
    return partial(target, **parsed.model.as_dict())


def data_settings(path: str | Path) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of the data module that a checkpoint was trained with.

    Raises:
        ValueError: the checkpoint does not say how its data was read.
    """
    stored = read_checkpoint(path).get("proto_run")
    data = yaml.safe_load(stored).get("data") if stored else None
    if not data:
        raise ValueError(f"checkpoint {str(path)!r}: does not say how its data was read (not written by fit or demo)")
    return {"class_path": data["class_path"], "init_args": dict(data.get("init_args") or {})}


def data_from_checkpoint(path: str | Path, overrides: dict[str, Any] | None = None) -> Any:
    """The data module that a checkpoint was trained with, its arguments replaced where ``overrides`` names them.

    Args:
        path: a checkpoint written by the command line.
        overrides: arguments of the data module, such as ``{"root": "..."}``; ``None`` values are ignored.

    Raises:
        ValueError: the checkpoint does not say how its data was read.
    """
    data = data_settings(path)
    import jsonargparse

    arguments = data["init_args"] | {k: v for k, v in (overrides or {}).items() if v is not None}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    try:
        parsed = parser.parse_object({"data": {"class_path": data["class_path"], "init_args": arguments}})
        return parser.instantiate_classes(parsed).data
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r}, its data: {plain_reason(str(error))}") from error
