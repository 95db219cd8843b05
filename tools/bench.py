"""Run the benchmarks and print how many times faster ours is than the peer that is measured in the same run.

    uv run tools/bench.py                                   # all of tools/benchmarks
    uv run tools/bench.py tools/benchmarks/ecg -k cluster --markdown table.md

A benchmark's name ends in ``_proto`` (ours) or in what it is compared with: ``_reference`` (plain torch written from
the definition), ``_dense``, the name of a library. Partners share the pytest-benchmark group, the name before that
ending and the parameters. A ratio is the other's median time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proto_core.files import atomic_write

__all__ = ["Line", "compare", "duration", "main", "markdown", "table"]

ROOT = Path(__file__).resolve().parents[1]
OURS = "proto"
NONE = "–"
COLUMNS = ("group", "benchmark", "against", "ours", "other", "ratio", "also measured")


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison, or one benchmark without a partner.

    Attributes:
        group: pytest-benchmark's group.
        name: the benchmark without its ending, with its parameters.
        against: the partner's ending; nothing where there is none.
        ours: median in seconds.
        other: median of the partner in seconds.
        notes: what the benchmarks noted beside their time.
    """

    group: str
    name: str
    against: str = ""
    ours: float | None = None
    other: float | None = None
    notes: str = ""

    @property
    def ratio(self) -> float | None:
        """The other's time over ours."""
        return self.other / self.ours if self.ours and self.other else None

    def cells(self) -> tuple[str, ...]:
        """The line as text, in the order of the columns."""
        ratio = NONE if self.ratio is None else f"{self.ratio:.2f}"
        times = (duration(self.ours), duration(self.other))
        return (self.group, self.name, self.against or NONE, *times, ratio, self.notes or NONE)


def duration(seconds: float | None) -> str:
    """A time with three digits and the unit that suits it."""
    if seconds is None:
        return NONE
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _split(name: str) -> tuple[str, str, str]:
    """Name of a test -> what is measured, ending, parameters: ``test_step_proto[rhythm]`` is step, proto, [rhythm]."""
    found = re.fullmatch(r"(?:test_)?(.*?)_?([^_\[]+)(\[.*\])?", name, flags=re.DOTALL)
    if found is None:
        return name, "", ""
    return found[1], found[2], found[3] or ""


def _notes(*benchmarks: Mapping[str, Any]) -> str:
    noted = []
    for label, benchmark in zip(("ours", "other"), benchmarks):
        for key, value in benchmark["extra_info"].items():
            noted.append(f"{key} {value}" if len(benchmarks) == 1 else f"{key} {value} ({label})")
    return ", ".join(noted)


def compare(benchmarks: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Pair the benchmarks of pytest-benchmark's JSON, in its order; those without a partner come last.

    In a group with one ``_proto`` of some parameters, any other benchmark with these parameters is its partner.
    """
    named = [(b.get("group") or b["fullname"].partition("::")[0], *_split(b["name"]), b) for b in benchmarks]
    ours = [entry for entry in named if entry[2] == OURS]
    pairs, alone, met = [], [], set()
    for entry in named:
        group, stem, ending, parameters, benchmark = entry
        if ending == OURS:
            continue
        near = [one for one in ours if (one[0], one[3]) == (group, parameters)]
        near = [one for one in near if one[1] == stem] or (near if len(near) == 1 else [])
        median = benchmark["stats"]["median"]
        if not near:
            name = benchmark["name"].removeprefix("test_")
            alone.append(Line(group, name, other=median, notes=_notes(benchmark)))
            continue
        mine = near[0][4]
        met.add(mine["fullname"])
        notes = _notes(mine, benchmark)
        pairs.append(Line(group, f"{near[0][1]}{parameters}", ending, mine["stats"]["median"], median, notes))
    for group, stem, _, parameters, benchmark in ours:
        if benchmark["fullname"] not in met:
            median = benchmark["stats"]["median"]
            alone.append(Line(group, f"{stem}{parameters}", ours=median, notes=_notes(benchmark)))
    return pairs + alone


def caption(result: Mapping[str, Any]) -> str:
    """Where and when the figures were measured."""
    machine, commit = result.get("machine_info", {}), result.get("commit_info", {})
    chip = machine.get("cpu", {}).get("brand_raw") or machine.get("machine", "unknown machine")
    changes = " + changes" if commit.get("dirty") else ""
    return (
        f"Medians; ratio = other / ours, above 1 ours is faster. {chip}, "
        f"Python {machine.get('python_version', '?')}, commit {str(commit.get('id') or 'unknown')[:7]}{changes}, "
        f"{str(result.get('datetime', ''))[:10]}"
    )


def table(lines: Sequence[Line]) -> Table:
    """The comparison for the screen; a ratio below 1 in red."""
    drawn = Table()
    for column in COLUMNS:
        right = column in ("ours", "other", "ratio")
        drawn.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for line in lines:
        style = "red" if line.ratio is not None and line.ratio < 1 else None
        drawn.add_row(*map(Text, line.cells()), style=style)
    return drawn


def markdown(lines: Sequence[Line], note: str) -> str:
    """The comparison as a page."""
    rows = ["# Benchmarks", "", note, "", "| " + " | ".join(COLUMNS) + " |", "|---|---|---|---:|---:|---:|---|"]
    rows += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line.cells()) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and print the table; the exit status."""
    parser = argparse.ArgumentParser(description="Run the benchmarks and print ratios to their partners.")
    parser.add_argument("paths", nargs="*", help="files or folders; default: tools/benchmarks")
    parser.add_argument("-k", dest="keyword", help="only benchmarks whose name fits, as in pytest")
    parser.add_argument("-m", dest="marker", default="not gpu", help="only benchmarks with these markers, as in pytest")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    parser.add_argument("--json", type=Path, help="print the table of this file of an earlier run, and run nothing")
    arguments = parser.parse_args(argv)
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.json or Path(folder) / "benchmarks.json"
        if arguments.json is None:
            paths = [str(Path(path).resolve()) for path in arguments.paths] or [str(ROOT / "tools" / "benchmarks")]
            options = ["-v", "-m", arguments.marker, "--benchmark-only", f"--benchmark-json={file}"]
            options += ["-k", arguments.keyword] if arguments.keyword else []
            status = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *paths], cwd=ROOT, check=False
            ).returncode
        if not file.is_file() or file.stat().st_size == 0:
            print("no benchmark was run", file=sys.stderr)
            return status or 1
        result = json.loads(file.read_text(encoding="utf-8"))
    lines, note = compare(result["benchmarks"]), caption(result)
    Console(width=None if sys.stdout.isatty() else 160).print(table(lines))
    print(note)
    if arguments.markdown:
        with atomic_write(arguments.markdown) as out:
            out.write(markdown(lines, note))
        print(f"written: {arguments.markdown}")
    return status


if __name__ == "__main__":
    sys.exit(main())
