"""Diagnosis tables: reading them, turning them into outcomes, and linking ECGs to admissions as in MIMIC-IV."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .phecodes import VOCABULARIES, load_phecode_map, load_rollup_map, normalize_icd, phecode_matrix

__all__ = ["diagnosis_matrix", "link_admissions", "load_diagnoses"]

_FORMS = (("phecode",), ("icd_code", "icd_version"), ("diagnosis",))


def load_diagnoses(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a diagnoses CSV; all columns are read as strings.

    One row per diagnosis. Columns: ``record`` (id as in the data set) or ``patient_id``; and ``phecode``, or
    ``icd_code`` and ``icd_version`` (9 or 10), or ``diagnosis`` (any name, used as it is). Further columns may serve
    as covariates. A row with an empty diagnosis says that the person was looked at and has none.

    Raises:
        ValueError: a missing or empty file, or a missing column; names what was found and needed.
    """
    if not Path(path).is_file():
        raise ValueError(f"diagnoses {str(path)!r}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (pd.errors.ParserWarning, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"diagnoses {str(path)!r}: cannot be read as CSV ({error})") from error
    columns = list(table.columns)
    if not {"record", "patient_id"} & set(columns):
        raise ValueError(f"diagnoses {str(path)!r}: found columns {columns}, needed 'record' or 'patient_id'")
    if not any(set(form) <= set(columns) for form in _FORMS):
        raise ValueError(
            f"diagnoses {str(path)!r}: found columns {columns}, needed 'phecode', or 'icd_code' and 'icd_version', "
            "or 'diagnosis'"
        )
    if table.empty:
        raise ValueError(f"diagnoses {str(path)!r}: the table has no row")
    return table


def diagnosis_matrix(
    table: pd.DataFrame,
    persons: Sequence[str],
    *,
    by: str,
    phecode_map: str | os.PathLike[str] | None = None,
    rollup_map: str | os.PathLike[str] | None = None,
) -> tuple[list[str], np.ndarray]:
    """Outcomes of persons: which diagnosis each of them has.

    Args:
        table: of :func:`load_diagnoses`.
        persons: N ids, the rows of the result; a person that the table does not name has none.
        by: the table's id column, "record" or "patient_id".
        phecode_map: file of :func:`load_phecode_map`; without it ICD codes count by their first three characters.
        rollup_map: file of :func:`load_rollup_map`.

    Returns:
        Names of the K outcomes, and the int8 matrix ``[N, K]``.

    Raises:
        ValueError: no column ``by``, none of the columns of diagnoses, an ICD version other than 9 and 10, or no
            outcome at all among these persons.
    """
    form = next((form for form in _FORMS if set(form) <= set(table.columns)), None)
    if by not in table or form is None:
        raise ValueError(f"diagnoses: found columns {list(table.columns)}, needed {by!r} and one of {list(_FORMS)}")
    known = table[table[by].isin(set(persons))]
    if len(form) == 1:
        names = known[form[0]].str.strip()
        pairs = known[names != ""].assign(outcome=names)
        people, codes = pairs[by].tolist(), pairs["outcome"].tolist()
        vocabularies = ["own"] * len(codes)
        mapping = {("own", code): {code} for code in codes}
    else:
        given = known[known["icd_code"].str.strip() != ""]
        versions = given["icd_version"].str.strip()
        wrong = sorted(set(versions) - {"9", "10"})
        if wrong:
            raise ValueError(f"diagnoses: found icd_version {wrong[0]!r}, needed 9 or 10")
        people = given[by].tolist()
        codes = [normalize_icd(code, int(version)) for code, version in zip(given["icd_code"], versions)]
        vocabularies = [VOCABULARIES[int(version)] for version in versions]
        if phecode_map is not None:
            mapping = load_phecode_map(phecode_map)
        else:
            warnings.warn("no phecode map: ICD codes count by their first three characters", stacklevel=2)
            mapping = {(v, code): {f"{v} {code[:3]}"} for v, code in zip(vocabularies, codes)}
    rollup = load_rollup_map(rollup_map) if rollup_map is not None else None
    found, names_, matrix = phecode_matrix(people, codes, vocabularies, mapping, rollup, all_persons=persons)
    if not names_:
        raise ValueError(f"diagnoses: no outcome for any of the {len(persons)} persons; does the column {by!r} match?")
    row = {person: i for i, person in enumerate(found)}
    return names_, matrix[[row[person] for person in persons]]


def link_admissions(records: pd.DataFrame, admissions: pd.DataFrame, diagnoses: pd.DataFrame) -> pd.DataFrame:
    """Diagnoses of the admission that each ECG was recorded in; of each admission its first ECG.

    Args:
        records: columns ``subject_id, study_id, ecg_time`` (and others, kept), as MIMIC-IV-ECG's record list.
        admissions: columns ``subject_id, hadm_id, admittime, dischtime``.
        diagnoses: columns ``hadm_id, icd_code, icd_version``.

    Returns:
        The records' columns with ``hadm_id, icd_code, icd_version``, one row per diagnosis; an ECG belongs to an
        admission of the same subject with ``admittime <= ecg_time <= dischtime``.

    Raises:
        ValueError: a missing column.

    Source:
        arXiv 2508.01521 as its card reads it; "first ECG of an admission" is our reading.
    """
    for name, table, needed in (
        ("records", records, ("subject_id", "study_id", "ecg_time")),
        ("admissions", admissions, ("subject_id", "hadm_id", "admittime", "dischtime")),
        ("diagnoses", diagnoses, ("hadm_id", "icd_code", "icd_version")),
    ):
        missing = [column for column in needed if column not in table]
        if missing:
            raise ValueError(f"{name}: found columns {list(table.columns)}, needed also {missing}")
    joined = records.merge(admissions[["subject_id", "hadm_id", "admittime", "dischtime"]], on="subject_id")
    time, start, stop = (
        pd.to_datetime(joined[name], format="ISO8601") for name in ("ecg_time", "admittime", "dischtime")
    )
    inside = (start <= time) & (time <= stop)
    joined = joined[inside].assign(_time=time[inside]).sort_values(["_time", "study_id"], kind="stable")
    first = joined.drop_duplicates("hadm_id").drop(columns=["_time", "admittime", "dischtime"])
    return first.merge(diagnoses[["hadm_id", "icd_code", "icd_version"]], on="hadm_id").reset_index(drop=True)
