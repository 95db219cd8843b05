"""The contract of every system: whoever declares one gets all of this. The messages say what is still to do.

Importable with what its package declares; paper, configs, claim, README rows and parity test there; one that does not
train by itself is a value that can be made twice, copied and called. One that trains has more to keep:
``test_contracts_training.py``.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import date
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor, nn

from proto_core.cli import instantiate
from proto_core.systems import GROUP, catalogue
from proto_core.training import enter_stage
from proto_core.training.stages import HasStages

ROOT = Path(__file__).resolve().parents[1]

SMALLER: dict[str, tuple[list[str], str]] = {
    "protoecgnet": (["--data.num_records", "60"], "60 records fill a batch of each fold, 1600 take seconds to make"),
}
"""System -> arguments that make its demo.yaml quick here, and why the check loses nothing."""

PAPER_ONLY_PARSED: dict[str, str] = {}
"""System -> why the model of its paper.yaml cannot be built here (weights to download, more memory than there is)."""

INPUTS: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
"""Loss -> its inputs, where forward takes neither (embeddings, labels) nor (logits, targets)."""

FOLDERS = {
    tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"]: file.parent
    for pattern in ("shared", "packages/*")
    for file in ROOT.glob(f"{pattern}/pyproject.toml")
}
SYSTEMS = {key: system for key, system in catalogue().items() if system.package in FOLDERS}
SEED = 7


@cache
def trains(key: str) -> bool:
    """Whether a system trains by itself; one that cannot be imported fails in its own test."""
    try:
        target = SYSTEMS[key].load()
    except Exception:
        return False
    return isinstance(target, type) and issubclass(target, pl.LightningModule)


every = pytest.mark.parametrize("key", list(SYSTEMS))
every_plain = pytest.mark.parametrize("key", [key for key in SYSTEMS if not trains(key)])


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data that a demo makes lies in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# -- where things lie


def say(path: Path) -> str:
    return str(path.relative_to(ROOT))


def config(key: str, name: str) -> Path:
    """A system's config file, which has to be there unless its package has no app."""
    package = SYSTEMS[key].package
    if package == "proto-core":
        shipped = next(ROOT.glob(f"apps/*/src/*/configs/{key}/{name}"), None)
        return shipped or pytest.skip("proto-core has no command line of its own, so its systems need no config")
    domain = package.removeprefix("proto-")
    path = ROOT / "apps" / domain / "src" / f"proto_{domain}_app" / "configs" / key / name
    assert path.is_file(), f"write {say(path)}: model.class_path and init_args, and data if the system trains"
    return path


def build(key: str, *arguments: str) -> tuple[Any, Any]:
    """The system and its data as demo.yaml sets them up."""
    return instantiate(config(key, "demo.yaml"), [*SMALLER.get(key, ([], ""))[0], *arguments])


def sources(key: str) -> list[Path]:
    """The files of a system: its module, or all of its folder."""
    file = Path(inspect.getfile(inspect.getmodule(SYSTEMS[key].load())))  # type: ignore[arg-type]
    declared = SYSTEMS[key].target.partition(":")[0].rpartition(".")[2]
    return sorted(file.parent.rglob("*.py")) if file.parent.name == declared else [file]


def unfilled(*paths: Path) -> list[str]:
    """Where a skeleton still asks for something."""
    return [
        f"{say(path)}:{number}"
        for path in paths
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "FILL IN" in line
    ]


def stages(module: pl.LightningModule) -> list[Any]:
    """The stages that run, or one ``None`` for training without a curriculum."""
    return [stage for stage in module.stages if stage.max_epochs > 0] if isinstance(module, HasStages) else [None]


# -- declared, importable, described


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_the_environment_knows_what_is_declared(package):
    project = tomllib.loads((FOLDERS[package] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project.get("entry-points", {}).get(GROUP, {})
    found = {key: system.target for key, system in catalogue(package).items()}
    assert found == declared, f"{package}: run `uv sync`, the installed entry points are those of an older pyproject"


def closure(package: str) -> list[Distribution]:
    """A distribution and all that it needs, with the extras that are asked for and no others."""
    seen: dict[str, set[str]] = {}
    found: dict[str, Distribution] = {}
    todo = [Requirement(package)]
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), {"", *wanted.extras}
        if extras <= seen.get(name, set()):
            continue
        seen[name] = seen.get(name, set()) | extras
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for line in found[name].requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return list(found.values())


LOAD = """
import importlib.util, json, sys, traceback
from pathlib import Path
assert importlib.util.find_spec("pytest") is None, "what is not declared must be out of sight"
answers = {}
for key, (target, config, arguments) in json.loads(sys.argv[1]).items():
    try:
        module, _, name = target.partition(":")
        getattr(importlib.import_module(module), name)
        if config:
            importlib.import_module("proto_core.cli").instantiate(config, arguments)
        answers[key] = ""
    except BaseException:
        answers[key] = traceback.format_exc()
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


@cache
def loaded_alone(package: str) -> dict[str, str]:
    """Load a package's systems, and set up their demos, where nothing else is installed than what it declares.

    Returns:
        System -> traceback, or nothing if it went well.
    """
    tasks = {}
    for key in catalogue(package):
        demo = next(ROOT.glob(f"apps/*/src/*/configs/{key}/demo.yaml"), None)
        tasks[key] = (SYSTEMS[key].target, str(demo) if demo else None, SMALLER.get(key, ([], ""))[0])
    with TemporaryDirectory() as folder:
        site, paths = Path(folder) / "site", []
        site.mkdir()
        for found in closure(package):
            for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
                source = Path(str(found.locate_file(top)))
                if top.endswith(".pth"):
                    paths += [line for line in source.read_text().splitlines() if Path(line).is_dir()]
                elif not (site / top).exists():
                    (site / top).symlink_to(source)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *paths]), "PYTHONNOUSERSITE": "1"}
        answers = Path(folder) / "answers.json"
        done = subprocess.run(
            [sys.executable, "-S", "-c", LOAD, json.dumps(tasks), str(answers)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answers.is_file(), done.stderr
        return json.loads(answers.read_text(encoding="utf-8"))


@every
def test_loads_with_what_its_package_declares(key):
    error = loaded_alone(SYSTEMS[key].package)[key]
    assert not error, (
        f"{key} does not load where only the dependencies of {SYSTEMS[key].package} are installed: declare what it "
        f"needs, or import an optional library where it is used.\n{error}"
    )


@every
def test_paper_is_complete(key):
    paper = SYSTEMS[key].paper
    for field in fields(paper):
        value = getattr(paper, field.name)
        assert "FILL IN" not in str(value), f"{key}: fill in paper.{field.name}"
    assert 1990 <= paper.year <= date.today().year, f"{key}: paper.year is {paper.year}"
    for name in ("title", "summary", "claim"):
        assert len(getattr(paper, name).split()) >= 3, f"{key}: paper.{name} says nothing: {getattr(paper, name)!r}"
    for name in ("summary", "claim"):
        assert "\n" not in getattr(paper, name), f"{key}: paper.{name} is one line"
    if paper.evidence == "code":
        assert paper.code, f"{key}: evidence is the authors' code, so name it in paper.code as owner/name@commit"
    if paper.code:
        assert re.fullmatch(r"[\w.\-]+/[\w.\-]+(@[\w.\-]+)?", paper.code), f"{key}: paper.code is {paper.code!r}"


@every
def test_is_described_and_filled_in(key):
    target = SYSTEMS[key].load()
    described = vars(target).get("__doc__") if isinstance(target, type) else target.__doc__
    assert described, f"{key}: say in the docstring of {SYSTEMS[key].target} what it does"
    assert not (left := unfilled(*sources(key))), f"{key}: fill in {left}"
    assert getattr(target, "system", key) == key, f"{key}: its attribute `system` is {target.system!r}"
    assert re.fullmatch(r"[a-z][a-z0-9_]*", key), f"{key}: a key is lower case letters, digits and underscores"


# -- configs


@every
@pytest.mark.parametrize("name", ["demo.yaml", "paper.yaml"])
def test_config_names_the_system(key, name):
    path = config(key, name)
    assert not (left := unfilled(path)), f"{key}: fill in {left}"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    module, _, target = settings["model"]["class_path"].rpartition(".")
    assert getattr(import_module(module), target) is SYSTEMS[key].load(), f"{say(path)} sets up another system"
    if trains(key):
        assert "data" in settings, f"{say(path)}: a system that trains needs data.class_path"


@every
def test_demo_config_builds_the_system(key):
    built, data = build(key)
    assert made_by(built) is SYSTEMS[key].load()
    assert (data is not None) == trains(key)


def made_by(built: Any) -> Any:
    """The class of an object, or the function of a partial."""
    return getattr(built, "func", None) or type(built)


@every
def test_paper_config_is_accepted(key, tmp_path):
    """All of it is parsed; the model is built in full size on the labels of the demo, as the data may not be here."""
    path = config(key, "paper.yaml")
    if not trains(key):
        assert made_by(instantiate(path)[0]) is SYSTEMS[key].load()
        return
    from proto_core.cli.training import ProtoCLI

    class Parse(ProtoCLI):
        def instantiate_classes(self) -> None:
            """Only parse."""

    try:
        Parse(args=["--config", str(path)], run=False, save_config_callback=None)
    except SystemExit:
        pytest.fail(f"{say(path)} is refused, see stderr: an argument that {key} or its data does not take")
    if key in PAPER_ONLY_PARSED:
        return
    paper, demo = (yaml.safe_load(config(key, name).read_text("utf-8")) for name in ("paper.yaml", "demo.yaml"))
    merged = tmp_path / "paper-on-demo-data.yaml"
    merged.write_text(yaml.safe_dump({"model": paper["model"], "data": demo["data"]}), encoding="utf-8")
    built, _ = instantiate(merged, SMALLER.get(key, ([], ""))[0])
    assert type(built) is SYSTEMS[key].load()
    for stage in stages(built):
        if stage is not None:
            enter_stage(built, stage)


# -- systems that do not train by themselves


@every_plain
def test_plain_system_is_a_value(key):
    one, two = build(key)[0], build(key)[0]
    assert callable(one) or hasattr(one, "fit"), f"{key}: needs to be callable, or to have fit"
    telling = f"{key}: give it a __repr__ (extra_repr in a Module) that shows its settings and nothing else"
    assert repr(one) == repr(two), telling
    assert repr(pickle.loads(pickle.dumps(one))) == repr(one), f"{key}: pickled and read back it is another"
    assert repr(copy.deepcopy(one)) == repr(one)


def loss_inputs(module: nn.Module) -> tuple[Tensor, ...] | None:
    """Inputs by the names of forward's arguments: (embeddings, labels) or (logits, targets)."""
    names = list(inspect.signature(module.forward).parameters)[:2]
    g = torch.Generator().manual_seed(SEED)

    def size(default: int, *attributes: str) -> int:
        return next((getattr(module, name) for name in attributes if hasattr(module, name)), default)

    classes = size(3, "num_classes")
    labels = torch.arange(12) % classes
    if names == ["embeddings", "labels"]:
        return torch.randn(12, size(8, "embedding_dim", "dim"), generator=g), labels
    if names == ["logits", "targets"]:
        return torch.randn(12, classes, generator=g), labels
    return None


def check_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Scalar, finite, float32 inside, with finite gradients to input and parameters, and never NaN without samples."""
    first = inputs[0].clone().requires_grad_()
    loss = module(first, *inputs[1:])
    assert loss.ndim == 0, f"a loss is a scalar, found shape {tuple(loss.shape)}"
    loss.backward()
    for name, tensor in [("its input", first), *module.named_parameters()]:
        if tensor.requires_grad:
            assert tensor.grad is not None, f"no gradient reaches {name}"
            assert tensor.grad.isfinite().all(), f"gradients of {name} are not finite"
    with torch.no_grad():
        assert torch.equal(module(first, *inputs[1:]), loss), "called twice it says two things"
        assert module(first.bfloat16(), *inputs[1:]).dtype == torch.float32, "bf16 in, float32 out"
        nothing = (first[:0], *(item[:0] for item in inputs[1:]))
        assert finite_or_refused(module, nothing), "an empty set gives no finite loss"


def finite_or_refused(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Finite, or a ValueError that says what was found, as some cards have it."""
    try:
        return bool(module(*inputs).isfinite())
    except ValueError as error:
        return "found" in str(error)


@every_plain
def test_plain_loss_has_finite_gradients(key):
    built, _ = build(key)
    if not isinstance(built, nn.Module):
        pytest.skip(f"{key} is no torch module")
    inputs = INPUTS[key]() if key in INPUTS else loss_inputs(built)
    assert inputs is not None, f"{key}: name its inputs in INPUTS"
    check_loss(built, inputs)


def test_the_check_of_losses_finds_faults():
    class Pull(nn.Module):
        def __init__(self, fault: str = "") -> None:
            super().__init__()
            self.fault, self.centre = fault, nn.Parameter(torch.ones(8))

        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            centre = self.centre.detach() if self.fault == "no gradient" else self.centre
            squares = (embeddings.float() - centre).square().sum(-1) * labels
            if self.fault == "no finite":
                return squares.mean()
            return squares if self.fault == "scalar" else squares.sum() / max(len(labels), 1)

    check_loss(Pull(), loss_inputs(Pull()))
    for fault in ("no gradient", "no finite", "scalar"):
        with pytest.raises(AssertionError, match=fault):
            check_loss(Pull(fault), loss_inputs(Pull()))


# -- claim, README, parity


def records_claim(tree: ast.Module, key: str) -> bool:
    """Whether some call is ``claim_record(key, ...)``, the key as a word or as a constant of the module."""
    words = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "claim_record"]
    first = [call.args[0] for call in calls if call.args]
    return key in [words.get(a.id) if isinstance(a, ast.Name) else getattr(a, "value", None) for a in first]


@every
def test_claim_is_there(key):
    path = FOLDERS[SYSTEMS[key].package] / "claims" / f"test_{key}.py"
    assert path.is_file(), f"write {say(path)}: the smallest honest experiment that shows what the paper says"
    assert not (left := unfilled(path)), f"{key}: fill in {left}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert "pytest.mark.claim" in marks, f"{say(path)}: mark the experiment with @pytest.mark.claim"
    assert records_claim(tree, key), f"{say(path)}: call claim_record({key!r}, ...) with the figures"


@every
def test_readmes_list_it(key):
    package, paper = SYSTEMS[key].package, SYSTEMS[key].paper
    for path in (ROOT / "README.md", FOLDERS[package] / "README.md"):
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{key}` |")]
        assert len(rows) == 1, f"{say(path)}: needs one row | `{key}` | ... | in its table of systems, has {len(rows)}"
        assert "FILL IN" not in rows[0], f"{say(path)}: fill in the row of {key}"
        cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
        assert paper.evidence in cells, f"{say(path)}: the row of {key} lacks its evidence, {paper.evidence!r}"
        if path.parent == ROOT:
            assert paper.title in rows[0], f"{say(path)}: the row of {key} lacks the title {paper.title!r}"
            assert cells[-1] == package, f"{say(path)}: the row of {key} needs to end with {package}"


@every
def test_golden_values_are_tested(key, golden_dir):
    if not (golden_dir / f"{key}.npz").is_file():
        pytest.skip(f"there are no golden arrays of {key}")
    folder = FOLDERS[SYSTEMS[key].package] / "tests"
    places = [*folder.glob("test_*.py"), *(FOLDERS["proto-core"] / "tests").glob("test_*.py")]
    used = [path for path in places if f"{key}.npz" in path.read_text(encoding="utf-8")]
    assert used, f"write a test in {say(folder)} that compares every array of {key}.npz (the core's, in shared/tests)"
