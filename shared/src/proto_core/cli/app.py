"""Dispatch of commands, help texts and error messages; imports torch only through the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from proto_core.cli.messages import plain_reason, tidy_output

__all__ = ["App", "Command", "instantiate", "main"]

_TRAINING = {
    "fit": "train a system: every stage of its curriculum, or those named with --curriculum.only",
    "validate": "figures on the validation fold",
    "test": "figures on the test fold, as a table and as CSV",
    "predict": "probabilities as CSV or Parquet",
}


@dataclass(frozen=True, slots=True)
class Command:
    """A command that an app adds.

    Attributes:
        help: one line.
        run: ``module:function``, called with the parsed arguments; returns the exit status or ``None``.
        configure: adds arguments to a jsonargparse parser.
    """

    help: str
    run: str
    configure: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class App:
    """A domain's command line.

    Attributes:
        name: the console command.
        package: the distribution whose systems it lists.
        summary: one line for the help text.
        configs: folder of the configs that it ships, ``<system>/<name>.yaml``.
        commands: its own commands by name.
    """

    name: str
    package: str
    summary: str
    configs: Path
    commands: dict[str, Command] = field(default_factory=dict)


def main(app: App, argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        app: the domain's app.
        argv: arguments after the command's name; by default those of the process.

    Returns:
        Exit status: 0, or 2 after an error that is the user's to mend (its message goes to stderr).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help(app))
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"{app.name} {_version(app.package)}\n")
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name == "list":
            return _list(app, rest)
        if name in app.commands:
            return _run(app, name, rest)
        if name in _TRAINING:
            run = import_module("proto_core.cli.training").run
            with tidy_output(("proto_core", app.package.replace("-", "_"))):
                return int(run(app, name, rest) or 0)
    except argparse.ArgumentError as error:
        reason = plain_reason(str(error))
        sys.stderr.write(f"{app.name} {name}: error: {reason}\n('{app.name} {name} --help' shows the options)\n")
        return 2
    except (ValueError, OSError) as error:
        if os.environ.get("PROTO_DEBUG"):
            raise
        reason = plain_reason(str(error))
        sys.stderr.write(f"{app.name} {name}: error: {reason}\n(set PROTO_DEBUG=1 to see where)\n")
        return 2
    known = ["list", *_TRAINING, *app.commands]
    sys.stderr.write(f"{app.name}: error: unknown command {name!r}, needed one of {', '.join(known)}\n")
    return 2


def _help(app: App) -> str:
    rows = {
        "list": "the systems of this package: paper, year, what each does",
        **_TRAINING,
        **{name: command.help for name, command in app.commands.items()},
    }
    width = max(map(len, rows))
    configs = sorted(str(path.relative_to(app.configs)) for path in app.configs.glob("*/*.yaml"))
    lines = [f"usage: {app.name} COMMAND [options]", "", app.summary, "", "commands:"]
    lines += [f"  {name:<{width}}  {text}" for name, text in rows.items()]
    lines += ["", f"'{app.name} COMMAND --help' shows a command's options.", "", "configs for --config:"]
    lines += [f"  {name}" for name in configs]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _list(app: App, rest: list[str]) -> int:
    import jsonargparse

    from proto_core.systems import catalogue

    parser = jsonargparse.ArgumentParser(prog=f"{app.name} list", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--names", action="store_true", help="only the keys, one a line")
    chosen = parser.parse_args(rest)
    systems = catalogue(app.package)
    if chosen.names:
        sys.stdout.write("".join(f"{key}\n" for key in systems))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Systems of {app.package}", title_justify="left")
    for column in ("system", "year", "paper", "evidence", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column in ("system", "year"))
    for key, system in systems.items():
        paper = system.paper
        source = f"{paper.title} (arXiv {paper.arxiv})" if paper.arxiv else paper.title
        table.add_row(key, str(paper.year), source, paper.evidence, paper.summary)
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)
    return 0


def _run(app: App, name: str, rest: list[str]) -> int:
    import jsonargparse

    command = app.commands[name]
    parser = jsonargparse.ArgumentParser(
        prog=f"{app.name} {name}", description=command.help, exit_on_error=False, allow_abbrev=False
    )
    command.configure(parser)
    arguments = parser.parse_args(rest)
    module, name = command.run.split(":")
    function = getattr(import_module(module), name)
    with tidy_output():
        return int(function(arguments) or 0)


def instantiate(config: str | Path, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """Build what a config sets up: the model and the data module of a system that trains, as the command line does.

    A system that does not train by itself (a loss, a metric, an analysis) is built from ``model.class_path`` and
    ``model.init_args`` alone: the object of a class, or a function with its settings filled in.

    Args:
        config: a YAML file.
        overrides: further arguments, such as ``["--data.batch_size", "8"]``.

    Returns:
        The system and the data module (``None`` where the system has none).

    Raises:
        ValueError: no ``model.class_path``, a class that cannot be imported, arguments that it does not take.
    """
    return import_module("proto_core.cli.training").instantiate(config, list(overrides))
