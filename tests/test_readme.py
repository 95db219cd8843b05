"""What people read runs: the Python of every README, every relative link, every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(path.parent for place in ("shared", "packages/*", "apps/*") for path in ROOT.glob(f"{place}/src"))
READMES = [ROOT / "README.md", *(member / "README.md" for member in MEMBERS)]
PAGES = [*READMES, *(ROOT / name for name in ("CONTRIBUTING.md", "CLAIMS.md"))]
SOURCES = sorted(path for pattern in ("shared", "packages/*") for path in ROOT.glob(f"{pattern}/src/**/*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(text: str) -> list[tuple[str, int, str]]:
    """Fenced blocks as language, line of the first code line, and code."""
    found, opened = [], None
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*```\s*(\w*)", line)
        if mark and opened is None:
            opened = (mark[1], number + 1, [])
        elif mark:
            found.append((opened[0], opened[1], "\n".join(opened[2])))
            opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"a block that begins at line {opened[1] - 1} has no end"
    return found


def links(text: str) -> list[str]:
    """Targets of the links and images outside code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, flags=re.MULTILINE)


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+\s+(.*?)\s*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[parts.index("src") + 1 :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


EXAMPLES = {module_name(path.relative_to(ROOT)): path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, a cache of its own, and a known seed."""
    import torch

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PROTO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return folder


def test_fences_and_links_are_found():
    text = (
        "[a](b.md#c) `[x](no.md)`\n```python\na = '[q](no.md)'\n\nb = 1\n```\n# The End: 1\n[d]: e.md\n![p](<q.png>)\n"
    )
    assert fences(text) == [("python", 3, "a = '[q](no.md)'\n\nb = 1")]
    assert links(text) == ["b.md#c", "q.png", "e.md"]
    assert slugs(text) == {"the-end-1"}


@pytest.mark.parametrize(
    "page", [path for path in READMES if path.is_file() and "```python" in path.read_text("utf-8")], ids=name_of
)
def test_python_of_the_readme_runs(page: Path, elsewhere: Path):
    """All blocks of a page in one namespace, top to bottom; a traceback shows the page's own lines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for language, line, code in fences(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path):
    assert page.is_file(), f"{name_of(page)} is missing"
    for target in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{name_of(page)}: the link {target!r} leads nowhere"
        assert place.is_relative_to(ROOT), f"{name_of(page)}: the link {target!r} leaves the repository"
        if anchor:
            found = slugs(place.read_text(encoding="utf-8"))
            assert anchor in found, f"{name_of(page)}: {target!r} names no heading, found {sorted(found)}"


@pytest.mark.parametrize("module", sorted(EXAMPLES))
def test_examples_of_the_docstrings_run(module: str, elsewhere: Path):
    tests = [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]
    wanted = EXAMPLES[module].read_text(encoding="utf-8").count(">>> ")
    found = sum(len(test.examples) for test in tests)
    assert found == wanted, f"{module}: {wanted} examples are written, {found} are found"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    output: list[str] = []
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)
