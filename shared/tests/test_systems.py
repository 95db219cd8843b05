"""The catalogue of systems: what a paper must say, how keys are owned, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest

from proto_core import systems
from proto_core.systems import GROUP, Paper, catalogue

COMPLETE: dict[str, Any] = {
    "title": "A Paper",
    "year": 2024,
    "arxiv": "2401.01234",
    "code": "somebody/something@abc1234",
    "evidence": "code",
    "summary": "What it does.",
    "claim": "What it shows.",
}


class Declared:
    """An entry point's object with a paper."""

    paper = Paper(**COMPLETE)


class Bare:
    """An entry point's object without a paper."""


class Wrong:
    """An entry point's object whose paper is a plain dict."""

    paper = COMPLETE


def declare(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, str, str | None]) -> None:
    """Let ``entry_points`` answer these rows of key, target and distribution, and nothing else."""
    made = []
    for key, target, package in rows:
        entry = EntryPoint(key, target, GROUP)
        if package is not None:
            vars(entry)["dist"] = SimpleNamespace(name=package)
        made.append(entry)

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == GROUP
        return made

    monkeypatch.setattr(systems, "entry_points", entry_points)


@pytest.mark.parametrize("arxiv", [None, "2504.08713", "1706.0376", "2504.08713v2", "cs/0112017", "hep-th/9901001"])
def test_identifiers_of_every_kind_are_taken(arxiv):
    assert Paper(**COMPLETE | {"arxiv": arxiv}).arxiv == arxiv


@pytest.mark.parametrize("arxiv", ["", "arXiv:2504.08713", "2504.8", "https://arxiv.org/abs/2504.08713", "2504.08713 "])
def test_a_malformed_identifier_is_named(arxiv):
    with pytest.raises(ValueError, match=r"Paper\.arxiv: found .*needed an identifier such as '2504.08713'"):
        Paper(**COMPLETE | {"arxiv": arxiv})


def test_unknown_evidence_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"evidence: found 'rumour', needed one of .*'code', 'formulas', 'recon"):
        Paper(**COMPLETE | {"evidence": "rumour"})


@pytest.mark.parametrize("field", ["title", "summary", "claim"])
@pytest.mark.parametrize("value", ["", "  \n"])
def test_an_empty_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"Paper\.{field} is empty"):
        Paper(**COMPLETE | {field: value})


def test_a_paper_does_not_change():
    with pytest.raises(AttributeError):
        Paper(**COMPLETE).year = 1999  # type: ignore[misc]


def test_catalogue_is_sorted_and_knows_owners(monkeypatch):
    declare(monkeypatch, ("zeta", "a:Z", "proto-b"), ("alpha", "a:A", "proto-a"), ("mid", "b:M", "proto-b"))
    found = catalogue()
    assert list(found) == ["alpha", "mid", "zeta"]
    assert [(system.key, system.package, system.target) for system in found.values()] == [
        ("alpha", "proto-a", "a:A"),
        ("mid", "proto-b", "b:M"),
        ("zeta", "proto-b", "a:Z"),
    ]


def test_catalogue_of_one_package(monkeypatch):
    declare(monkeypatch, ("zeta", "a:Z", "proto-b"), ("alpha", "a:A", "proto-a"), ("loose", "b:M", None))
    assert list(catalogue("proto-b")) == ["zeta"]
    assert list(catalogue("unknown")) == ["loose"]
    assert list(catalogue("proto-c")) == []


def test_catalogue_cannot_be_written_to(monkeypatch):
    declare(monkeypatch, ("alpha", "a:A", "proto-a"))
    with pytest.raises(TypeError):
        catalogue()["beta"] = catalogue()["alpha"]  # type: ignore[index]


@pytest.mark.parametrize("second", [("k", "b:B", "proto-b"), ("k", "a:A", "proto-b"), ("k", "b:B", "proto-a")])
def test_a_key_that_is_declared_twice_names_both(monkeypatch, second):
    declare(monkeypatch, ("k", "a:A", "proto-a"), second)
    with pytest.raises(ValueError, match=r"'k' is declared twice: proto-a \(a:A\) and ") as error:
        catalogue()
    assert f"{second[2]} ({second[1]})" in str(error.value)


def test_a_distribution_that_is_seen_twice_is_one(monkeypatch):
    """An editable install beside a wheel of the same distribution lists the same entry point again."""
    declare(monkeypatch, ("k", "a:A", "proto-a"), ("k", "a:A", "proto-a"))
    assert list(catalogue()) == ["k"]


def test_load_and_paper(monkeypatch):
    declare(monkeypatch, ("good", "declared_here:Declared", "proto-a"))
    monkeypatch.setitem(sys.modules, "declared_here", sys.modules[__name__])
    system = catalogue()["good"]
    assert system.load() is Declared
    assert system.paper is Declared.paper


@pytest.mark.parametrize("name", ["Bare", "Wrong"])
def test_an_object_without_a_paper_is_refused_by_name(monkeypatch, name):
    declare(monkeypatch, ("bad", f"declared_here:{name}", "proto-a"))
    monkeypatch.setitem(sys.modules, "declared_here", sys.modules[__name__])
    with pytest.raises(TypeError, match=rf"system 'bad' \(declared_here:{name}\) needs `paper: ClassVar\[Paper\]`"):
        _ = catalogue()["bad"].paper


def test_listing_keys_imports_no_system(monkeypatch):
    declare(monkeypatch, ("broken", "no_such_module:Nothing", "proto-a"))
    assert list(catalogue()) == ["broken"]
    with pytest.raises(ModuleNotFoundError):
        catalogue()["broken"].load()
    code = "import sys, proto_core.systems as s; list(s.catalogue()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
