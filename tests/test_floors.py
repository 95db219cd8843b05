"""The floors of the house: who may import whom, what must start without torch, and the rules that every file keeps."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(path.parent for pattern in ("shared", "packages/*", "apps/*") for path in ROOT.glob(f"{pattern}/src"))
SOURCES = sorted(path for member in MEMBERS for path in (member / "src").rglob("*.py"))
LIMIT = 450
NAMELESS = {"utils", "util", "helpers", "helper", "misc", "common"}
HELP_SECONDS = 1.5


def import_names(member: Path) -> list[str]:
    """The top-level import packages of a workspace member."""
    return sorted(path.parent.name for path in (member / "src").glob("*/__init__.py"))


def commands() -> dict[str, str]:
    """Console command -> ``module:function``, of every app."""
    found: dict[str, str] = {}
    for file in sorted(ROOT.glob("apps/*/pyproject.toml")):
        found |= tomllib.loads(file.read_text(encoding="utf-8"))["project"].get("scripts", {})
    return found


def torch_free() -> list[str]:
    """Modules that must not import torch: they answer ``--help``, or are imported by processes that only decode."""
    packages = [name for member in MEMBERS if member.parent.name != "apps" for name in import_names(member)]
    return [*packages, "proto_core.systems", "proto_core.cli", *(t.partition(":")[0] for t in commands().values())]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def places(rule: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of a kind in the library's code, as ``file:line`` and node; docstrings and comments are no code."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, rule):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def test_the_import_contracts_hold():
    done = python("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_the_import_contracts_know_every_member():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layered = {
        name.strip("() ")
        for contract in settings["contracts"]
        if contract["type"] == "layers"
        for layer in contract["layers"]
        for name in layer.replace("|", ":").split(":")
    }
    for member in MEMBERS:
        for name in import_names(member):
            where = "pyproject.toml, [tool.importlinter]"
            assert name in settings["root_packages"], f"{where}: add {name!r} to root_packages"
            assert name in layered, f"{where}: put {name!r} into the contract of layers"


@pytest.mark.parametrize("module", sorted(set(torch_free())))
def test_starts_without_torch(module):
    code = "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
    done = python(code, module)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    heavy = sorted(loaded & {"torch", "lightning", "torchvision", "pandas", "matplotlib", "scipy"})
    assert not heavy, f"import {module} imports {heavy}: move that import to where the work starts"


@pytest.mark.parametrize("command", sorted(commands()))
def test_help_answers_at_once(command):
    module, function = commands()[command].split(":")
    code = (
        f"import sys; sys.argv = [{command!r}, '--help']; from {module} import {function} as main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    sys.exit(end.code or ('torch' in sys.modules and 'torch was imported') or 0)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = python(code)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {command} ")
        if seconds[-1] < HELP_SECONDS:
            break
    assert min(seconds) < HELP_SECONDS, f"{command} --help took {min(seconds):.2f} s, may take {HELP_SECONDS} s"


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 20
    long = {path: lines for path, lines in lengths.items() if lines > LIMIT}
    assert not long, f"more than {LIMIT} lines, make a folder of the same name: {long}"


def test_every_file_has_a_telling_name():
    nameless = [str(path.relative_to(ROOT)) for path in SOURCES if NAMELESS & {path.stem, path.parent.name}]
    assert not nameless, f"name these after what is in them: {nameless}"


def test_library_code_moves_nothing_to_a_device_by_name():
    calls = [where for where, node in places(ast.Call) if getattr(node.func, "attr", None) == "cuda"]  # type: ignore[attr-defined]
    assert not calls, f".cuda() pins code to one device, use the device of the input: {calls}"


def test_library_code_does_not_print():
    calls = [where for where, node in places(ast.Call) if getattr(node.func, "id", None) == "print"]  # type: ignore[attr-defined]
    assert not calls, f"use logging, or rich in a command: {calls}"


def test_library_code_is_finished():
    stubs = [
        where
        for where, node in places(ast.Raise)
        if "NotImplementedError" in ast.dump(node.exc or ast.Constant(None))  # type: ignore[attr-defined]
    ]
    assert not stubs, f"abstract methods are declared with ABC or Protocol, the others are written: {stubs}"
    marks = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "TODO" in line or "FIXME" in line
    ]
    assert not marks, f"finish these: {marks}"


@pytest.mark.skipif(os.environ.get("PROTO_SHAPE_CHECKS") != "1", reason="PROTO_SHAPE_CHECKS=1 switches the check on")
def test_wrong_shapes_are_caught_where_the_check_is_on():
    import torch

    from proto_core.distances import cosine_similarity

    with pytest.RaisesExc(TypeError):
        cosine_similarity(torch.zeros(2, 3), torch.zeros(2, 4))
