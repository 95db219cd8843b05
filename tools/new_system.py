"""Write the skeleton of a system: file, tests, claim, configs, entry point and README rows.

    uv run tools/new_system.py st_protopnet --package proto-vision --class-name STProtoPNet
    uv run tools/new_system.py opl --package proto-core --room losses --kind loss
    uv run tools/new_system.py st_protopnet --package proto-vision --new-package     # the first system of a domain

The skeleton passes lint and types, and fails its contract with messages that say what to fill in. Nothing is
overwritten, and either all files are written or none.
"""

from __future__ import annotations

import argparse
import keyword
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from proto_core.files import atomic_write
from proto_core.systems import GROUP

__all__ = ["Place", "Plan", "append_to_array", "insert_entry_point", "insert_row", "main", "plan"]

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent / "templates"
KINDS = ("module", "loss", "analysis")
CORE = "proto-core"
NAMELESS = {"utils", "util", "helpers", "helper", "misc", "common", "base", "data", "tests"}
WIDTH = 120


# -- text that keeps its form


def append_to_array(text: str, pattern: str, items: Sequence[str]) -> str:
    """Add strings to the end of the first array after ``pattern`` (a regular expression that ends before its ``[``).

    An array of one line stays one while it fits; comments and order stay as they are.

    Raises:
        ValueError: no such array.
    """
    found = re.search(pattern + r"\[", text, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"found no array {pattern!r}, needed to add {', '.join(items)}")
    start = found.end()
    end = start
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|#[^\n]*|\]', text[start:]):
        if token[0] == "]":
            end = start + token.start()
            break
    body, added = text[start:end], [f'"{item}"' for item in items]
    if "\n" in body:
        body = body.rstrip()
        comma = "" if not body.strip() or body.endswith(",") else ","
        return text[:start] + body + comma + "".join(f"\n    {item}," for item in added) + "\n" + text[end:]
    line = ", ".join([*([body.strip().rstrip(",")] if body.strip() else []), *added])
    first = text.rfind("\n", 0, start) + 1
    if start - first + len(line) + 1 <= WIDTH:
        return text[:start] + line + text[end:]
    every = [token[0] for token in re.finditer(r'"(?:[^"\\]|\\.)*"', line)]
    return text[:start] + "".join(f"\n    {item}," for item in every) + "\n" + text[end:]


def _sorted_in(lines: list[str], start: int, end: int, key: str, line: str, pattern: str) -> None:
    """Put a line before the first of ``lines[start:end]`` with a later key, else after the last that has a key."""
    last = start
    for number in range(start, end):
        if found := re.match(pattern, lines[number]):
            if found[1] > key:
                lines.insert(number, line)
                return
            last = number + 1
    lines.insert(last, line)


def insert_entry_point(text: str, key: str, target: str) -> str:
    """Declare a system in the text of a pyproject.toml; the table is made where there is none."""
    lines = text.split("\n")
    head = re.compile(rf"""\[project\.entry-points\.["']?{re.escape(GROUP)}["']?\]\s*(#.*)?$""")
    start = next((number + 1 for number, line in enumerate(lines) if head.match(line)), None)
    if start is None:
        tools = next((number for number, line in enumerate(lines) if re.match(r"\[+tool\.", line)), None)
        table = [f'[project.entry-points."{GROUP}"]', f'{key} = "{target}"', ""]
        if tools is None:
            return text.rstrip("\n") + "\n\n" + "\n".join(table)
        return "\n".join([*lines[:tools], *table, *lines[tools:]])
    end = next((number for number in range(start, len(lines)) if lines[number].startswith("[")), len(lines))
    _sorted_in(lines, start, end, key, f'{key} = "{target}"', r"""["']?([\w-]+)["']?\s*=""")
    return "\n".join(lines)


def insert_row(text: str, column: str, key: str, row: str) -> str:
    """Put a row into the Markdown table whose first column is ``column``, before the first row with a later key.

    Raises:
        ValueError: no such table, or a row of that key.
    """
    lines = text.split("\n")
    start = next((number + 2 for number, line in enumerate(lines) if line.startswith(f"| {column} |")), None)
    if start is None:
        raise ValueError(f"found no table that begins with '| {column} |', needed to add the row of {key}")
    end = next((number for number in range(start, len(lines)) if not lines[number].startswith("|")), len(lines))
    end -= end > start and f"[`{CORE}`]" in lines[end - 1]  # the core comes last
    if any(re.match(rf"\| \[?`{re.escape(key)}`", line) for line in lines[start:end]):
        raise ValueError(f"has a row of {key} already")
    _sorted_in(lines, start, end, key, row, r"\| \[?`([^`]+)`")
    return "\n".join(lines)


# -- where things go


@dataclass(frozen=True)
class Place:
    """A package of the workspace and its app.

    Attributes:
        root: the workspace.
        package: distribution, such as ``proto-vision``.
    """

    root: Path
    package: str

    @property
    def core(self) -> bool:
        """Whether it is the core, which has no app."""
        return self.package == CORE

    @property
    def domain(self) -> str:
        """Name of the domain, and of the app's folder."""
        return self.package.removeprefix("proto-")

    @property
    def import_name(self) -> str:
        """The package that Python imports."""
        return self.package.replace("-", "_")

    @property
    def app_import(self) -> str:
        """The package of the app."""
        return f"{self.import_name}_app"

    @property
    def folder(self) -> Path:
        """Where the distribution lies."""
        return self.root / "shared" if self.core else self.root / "packages" / self.package

    @property
    def app(self) -> Path:
        """Where the app lies."""
        return self.root / "apps" / self.domain


@dataclass
class Plan:
    """All that will be written: files that must not be there yet, and files that are there and get another text."""

    new: dict[Path, str] = field(default_factory=dict)
    changed: dict[Path, str] = field(default_factory=dict)

    def text(self, path: Path) -> str:
        """A file as it will be so far.

        Raises:
            ValueError: it is not there.
        """
        for texts in (self.changed, self.new):
            if path in texts:
                return texts[path]
        if not path.is_file():
            raise ValueError(f"{path}: no such file, needed to add the system to it")
        return path.read_text(encoding="utf-8")

    def change(self, path: Path, text: str) -> None:
        """Give a file another text; a TOML file must stay one."""
        if path.suffix == ".toml":
            tomllib.loads(text)
        (self.new if path in self.new else self.changed)[path] = text

    def check(self) -> None:
        """Look at every target before anything is written.

        Raises:
            ValueError: a file is there already, also as a folder of the same name.
        """
        for path in self.new:
            folder = path.with_suffix("")
            taken = next((place for place in (path, folder) if place.exists()), None) if path.suffix == ".py" else None
            if taken or path.exists():
                raise ValueError(f"{taken or path} is there already, nothing is overwritten")

    def write(self) -> None:
        """Write all of it, or nothing: an error takes back what was written."""
        before = {path: path.read_text(encoding="utf-8") for path in self.changed}
        folders = {folder for path in self.new for folder in path.parents if not folder.exists()}
        try:
            for path, text in (self.new | self.changed).items():
                with atomic_write(path) as out:
                    out.write(text)
        except BaseException:
            for path in self.new:
                path.unlink(missing_ok=True)
            for path, text in before.items():
                path.write_text(text, encoding="utf-8")
            for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def declared(root: Path) -> dict[str, str]:
    """System -> the package that declares it, in the whole workspace."""
    found: dict[str, str] = {}
    for file in [root / "shared" / "pyproject.toml", *sorted(root.glob("packages/*/pyproject.toml"))]:
        if file.is_file():
            project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
            found |= dict.fromkeys(project.get("entry-points", {}).get(GROUP, {}), project["name"])
    return found


def _check_names(root: Path, name: str, place: Place, class_name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name) or name in NAMELESS:
        raise ValueError(
            f"NAME: found {name!r}, needed the name of a method: at most 40 lower-case letters, digits and underscores"
        )
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]{0,49}", class_name):
        raise ValueError(f"--class-name: found {class_name!r}, needed a name such as STProtoPNet")
    if not re.fullmatch(r"proto-[a-z0-9]+", place.package):
        raise ValueError(f"--package: found {place.package!r}, needed 'proto-' and a domain, such as proto-vision")
    if (owner := declared(root).get(name)) is not None:
        raise ValueError(f"NAME: {name!r} is already declared by {owner}, a key belongs to one system")


# -- the plan


def plan(
    root: Path, name: str, package: str, *, class_name: str, kind: str = "module", room: str = "", new: bool = False
) -> Plan:
    """Work out every file of a new system; nothing is written.

    Args:
        root: the workspace.
        name: key of the system.
        package: distribution that gets it.
        class_name: name of its class.
        kind: one of ``KINDS``.
        room: folder of ``proto_core``, only for proto-core.
        new: make the package and its app too.

    Raises:
        ValueError: a bad name, a name that is taken, a file that is there already, a package that is not.
    """
    place = Place(root, package)
    _check_names(root, name, place, class_name)
    source = place.folder / "src" / place.import_name
    if new and (place.core or place.folder.exists() or place.app.exists()):
        raise ValueError(f"--new-package: {package} or its app is there already, leave --new-package out")
    for folder in () if new else (place.folder, *(() if place.core else (place.app,))):
        if not (folder / "pyproject.toml").is_file():
            raise ValueError(f"--package: found no {folder / 'pyproject.toml'}; --new-package makes package and app")
    if room and not place.core:
        raise ValueError(f"--room: found {room!r}, but only {CORE} has rooms")
    if room and not (source / room / "__init__.py").is_file():
        rooms = sorted(file.parent.name for file in source.glob("*/__init__.py"))
        raise ValueError(f"--room: found no folder {source / room} with an __init__.py; there are {', '.join(rooms)}")
    module = ".".join([place.import_name, *([room] if room else []), name])
    words = {
        "name": name,
        "class_name": class_name,
        "module": module,
        "package": package,
        "domain": place.domain,
        "import_name": place.import_name,
        "app_import": place.app_import,
        "command": package,
    }

    def fill(template: str) -> str:
        text = (TEMPLATES / f"{template}.template").read_text(encoding="utf-8")
        return Template(text).substitute(words)

    words["paper"] = fill("paper").rstrip("\n")
    work = Plan()
    if new:
        _new_package(work, place, fill)
    work.new[source / room / f"{name}.py"] = fill(f"{kind}.py")
    work.new[place.folder / "tests" / f"test_{name}.py"] = fill("test.py")
    work.new[place.folder / "claims" / f"test_{name}.py"] = fill("claim.py")
    if not place.core:
        for config in ("demo", "paper"):
            text = fill(f"{config}.yaml") + (fill(f"{config}.data") if kind == "module" else "")
            work.new[place.app / "src" / place.app_import / "configs" / name / f"{config}.yaml"] = text
    project = place.folder / "pyproject.toml"
    work.change(project, insert_entry_point(work.text(project), name, f"{module}:{class_name}"))
    _add_rows(work, place, name)
    for path, text in work.new.items():
        if path.suffix == ".py":
            work.new[path] = _formatted(text, path, root)
    work.check()
    return work


def _add_rows(work: Plan, place: Place, name: str) -> None:
    """Rows of the system in the README of the workspace and of its package."""
    readme, own = place.root / "README.md", place.folder / "README.md"
    source = "FILL IN: title (year, arXiv)"
    rows = {
        readme: f"| `{name}` | {source} | FILL IN: evidence | {place.package} |",
        own: f"| `{name}` | FILL IN: what it does | FILL IN: arXiv | FILL IN: evidence |",
    }
    for path, row in rows.items():
        text = work.text(path)
        if path == own and not re.search(r"^\| system \|", text, flags=re.MULTILINE):
            head = "| system | what it does | paper | evidence |\n|---|---|---|---|\n"
            text = f"{text.rstrip()}\n\n## Systems\n\n{head}"
        try:
            work.change(path, insert_row(text, "system", name, row))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _new_package(work: Plan, place: Place, fill: Callable[[str], str]) -> None:
    """A package and its app, and the places of the workspace that name every package."""
    source, app = place.folder / "src" / place.import_name, place.app / "src" / place.app_import
    work.new |= {
        place.folder / "pyproject.toml": fill("package.pyproject"),
        place.folder / "README.md": fill("package.readme"),
        source / "__init__.py": fill("package.init"),
        source / "py.typed": "",
        place.app / "pyproject.toml": fill("app.pyproject"),
        place.app / "README.md": fill("app.readme"),
        app / "__init__.py": fill("app.init"),
        app / "main.py": fill("app.main"),
    }
    project, root = place.root / "pyproject.toml", place.root
    text = work.text(project)
    members = [place.package, f"{place.package}-app"]
    folders = [str(path.relative_to(root)) for path in (source.parent, app.parent)]
    try:
        text = append_to_array(text, r"^\[project\]$.*?^dependencies\s*=\s*", members)
        text = append_to_array(text, r"^\[tool\.mypy\]$.*?^files\s*=\s*", folders)
        text = append_to_array(text, r"^\[tool\.mypy\]$.*?^mypy_path\s*=\s*", folders)
        names = [place.import_name, place.app_import]
        text = append_to_array(text, r"^\[tool\.importlinter\]$.*?^root_packages\s*=\s*", names)
        text = _add_sources(text, members)
        text = _add_layers(text, place)
    except ValueError as error:
        raise ValueError(f"{project}: {error}") from error
    work.change(project, text)
    link = f"[`{place.package}`](packages/{place.package}/README.md)"
    row = f"| {link} | `{place.package}` | FILL IN: what it is for |"
    readme = root / "README.md"
    try:
        work.change(readme, insert_row(work.text(readme), "package", place.package, row))
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from error
    checks = root / "tools" / "shape_checks.py"
    if checks.is_file():
        work.change(checks, append_to_array(work.text(checks), r"^CHECKED\s*=\s*", [place.import_name]))


def _add_sources(text: str, members: Sequence[str]) -> str:
    lines = text.split("\n")
    if "[tool.uv.sources]" not in lines:
        raise ValueError("found no table [tool.uv.sources]")
    for member in members:
        start = lines.index("[tool.uv.sources]") + 1
        end = next((number for number in range(start, len(lines)) if lines[number].startswith("[")), len(lines))
        _sorted_in(lines, start, end, member, f"{member} = {{ workspace = true }}", r"([\w-]+)\s*=")
    return "\n".join(lines)


def _add_layers(text: str, place: Place) -> str:
    """Put app and package beside the others of their floor; ``|`` says that neighbours do not import each other."""
    contracts = tomllib.loads(text)["tool"]["importlinter"].get("contracts", [])
    layers = next((list(one["layers"]) for one in contracts if one.get("type") == "layers"), [])
    if len(layers) != 3:
        raise ValueError(f"found layers {layers}, needed the three floors: apps, packages, proto_core")
    start = text.index("layers", text.index('type = "layers"'))
    head, floors = text[:start], text[start:]
    for layer, name in zip(layers, (place.app_import, place.import_name)):
        floors = floors.replace(f'"{layer}"', f'"{layer} | {name}"', 1)
    return head + floors


def _formatted(text: str, path: Path, root: Path) -> str:
    """The text as ruff lays it out, with the workspace's settings: names of any length fit into their lines."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(path), "-"]
    done = subprocess.run(command, input=text, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"ruff cannot format {path.name}: {done.stderr.strip()}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Write a skeleton and say what to do next; the exit status."""
    parser = argparse.ArgumentParser(description="Write the skeleton of a system, whose contract says what to fill in.")
    parser.add_argument("name", metavar="NAME", help="key of the system, such as st_protopnet")
    parser.add_argument("--package", required=True, help="distribution that gets it, such as proto-vision")
    parser.add_argument("--kind", choices=KINDS, default="module", help="module (LightningModule), loss or analysis")
    parser.add_argument("--class-name", help="default: NAME in capitals, as StProtopnet")
    parser.add_argument("--room", default="", help="folder of proto_core, such as losses; only with proto-core")
    parser.add_argument("--new-package", action="store_true", help="make the package and its app too")
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace")
    arguments = parser.parse_args(argv)
    root, name = arguments.root.resolve(), arguments.name
    class_name = arguments.class_name or "".join(part.capitalize() for part in name.split("_"))
    try:
        work = plan(
            root,
            name,
            arguments.package,
            class_name=class_name,
            kind=arguments.kind,
            room=arguments.room,
            new=arguments.new_package,
        )
        work.write()
    except (ValueError, OSError) as error:
        print(f"new_system: error: {error}", file=sys.stderr)
        return 2
    for verb, paths in (("wrote", work.new), ("changed", work.changed)):
        for path in paths:
            print(f"{verb:7} {path.relative_to(root)}")
    places = {path.relative_to(root).parts[: 1 if path.is_relative_to(root / "shared") else 2] for path in work.new}
    print(
        "\nNext:\n"
        "  uv sync                                 # installs the entry point\n"
        f"  uv run pytest tests shared packages apps -k {name}   # says what to fill in\n"
        f"  grep -rn 'FILL IN' README.md {' '.join(sorted('/'.join(parts) for parts in places))}\n"
        f"  uv run tools/claims.py {name}           # once it holds\n"
        "The ten steps stand in CONTRIBUTING.md."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
