"""Run the claims of the systems and write the table CLAIMS.md: what each paper says, and what was measured here.

    uv run tools/claims.py                      # all of them
    uv run tools/claims.py protoecgnet          # some, by key or by path; the other rows stay as they are

Every figure is a row with the commit that it comes from. The exit status is not 0 if a claim does not hold or crashes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from proto_core.files import atomic_write
from proto_core.systems import catalogue

__all__ = ["Outcome", "Row", "main", "mean_and_spread", "merge", "page", "read_page", "rows_of"]

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("shared/claims", "packages/*/claims")
HOLDS, FAILS, ERROR, NOT_RUN = "holds", "does not hold", "error", "not run"
NONE = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, each cell as it is read."""

    key: str
    claim: str
    metric: str
    method: str
    baseline: str
    margin: str
    verdict: str
    seconds: str
    commit: str

    def __post_init__(self) -> None:
        for field in fields(self):  # one line, and nothing that a reader of Markdown takes for a link
            text = " ".join(getattr(self, field.name).split()).replace("](", "] (")
            object.__setattr__(self, field.name, text)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What pytest says about one test.

    Attributes:
        file: path from the root.
        name: name of the function, with its parameters.
        state: "passed", "failed" or "skipped".
        seconds: how long it took.
        reason: first line of what went wrong.
    """

    file: str
    name: str
    state: str
    seconds: float
    reason: str

    @property
    def key(self) -> str:
        """The system, by the name of the file."""
        return system_of(Path(self.file))


def system_of(file: Path) -> str:
    """The system of a claim file: of ``test_KEY.py``, or ``test_KEY_MORE.py`` where KEY is the longest that fits."""
    name = file.stem.removeprefix("test_")
    return max((key for key in catalogue() if f"{name}_".startswith(f"{key}_")), key=len, default=name)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, sample standard deviation (with two digits that count) and number of seeds."""
    if not values:
        return NONE
    mean = statistics.fmean(values)
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return f"{mean:.4g} (n = {len(values)})"
    spread = statistics.stdev(values)
    if spread < 1e-12 * max(abs(mean), 1e-300):
        return f"{mean:.4g} ± 0 (n = {len(values)})"
    decimals = 1 - math.floor(math.log10(spread))
    if decimals > 6 or spread >= 1e6:
        return f"{mean:.4g} ± {spread:.1e} (n = {len(values)})"
    return f"{mean:.{max(decimals, 0)}f} ± {spread:.{max(decimals, 0)}f} (n = {len(values)})"


def rows_of(
    records: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], sentences: Mapping[str, str], commit: str
) -> list[Row]:
    """The rows of one run: one for each figure, and one for each test that failed for another reason than a figure."""
    rows = [
        Row(
            key=record["key"],
            claim=sentences.get(record["key"], NONE),
            metric=record["metric"],
            method=mean_and_spread(record["method"]),
            baseline=mean_and_spread(record["baseline"]),
            margin=record["margin"],
            verdict=HOLDS if record["holds"] else FAILS,
            seconds=f"{record['seconds']:.0f}",
            commit=commit,
        )
        for record in records
    ]
    denied = {_place(record["test"]) for record in records if not record["holds"]}
    for test in outcomes:
        if test.state == "failed" and (test.file, test.name) not in denied:
            rows.append(
                Row(
                    key=test.key,
                    claim=sentences.get(test.key, NONE),
                    metric=f"{test.name}: {test.reason}",
                    method=NONE,
                    baseline=NONE,
                    margin=NONE,
                    verdict=ERROR,
                    seconds=f"{test.seconds:.0f}",
                    commit=commit,
                )
            )
    return rows


def _place(nodeid: str) -> tuple[str, str]:
    parts = nodeid.split("::")
    return parts[0], parts[-1]


def merge(
    new: Sequence[Row], old: Sequence[Row], sentences: Mapping[str, str], *, unfinished: set[str], whole: bool
) -> list[Row]:
    """The new rows, what they leave of the old ones, and "not run" for systems without any; sorted by key.

    Args:
        new: rows of this run.
        old: rows of the page as it is.
        sentences: system -> its claim, of the whole catalogue.
        unfinished: systems of which some test did not run; their old rows stay where no new row has their metric.
        whole: whether every claim was asked for, so that rows of claims which are gone go too.
    """
    ran = {row.key for row in new}
    measured = {(row.key, row.metric) for row in new}
    kept = [
        row
        for row in old
        if row.verdict != NOT_RUN
        and (row.key, row.metric) not in measured
        and ((row.key in unfinished and row.verdict != ERROR) or (not whole and row.key not in ran))
    ]
    rows = [*new, *kept]
    idle = set(sentences) - {row.key for row in rows}
    rows += [Row(key, sentences[key], NONE, NONE, NONE, NONE, NOT_RUN, NONE, NONE) for key in idle]
    return sorted(rows, key=lambda row: row.key)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def page(rows: Sequence[Row], commit: str, day: date) -> str:
    """The whole of CLAIMS.md."""
    names = [field.name for field in fields(Row)]
    verdicts = [row.verdict for row in rows]
    count = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in (HOLDS, FAILS, ERROR, NOT_RUN))
    lines = [
        "# Claims",
        "",
        "What each paper says, as the smallest honest experiment: method against baseline, mean ± sample standard",
        "deviation over n seeds. `uv run tools/claims.py` runs them and writes this page; `margin` is what was asked.",
        "",
        f"Last run: {day.isoformat()}, commit {commit}. {count}.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    for row in rows:
        lines.append("| " + " | ".join([f"`{row.key}`", *map(_cell, astuple(row)[1:])]) + " |")
    return "\n".join(lines) + "\n"


def read_page(text: str) -> list[Row]:
    """The rows of a page that :func:`page` wrote.

    Raises:
        ValueError: a row of systems with another number of cells.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("| `"):
            continue
        cells = [re.sub(r"\\([\\|])", r"\1", cell.strip()) for cell in re.findall(r"((?:[^|\\]|\\.)*)\|", line)[1:]]
        if len(cells) != len(fields(Row)):
            raise ValueError(
                f"CLAIMS.md:{number}: found {len(cells)} cells, needed {len(fields(Row))}; "
                f"mend the row, or move the file away and run all claims"
            )
        rows.append(Row(cells[0].strip("`"), *cells[1:]))
    return rows


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a run; a last line that a kill has cut is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_outcomes(path: Path) -> list[Outcome]:
    """The tests of pytest's JUnit file; none if pytest did not live to write it."""
    if not path.is_file():
        return []
    outcomes = []
    for case in ET.parse(path).getroot().iter("testcase"):
        state, reason = "passed", ""
        for tag, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            if (found := case.find(tag)) is not None:
                state, reason = name, (found.get("message") or "").strip().partition("\n")[0]
        seconds = float(case.get("time") or 0)
        outcomes.append(Outcome(case.get("file") or "", case.get("name") or "", state, seconds, reason[:200]))
    return outcomes


def targets(root: Path, asked: Sequence[str]) -> list[str]:
    """The claim files of some keys or paths; all folders of claims if nothing is asked for.

    Raises:
        ValueError: neither a path nor a key with a claim.
    """
    if not asked:
        return [str(folder.relative_to(root)) for folder in _folders(root)]
    found = []
    for word in asked:
        if files := files_of(root, word):
            found += [str(file.relative_to(root)) for file in files]
        elif Path(word.partition("::")[0]).exists():
            found.append(str(Path(word.partition("::")[0]).resolve()) + word[len(word.partition("::")[0]) :])
        else:
            keys = {system_of(file) for folder in _folders(root) for file in folder.glob("test_*.py")}
            raise ValueError(f"{word!r} is no path and no system with a claim; those are {', '.join(sorted(keys))}")
    return found


def files_of(root: Path, key: str) -> list[Path]:
    """The claim files of a system, in the core and in its package."""
    return [file for folder in _folders(root) for file in sorted(folder.glob("test_*.py")) if system_of(file) == key]


def _folders(root: Path) -> list[Path]:
    return [folder for place in PLACES for folder in sorted(root.glob(place)) if folder.is_dir()]


def commit_of(root: Path) -> str:
    """Short hash of the commit, "+ changes" where the tree (but for CLAIMS.md) differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", ":(exclude)CLAIMS.md")
        return git("rev-parse", "--short", "HEAD") + (" + changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sentences() -> dict[str, str]:
    """System -> its claim in a sentence, of everything that is installed."""
    found = {}
    for key, system in catalogue().items():
        try:
            found[key] = system.paper.claim
        except Exception as error:  # one system that does not load shall not hide the figures of the others
            found[key] = f"{system.target} does not load: {type(error).__name__}: {error}"
    return found


def run(root: Path, paths: Sequence[str], folder: Path) -> tuple[int, list[dict[str, Any]], list[Outcome]]:
    """Run pytest with its output passed on; its exit status, the figures and the tests."""
    lines, report = folder / "claims.jsonl", folder / "report.xml"
    lines.touch()
    options = ["-m", "claim", "-v", "-rs", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *paths],
        cwd=root,
        env=os.environ | {"PROTO_CLAIMS_FILE": str(lines), "PYTHONUNBUFFERED": "1"},
    )
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # pytest got it too: it ends its work and says what it has
            continue
    return status, read_records(lines), read_outcomes(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the claims and write the table; the exit status."""
    parser = argparse.ArgumentParser(description="Run the claims of the systems and write CLAIMS.md.")
    parser.add_argument("claims", nargs="*", help="keys of systems, or paths of claims; default: all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace")
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    file = root / "CLAIMS.md"
    try:
        old = read_page(file.read_text(encoding="utf-8")) if file.is_file() else []
        paths = targets(root, arguments.claims)
    except ValueError as error:
        parser.error(str(error))
    if not paths:
        parser.error(f"no claims in {root}: needed files in {' or '.join(PLACES)}")
    commit = commit_of(root)
    with tempfile.TemporaryDirectory() as folder:
        status, records, outcomes = run(root, paths, Path(folder))
    known = sentences()
    new = rows_of(records, outcomes, known, commit)
    finished = status in (0, 1, 5)
    unfinished = {test.key for test in outcomes if test.state == "skipped"}
    unfinished |= {system_of(Path(path.partition("::")[0])) for path in paths if "::" in path}
    if arguments.claims:  # a path may be one of several files of a system
        ran = {(root / path.partition("::")[0]).resolve() for path in paths}
        unfinished |= {row.key for row in new if not ran.issuperset(files_of(root, row.key))}
    if not finished:
        unfinished |= {row.key for row in old}
    rows = merge(new, old, known, unfinished=unfinished, whole=finished and not arguments.claims)
    with atomic_write(file) as out:
        out.write(page(rows, commit, date.today()))
    for row in new:
        print(f"{row.key}: {row.metric}: {row.method} against {row.baseline}: {row.verdict}")
    print(f"{len(new)} of {len(rows)} rows are new: {file}")
    if not finished:
        print(f"pytest ended with status {status}: what did not run keeps its old row")
    return int(status != 0 or any(row.verdict in (FAILS, ERROR) for row in new))


if __name__ == "__main__":
    sys.exit(main())
