"""Diagnosis codes to phecodes: ICD-9-CM and ICD-10-CM codes, mapping and rollup files, the matrix of cases.

Facts about the files: the PheWAS project's tables (phecode map 1.2). Phecodes are strings: "008" and "8" differ.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["load_phecode_map", "load_rollup_map", "map_to_phecodes", "normalize_icd", "phecode_matrix"]

VOCABULARIES = {9: "ICD9CM", 10: "ICD10CM"}


def normalize_icd(code: str, version: int) -> str:
    """An ICD code with its dot, upper case and without spaces.

    Args:
        code: such as ``"i4891 "``.
        version: 9 or 10.

    Raises:
        ValueError: another version, or an empty code.

    Example:
        >>> from proto_ecg.phenotypes import normalize_icd
        >>> normalize_icd("i4891 ", 10), normalize_icd("42731", 9), normalize_icd("E8790", 9), normalize_icd("I10", 10)
        ('I48.91', '427.31', 'E879.0', 'I10')
    """
    if version not in VOCABULARIES:
        raise ValueError(f"version: found {version!r}, needed 9 or 10")
    clean = "".join(str(code).split()).upper()
    if not clean:
        raise ValueError("code: found nothing, needed an ICD code")
    if "." in clean:
        return clean
    head = 4 if version == 9 and clean.startswith("E") else 3
    return f"{clean[:head]}.{clean[head:]}" if len(clean) > head else clean


def _rows(path: str | os.PathLike[str]) -> tuple[list[str], list[list[str]]]:
    """Header (lower case) and rows of a CSV file, in UTF-8 or, failing that, cp1252."""
    if not Path(path).is_file():
        raise ValueError(f"{str(path)!r}: no such file")
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}: found a line that is not CSV ({error}), needed comma-separated text"
        ) from error
    if not rows:
        raise ValueError(f"{str(path)!r}: the file is empty")
    return [name.strip().lower() for name in rows[0]], rows[1:]


def load_phecode_map(path: str | os.PathLike[str]) -> dict[tuple[str, str], set[str]]:
    """Read which phecodes an ICD code stands for.

    Two forms are accepted: columns ``vocabulary_id, code, phecode``, or the ICD-10-CM file of map 1.2 with columns
    ``icd10cm`` and ``phecode`` among others. A code may stand for several phecodes; an empty phecode is none.

    Returns:
        ``(vocabulary, code) -> phecodes`` with vocabulary "ICD9CM" or "ICD10CM".

    Raises:
        ValueError: a missing or empty file, or columns of neither form; names file and columns.
    """
    header, rows = _rows(path)
    if {"vocabulary_id", "code", "phecode"} <= set(header):
        columns = [header.index(name) for name in ("vocabulary_id", "code", "phecode")]
    elif {"icd10cm", "phecode"} <= set(header):
        columns = [-1, header.index("icd10cm"), header.index("phecode")]
    else:
        raise ValueError(
            f"{str(path)!r}: found columns {header}, needed vocabulary_id, code, phecode, or icd10cm and phecode"
        )
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        vocabulary, code, phecode = ("ICD10CM" if c < 0 else row[c].strip() if c < len(row) else "" for c in columns)
        if code and phecode:
            found.setdefault((vocabulary, code.upper()), set()).add(phecode)
    return found


def load_rollup_map(path: str | os.PathLike[str]) -> dict[str, set[str]]:
    """Read each phecode's own code and ancestors (columns ``code``, ``phecode_unrolled``).

    Not the same as cutting decimals: 250.41 climbs to 250.4, which climbs no further.

    Raises:
        ValueError: a missing or empty file, or a missing column.
    """
    header, rows = _rows(path)
    missing = [name for name in ("code", "phecode_unrolled") if name not in header]
    if missing:
        raise ValueError(f"{str(path)!r}: found columns {header}, needed also {missing}")
    own, up = header.index("code"), header.index("phecode_unrolled")
    found: dict[str, set[str]] = {}
    for row in rows:
        if max(own, up) < len(row) and row[own].strip() and row[up].strip():
            found.setdefault(row[own].strip(), set()).add(row[up].strip())
    return found


def map_to_phecodes(
    codes: Sequence[str],
    vocabularies: Sequence[str],
    phecode_map: Mapping[tuple[str, str], set[str]],
    rollup_map: Mapping[str, set[str]] | None = None,
) -> list[set[str]]:
    """Phecodes of each code, with their ancestors if a rollup map is given; an unknown code has none.

    Args:
        codes: with dots, as :func:`normalize_icd` gives them.
        vocabularies: "ICD9CM" or "ICD10CM" for each code.
        phecode_map: of :func:`load_phecode_map`.
        rollup_map: of :func:`load_rollup_map`; a phecode that it lacks stands for itself.

    Raises:
        ValueError: another number of vocabularies than codes.
    """
    if len(codes) != len(vocabularies):
        raise ValueError(f"vocabularies: found {len(vocabularies)}, needed {len(codes)}, one per code")
    result = []
    for code, vocabulary in zip(codes, vocabularies):
        phecodes = phecode_map.get((vocabulary, code), set())
        if rollup_map is not None:
            phecodes = {up for phecode in phecodes for up in rollup_map.get(phecode, {phecode})}
        result.append(set(phecodes))
    return result


def phecode_matrix(
    persons: Sequence[Hashable],
    codes: Sequence[str],
    vocabularies: Sequence[str],
    phecode_map: Mapping[tuple[str, str], set[str]],
    rollup_map: Mapping[str, set[str]] | None = None,
    dates: Sequence[Hashable] | None = None,
    min_count: int = 1,
    all_persons: Iterable[Hashable] | None = None,
) -> tuple[list[Hashable], list[str], np.ndarray]:
    """Which person is a case of which phecode.

    A person's count for a phecode is the number of distinct dates (if given), else of codes, after rollup; a case has
    at least ``min_count`` (2 by the convention of PheWAS, 1 for one admission's discharge list).

    Args:
        persons: one per code.
        codes: with dots.
        vocabularies: one per code.
        phecode_map: of :func:`load_phecode_map`.
        rollup_map: of :func:`load_rollup_map`.
        dates: one per code.
        min_count: at least 1.
        all_persons: further persons, all-zero rows unless they have codes.

    Returns:
        Sorted persons, sorted phecodes, and the int8 matrix ``[N, K]``.

    Raises:
        ValueError: lists of different lengths, ``min_count`` below 1.
    """
    if len(persons) != len(codes) or (dates is not None and len(dates) != len(codes)):
        raise ValueError(
            f"persons, codes, dates: found {len(persons)}, {len(codes)} and "
            f"{'none' if dates is None else len(dates)}, needed as many of each"
        )
    if min_count < 1:
        raise ValueError(f"min_count: found {min_count}, needed at least 1")
    counted: dict[tuple[Hashable, str], set[Hashable]] = {}
    events_of_codes = range(len(codes)) if dates is None else dates
    for person, event, phecodes in zip(
        persons, events_of_codes, map_to_phecodes(codes, vocabularies, phecode_map, rollup_map)
    ):
        for phecode in phecodes:
            counted.setdefault((person, phecode), set()).add(event)
    people = sorted(set(persons) | set(() if all_persons is None else all_persons))  # type: ignore[type-var]
    names = sorted({phecode for _, phecode in counted})
    row = {person: i for i, person in enumerate(people)}
    column = {name: k for k, name in enumerate(names)}
    matrix = np.zeros((len(people), len(names)), dtype=np.int8)
    for (person, phecode), events in counted.items():
        matrix[row[person], column[phecode]] = len(events) >= min_count
    return people, names, matrix
