"""Which branch of an ECG network looks at which label.

PTB-XL's 71 statements (Wagner et al. 2020, SCP-ECG codes) in the order of its ``scp_statements.csv``, and the three
groups of ProtoECGNet (arXiv 2504.08713): rhythm needs the whole strip as a time series, morphology a short window,
diffuse the whole trace at once. Other label sets are grouped by a mapping; a label that nobody knows goes to every
branch.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = [
    "BRANCHES",
    "PTBXL_ALL",
    "PTBXL_DIFFUSE",
    "PTBXL_MORPHOLOGY",
    "PTBXL_RHYTHM",
    "branch_labels",
    "read_branches",
]

BRANCHES: tuple[str, ...] = ("rhythm", "morphology", "diffuse")

# fmt: off
PTBXL_ALL: tuple[str, ...] = (
    "NDT", "NST_", "DIG", "LNGQT", "NORM", "IMI", "ASMI", "LVH", "LAFB", "ISC_", "IRBBB", "1AVB", "IVCD",
    "ISCAL", "CRBBB", "CLBBB", "ILMI", "LAO/LAE", "AMI", "ALMI", "ISCIN", "INJAS", "LMI", "ISCIL", "LPFB",
    "ISCAS", "INJAL", "ISCLA", "RVH", "ANEUR", "RAO/RAE", "EL", "WPW", "ILBBB", "IPLMI", "ISCAN", "IPMI",
    "SEHYP", "INJIN", "INJLA", "PMI", "3AVB", "INJIL", "2AVB", "ABQRS", "PVC", "STD_", "VCLVH", "QWAVE", "LOWT",
    "NT_", "PAC", "LPR", "INVT", "LVOLT", "HVOLT", "TAB_", "STE_", "PRC(S)", "SR", "AFIB", "STACH", "SARRH",
    "SBRAD", "PACE", "SVARR", "BIGU", "AFLT", "SVTAC", "PSVT", "TRIGU",
)
PTBXL_RHYTHM: tuple[str, ...] = (
    "1AVB", "IVCD", "3AVB", "2AVB", "SR", "AFIB", "STACH", "SARRH", "SBRAD", "PACE", "SVARR", "BIGU", "AFLT",
    "SVTAC", "PSVT", "TRIGU",
)
# fmt: on
PTBXL_DIFFUSE: tuple[str, ...] = ("DIG", "NORM", "EL")
PTBXL_MORPHOLOGY: tuple[str, ...] = tuple(code for code in PTBXL_ALL if code not in PTBXL_RHYTHM + PTBXL_DIFFUSE)

_PTBXL_BRANCH: dict[str, str] = {
    code: branch
    for branch, codes in zip(BRANCHES, (PTBXL_RHYTHM, PTBXL_MORPHOLOGY, PTBXL_DIFFUSE), strict=True)
    for code in codes
}


def branch_labels(label_names: Sequence[str], mapping: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Give every label to the branch that has to look at it.

    PTB-XL's codes go to their branch, ``mapping`` overrides. A label that neither knows goes to EVERY branch: nobody
    said which view it needs.

    Args:
        label_names: the labels of the data set; their order is kept inside each branch.
        mapping: label -> ``"rhythm"``, ``"morphology"`` or ``"diffuse"``; see :func:`read_branches`.

    Returns:
        Branch -> its labels, in the order rhythm, morphology, diffuse. A branch without labels is left out.

    Raises:
        ValueError: no labels, a repeated label, a mapping to an unknown branch, or one of a label that is not there.

    Example:
        >>> from proto_ecg.data.labels import branch_labels
        >>> branch_labels(["NORM", "AFIB", "LVH"])
        {'rhythm': ['AFIB'], 'morphology': ['LVH'], 'diffuse': ['NORM']}
        >>> branch_labels(["AFIB", "AMYLOID"], {"AMYLOID": "morphology"})
        {'rhythm': ['AFIB'], 'morphology': ['AMYLOID']}
    """
    names = list(label_names)
    if not names:
        raise ValueError("label_names: found none, needed at least one label")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"label_names: found {repeated} more than once, needed each label once")
    given = dict(mapping or {})
    unknown = [code for code in given if code not in set(names)]
    if unknown:
        raise ValueError(f"branches: unknown SCP code {unknown[0]!r}, needed one of the labels {names}")
    for code, branch in given.items():
        if branch not in BRANCHES:
            raise ValueError(f"branches: found branch {branch!r} for {code!r}, needed one of {list(BRANCHES)}")
    branch_of = _PTBXL_BRANCH | given
    groups = {branch: [name for name in names if branch_of.get(name, branch) == branch] for branch in BRANCHES}
    return {branch: group for branch, group in groups.items() if group}


def read_branches(path: str | Path) -> dict[str, str]:
    """Read a grouping file: a CSV with the columns ``code`` and ``branch``, one label a row.

    Raises:
        ValueError: the file is missing or unreadable, lacks a column, or names a code twice; the file is named.

    Example:
        >>> import pathlib, tempfile
        >>> from proto_ecg.data.labels import read_branches
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "branches.csv"
        >>> _ = path.write_text("code,branch\\nAMYLOID,morphology\\n")
        >>> read_branches(path)
        {'AMYLOID': 'morphology'}
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"code", "branch"} <= set(columns):
                raise ValueError(f"{path}: found columns {list(columns)}, needed 'code' and 'branch'")
            rows = [((row["code"] or "").strip(), (row["branch"] or "").strip()) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the grouping file ({error}), needed a CSV 'code,branch'") from error
    mapping = dict(rows)
    if len(mapping) != len(rows):
        raise ValueError(f"{path}: found {len(rows)} rows for {len(mapping)} codes, needed each code once")
    return mapping
