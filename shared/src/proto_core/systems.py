"""The catalogue of systems: every published method that an installed Proto package declares.

A system is declared once, as an entry point of the group ``proto.systems`` whose name is its key and whose value is
``module:object``. The object carries ``paper: ClassVar[Paper]``. Nothing is imported until a system is loaded, so
listing keys costs no torch import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Literal, get_args

__all__ = ["GROUP", "Evidence", "Paper", "System", "catalogue"]

GROUP = "proto.systems"
Evidence = Literal["code", "formulas", "reconstruction"]


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a system comes from, and what its golden values stand on.

    Args:
        title: title of the paper.
        year: year of publication.
        arxiv: arXiv identifier such as ``"2504.08713"``, or ``None`` where the paper is not on arXiv.
        code: the authors' repository, ``owner/name``, optionally ``@commit``; ``None`` if there is none.
        evidence: ``"code"`` (golden values from the authors' code), ``"formulas"`` (from an independent reference of
            the published formulas) or ``"reconstruction"`` (the paper's equations could not be had).
        summary: the method in one line, as the catalogue prints it.
        claim: the sentence that the system's claim test shows.

    Raises:
        ValueError: an unknown ``evidence``, an empty title, summary or claim, or a malformed arXiv identifier.
    """

    title: str
    year: int
    arxiv: str | None
    code: str | None
    evidence: Evidence
    summary: str
    claim: str

    def __post_init__(self) -> None:
        if self.evidence not in get_args(Evidence):
            raise ValueError(f"Paper.evidence: found {self.evidence!r}, needed one of {get_args(Evidence)}")
        if self.arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?|[a-z\-.A-Z]+/\d{7}", self.arxiv):
            raise ValueError(f"Paper.arxiv: found {self.arxiv!r}, needed an identifier such as '2504.08713'")
        for field in ("title", "summary", "claim"):
            if not getattr(self, field).strip():
                raise ValueError(f"Paper.{field} is empty")


@dataclass(frozen=True, slots=True)
class System:
    """One entry of the catalogue.

    Attributes:
        key: the system's name; also its file, config folder and claim file.
        package: the distribution that declares it, such as ``"proto-ecg"``.
        target: ``module:object``.
    """

    key: str
    package: str
    target: str
    _entry_point: EntryPoint

    def load(self) -> Any:
        """Import and return the system's object (this is when torch is imported)."""
        return self._entry_point.load()

    @property
    def paper(self) -> Paper:
        """The system's paper; loads the system.

        Raises:
            TypeError: the object has no ``paper`` of type :class:`Paper`.
        """
        paper = getattr(self.load(), "paper", None)
        if not isinstance(paper, Paper):
            raise TypeError(f"system {self.key!r} ({self.target}) needs `paper: ClassVar[Paper]`, found {paper!r}")
        return paper


def catalogue(package: str | None = None) -> Mapping[str, System]:
    """All installed systems by key, sorted; of one distribution when ``package`` is given.

    Raises:
        ValueError: two packages declare the same key.

    Example:
        >>> from proto_core.systems import catalogue
        >>> all(system.key == key for key, system in catalogue().items())
        True
    """
    systems: dict[str, System] = {}
    for entry_point in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        owner = entry_point.dist.name if entry_point.dist is not None else "unknown"
        found = System(entry_point.name, owner, entry_point.value, entry_point)
        known = systems.get(found.key)
        if known is not None and (known.package, known.target) != (found.package, found.target):
            raise ValueError(
                f"system {found.key!r} is declared twice: {known.package} ({known.target}) and "
                f"{found.package} ({found.target})"
            )
        systems[found.key] = found
    if package is not None:
        systems = {key: system for key, system in systems.items() if system.package == package}
    return MappingProxyType(systems)
