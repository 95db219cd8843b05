"""Each domain is one install: its wheels, in an empty environment far from the workspace, bring what it needs alone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from proto_core.systems import catalogue

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(path.parent for place in ("shared", "packages/*", "apps/*") for path in ROOT.glob(f"{place}/src"))
APPS = [member for member in MEMBERS if member.parent.name == "apps"]
HEAVY = {
    *("timm", "transformers", "torch-geometric", "open3d", "diffusers", "peft", "open-clip-torch", "monai", "flwr"),
    *("pytorch-metric-learning", "faiss-cpu", "opencv-python", "opencv-python-headless", "lightly", "tensorflow"),
}
"""Libraries that only a domain which declares them may bring."""

USED_UNSEEN = {
    "onnx": "torch.onnx.export writes with it",
    "onnxscript": "torch.onnx.export traces with it",
    "pyarrow": "proto_core.cli writes --out FILE.parquet with it",
}
"""Dependencies that a domain declares and none of its files imports, and why they are needed."""

LEFT_TO_DOMAINS = {
    ("proto-core", "pyarrow"): "imported when --out names a Parquet file; a domain that offers it declares it",
}
"""What a member imports and does not declare, and why."""

OFFLINE = re.compile(
    r"network was disabled|connectivity is disabled|dns error|error sending request|failed to fetch|timed out", re.I
)


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def plain(requirement: str) -> str:
    """Normalised name of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.\-]+", requirement)[0]).lower()  # type: ignore[index]


def requirements(folder: Path) -> set[str]:
    return {plain(requirement) for requirement in project(folder)["project"]["dependencies"]}


def extras(folder: Path) -> set[str]:
    """What a member's users install only when they ask for it."""
    groups = project(folder)["project"].get("optional-dependencies", {})
    return {plain(requirement) for group in groups.values() for requirement in group}


NAMES = {project(member)["project"]["name"]: member for member in MEMBERS}
DEV = {plain(requirement) for requirement in project(ROOT)["dependency-groups"]["dev"]}


OWN = {name: {path.parent.name for path in (folder / "src").glob("*/__init__.py")} for name, folder in NAMES.items()}
"""Distribution of the workspace -> its import packages."""


def imports(folder: Path) -> set[str]:
    """Top-level names of the modules that a member's code imports, at its start or when work begins."""
    found = set()
    for path in (folder / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found


def imported(name: str) -> set[str]:
    """Distributions whose modules a member imports."""
    owners = packages_distributions()
    modules = imports(NAMES[name])
    found = {plain(owner) for module in modules for owner in owners.get(module, [])}
    return found | {member for member, packages in OWN.items() if packages & modules}


def needed(app: Path) -> list[str]:
    """The app's distribution and the workspace members that it stands on."""
    found, todo = [], [project(app)["project"]["name"]]
    while todo:
        name = todo.pop()
        if name not in found:
            found.append(name)
            todo += sorted(requirements(NAMES[name]) & set(NAMES))
    return sorted(found)


def uv() -> list[str]:
    """The command uv, or the module of that name."""
    for command in ([found] if (found := shutil.which("uv")) else [], [sys.executable, "-m", "uv"]):
        if command and subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("uv is neither a command nor a module of this environment")


def run(command: list[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees neither this environment nor the workspace."""
    hidden = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | extra
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def must(done: subprocess.CompletedProcess[str]) -> str:
    """Output of a command that has to succeed; without the index it skips."""
    if done.returncode != 0:
        if OFFLINE.search(done.stderr):
            pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"{' '.join(done.args)}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """An app in an environment of its own.

    Attributes:
        app: its folder in the workspace.
        folder: an empty folder to run in.
        python: the environment's interpreter.
        packages: names of all distributions in it.
    """

    app: Path
    folder: Path
    python: Path
    packages: set[str]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution -> its wheel, built from the workspace."""
    out = tmp_path_factory.mktemp("wheels")
    must(run([*uv(), "build", "--quiet", "--all-packages", "--wheel", "--out-dir", str(out)], ROOT))
    found = {plain(path.name.partition("-")[0]): path for path in out.glob("*.whl")}
    assert set(found) == set(NAMES)
    return found


@pytest.fixture(scope="module", params=APPS, ids=lambda app: app.name)
def installed(
    request: pytest.FixtureRequest, wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    """One app's wheels and what they ask for, in an empty environment; from uv's cache where that is enough."""
    folder = tmp_path_factory.mktemp(f"install-{request.param.name}")
    python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    must(run([*uv(), "venv", "--quiet", "--python", sys.executable, str(folder / "environment")], folder))
    newest = project(ROOT)["tool"]["uv"]["exclude-newer"]
    command = [*uv(), "pip", "install", "--quiet", "--python", str(python), "--exclude-newer", newest]
    command += [str(wheels[name]) for name in needed(request.param)]
    if run([*command, "--offline"], folder).returncode != 0:
        must(run(command, folder))
    listed = must(run([*uv(), "pip", "list", "--quiet", "--format", "json", "--python", str(python)], folder))
    (folder / "empty").mkdir()
    yield Installed(request.param, folder / "empty", python, {plain(row["name"]) for row in json.loads(listed)})
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_wheel_holds_every_file_of_the_source(wheels, name):
    source = NAMES[name] / "src"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    with zipfile.ZipFile(wheels[name]) as wheel:
        packed = {file for file in wheel.namelist() if ".dist-info/" not in file}
    assert packed == files
    if NAMES[name] in APPS:
        keys = {key for key, system in catalogue().items() if system.package in needed(NAMES[name])}
        shipped = {file.split("/")[-2] for file in packed if file.endswith(("/demo.yaml", "/paper.yaml"))}
        assert keys - {key for key, system in catalogue("proto-core").items()} <= shipped


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_wheel_asks_for_what_its_project_declares(wheels, name):
    with zipfile.ZipFile(wheels[name]) as wheel:
        metadata = next(file for file in wheel.namelist() if file.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    asked = [requirement for requirement in asked if "extra ==" not in requirement]
    assert {plain(requirement) for requirement in asked} == requirements(NAMES[name])
    assert not [requirement for requirement in asked if "@" in requirement], "a path or an address is no dependency"
    assert not {plain(requirement) for requirement in asked} & DEV, "tools of the dev group are no dependency"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_is_imported_is_declared(name):
    declared = set().union(*(requirements(NAMES[member]) for member in needed(NAMES[name])), {name})
    known = {module for modules in OWN.values() for module in modules} | set(packages_distributions())
    strange = sorted(imports(NAMES[name]) - known - sys.stdlib_module_names)
    assert not strange, f"{name} imports {strange}, which this environment lacks"
    missing = (
        imported(name)
        - declared
        - extras(NAMES[name])
        - {library for member, library in LEFT_TO_DOMAINS if member == name}
    )
    assert not missing, f"{name} imports {sorted(missing)}: declare it, or it fails where nothing else brings it"


@pytest.mark.parametrize("name", sorted(name for name, folder in NAMES.items() if folder.parent != ROOT))
def test_what_a_domain_declares_is_used(name):
    unused = requirements(NAMES[name]) - imported(name) - set(USED_UNSEEN)
    assert not unused, f"{name} declares {sorted(unused)} and imports nothing of it: whoever installs it pays for it"


def test_the_environment_holds_one_domain(installed):
    wanted = needed(installed.app)
    assert set(wanted) <= installed.packages
    assert not (set(NAMES) - set(wanted)) & installed.packages, "another domain was installed"
    declared = set().union(*(requirements(NAMES[name]) for name in wanted))
    assert not (HEAVY - declared) & installed.packages
    assert not (DEV - declared) & installed.packages, "development tools were installed"


def test_the_command_works_far_from_the_workspace(installed):
    for command in project(installed.app)["project"]["scripts"]:
        program = str(installed.python.with_name(command))
        assert must(run([program, "--help"], installed.folder)).startswith(f"usage: {command} COMMAND")
        domain = [name for name in needed(installed.app) if NAMES[name].parent.name == "packages"]
        keys = sorted(key for name in domain for key in catalogue(name))
        assert must(run([program, "list", "--names"], installed.folder)).split() == keys
        table = must(run([program, "list"], installed.folder))
        assert all(key in table for key in keys)
        assert str(ROOT) not in must(
            run([str(installed.python), "-c", "import proto_core, sys; print(proto_core.__file__)"], installed.folder)
        )
    assert not list(installed.folder.iterdir()), "listing and asking for help write nothing"
