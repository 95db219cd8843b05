"""PTB-XL as it is on disk (Wagner et al. 2020, Scientific Data 7:154; versions 1.0.1 to 1.0.3).

Labels and splits as in the PTB-XL benchmark and ProtoECGNet (arXiv 2504.08713): any statement named for a record
counts, whatever its likelihood; folds 1-8 train, 9 validates, 10 tests, and folds keep patients together.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_warn

from proto_ecg.data.labels import PTBXL_DIFFUSE, PTBXL_MORPHOLOGY, PTBXL_RHYTHM, read_branches
from proto_ecg.data.module import ECGDataModule, ECGTable
from proto_ecg.data.records import ECGWarning, resolve_record

__all__ = ["PTBXL"]

LABEL_SETS: tuple[str, ...] = (
    "all",
    "super",
    "sub",
    "diagnostic",
    "form",
    "rhythm",
    "branch:rhythm",
    "branch:morphology",
    "branch:diffuse",
)
_GROUPS = {"rhythm": PTBXL_RHYTHM, "morphology": PTBXL_MORPHOLOGY, "diffuse": PTBXL_DIFFUSE}
_CLASS_COLUMN = {"super": "diagnostic_class", "sub": "diagnostic_subclass"}
_LAYOUT = "a PTB-XL folder with ptbxl_database.csv, scp_statements.csv and records100/ or records500/"


class PTBXL(ECGDataModule):
    """The PTB-XL data set from its folder.

    Args:
        root: the folder with ``ptbxl_database.csv``, ``scp_statements.csv``, ``records100/`` and/or ``records500/``.
        labels: ``"all"`` (71 statements), ``"diagnostic"``, ``"form"``, ``"rhythm"`` (the statements of that kind),
            ``"super"`` or ``"sub"`` (diagnostic classes or subclasses), ``"branch:rhythm"``, ``"branch:morphology"``,
            ``"branch:diffuse"`` (the groups of ProtoECGNet), or a list of statements. Named sets have the order of
            ``scp_statements.csv``. Records without any label of the set stay, with targets 0; only ``"super"`` and
            ``"sub"`` leave them out.
        branches: a CSV ``code,branch`` that regroups labels.
        train_folds: values of ``strat_fold`` to train on.
        val_folds: values to validate on.
        test_folds: values to test on.
        batch_size: see :class:`ECGDataModule`, as all that follow.
        num_workers: processes of each data loader.
        sampling_rate: in Hz. 100 reads ``filename_lr``, anything else ``filename_hr``, resampled; where those files are
            missing, the other ones.
        seconds: length of the model's input.
        remove_baseline: take slow drift out.
        predict_fold: ``"test"`` or ``"all"``.
        cache_dir: where decoded signals are kept.
        decode_workers: processes of the first pass.
        quiet: no progress bar in the first pass.

    Raises:
        ValueError: a missing folder, file or column, an unknown label set or statement; the message names it.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        labels: str | list[str] = "all",
        branches: str | Path | None = None,
        train_folds: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
        val_folds: Sequence[int] = (9,),
        test_folds: Sequence[int] = (10,),
        batch_size: int = 32,
        num_workers: int = 0,
        sampling_rate: int = 100,
        seconds: float = 10.0,
        remove_baseline: bool = True,
        predict_fold: Literal["test", "all"] = "test",
        cache_dir: str | Path | None = None,
        decode_workers: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.labels = labels
        self._record_of: dict[str, str] = {}
        self.fold_of = _fold_of(train_folds, val_folds, test_folds)
        super().__init__(
            root,
            self._names(Path(root).expanduser()),
            branches=None if branches is None else read_branches(branches),
            batch_size=batch_size,
            num_workers=num_workers,
            sampling_rate=sampling_rate,
            seconds=seconds,
            remove_baseline=remove_baseline,
            predict_fold=predict_fold,
            cache_dir=cache_dir,
            decode_workers=decode_workers,
            quiet=quiet,
        )

    def _names(self, root: Path) -> list[str]:
        return label_set(_read_statements(root), self.labels)

    def read_table(self) -> ECGTable:
        """Read ``ptbxl_database.csv``: records, targets, folds and patients.

        Raises:
            ValueError: a missing column, a row that cannot be read, or a statement that ``scp_statements.csv`` does not
                list; names the file and the ``ecg_id``.
        """
        statements = _read_statements(self.root)
        file = self.root / "ptbxl_database.csv"
        table = _read_csv(file, ["ecg_id", "patient_id", "scp_codes", "strat_fold"], index="ecg_id")
        codes = [_codes(file, ecg_id, text) for ecg_id, text in table["scp_codes"].items()]
        known = set(statements.index)
        for ecg_id, found in zip(table.index, codes, strict=True):
            for code in found:
                if code not in known:
                    raise ValueError(
                        f"{file}: found the statement {code!r} for ecg_id {ecg_id}, needed one of scp_statements.csv"
                    )
        targets = _multi_hot(codes, statements, self.labels, self.label_names)
        fold = np.array([self.fold_of.get(number, "") for number in _fold_numbers(file, table)])
        ids = table[self._file_column(file, table)].astype(str)
        keep = np.flatnonzero(targets.any(axis=1)) if self._by_class else np.arange(len(table))
        self._record_of = dict(zip(table.index[keep].astype(str), ids.iloc[keep], strict=True))
        patients = [_patient(value) for value in table["patient_id"].iloc[keep]]
        return ECGTable(ids.iloc[keep].tolist(), targets[keep], fold[keep], patients)

    def record_path(self, record_id: str) -> Path:
        """Where a record lies: ``record_id`` is one of :attr:`record_ids`, or an ``ecg_id`` such as ``"17"``.

        Raises:
            ValueError: the id leads out of the root.
        """
        if record_id.isdecimal():
            _ = self.table
            record_id = self._record_of.get(record_id, record_id)
        return super().record_path(record_id)

    @property
    def _by_class(self) -> bool:
        return isinstance(self.labels, str) and self.labels in _CLASS_COLUMN

    def _file_column(self, file: Path, table: pd.DataFrame) -> str:
        """Which files to read: those at the wanted rate if they are there, else whatever is."""
        preferred = ["filename_lr", "filename_hr"] if self.sampling_rate == 100 else ["filename_hr", "filename_lr"]
        columns = [column for column in preferred if column in table.columns]
        if not columns:
            raise ValueError(f"{file}: found columns {list(table.columns)}, needed filename_lr or filename_hr")
        if table.empty:
            raise ValueError(f"{file}: found no record, needed at least one")
        there = [
            column
            for column in columns
            if any(Path(f"{resolve_record(self.root, str(name))}.hea").is_file() for name in table[column].iloc[:100])
        ]
        if not there:
            raise ValueError(f"{self.root}: found none of the files in {columns}, needed {_LAYOUT}")
        if there[0] == "filename_lr" and self.sampling_rate > 100:
            rank_zero_warn(
                f"{self.root}: no records500, so the 100 Hz files are raised to {self.sampling_rate} Hz; they hold "
                "nothing above 50 Hz",
                category=ECGWarning,
            )
        return there[0]


def label_set(statements: pd.DataFrame, labels: str | Sequence[str]) -> list[str]:
    """The names of a label set, in the order of ``scp_statements.csv``; a list of statements stays as it is.

    Raises:
        ValueError: an unknown set, or a statement that the file does not list.
    """
    if not isinstance(labels, str):
        unknown = [code for code in labels if code not in statements.index]
        if unknown:
            raise ValueError(f"labels: unknown SCP code {unknown[0]!r}, needed codes of scp_statements.csv")
        return list(labels)
    if labels == "all":
        return [str(code) for code in statements.index]
    if labels in _CLASS_COLUMN:
        return [str(name) for name in statements[_CLASS_COLUMN[labels]].dropna().unique()]
    if labels in ("diagnostic", "form", "rhythm"):
        return [str(code) for code in statements.index[statements[labels] == 1]]
    if labels in LABEL_SETS:
        group = _GROUPS[labels.removeprefix("branch:")]
        return [str(code) for code in statements.index if code in group]
    raise ValueError(f"labels: found {labels!r}, needed one of {list(LABEL_SETS)} or a list of SCP codes")


def _multi_hot(
    codes: Sequence[Mapping[str, float]], statements: pd.DataFrame, labels: str | Sequence[str], names: Sequence[str]
) -> np.ndarray:
    column = {name: position for position, name in enumerate(names)}
    if isinstance(labels, str) and labels in _CLASS_COLUMN:
        classes = statements[_CLASS_COLUMN[labels]].dropna().to_dict()
        column = {str(code): column[str(name)] for code, name in classes.items()}
    pairs = [(row, column[code]) for row, found in enumerate(codes) for code in found if code in column]
    targets = np.zeros((len(codes), len(names)), dtype=np.float32)
    if pairs:
        targets[tuple(np.array(pairs).T)] = 1
    return targets


def _fold_of(train: Sequence[int], val: Sequence[int], test: Sequence[int]) -> dict[int, str]:
    named = [(number, name) for name, numbers in (("train", train), ("val", val), ("test", test)) for number in numbers]
    folds = dict(named)
    if len(folds) != len(named):
        raise ValueError(
            f"train_folds, val_folds, test_folds: found {list(train)}, {list(val)}, {list(test)}, needed no fold twice"
        )
    return folds


def _fold_numbers(file: Path, table: pd.DataFrame) -> list[int]:
    numbers = pd.to_numeric(table["strat_fold"], errors="coerce")
    bad = numbers.isna() | (numbers % 1 != 0)
    if bad.any():
        ecg_id, found = next(iter(table["strat_fold"][bad].items()))
        raise ValueError(f"{file}: found strat_fold {found!r} for ecg_id {ecg_id}, needed a whole number")
    return [int(number) for number in numbers]


def _codes(file: Path, ecg_id: object, text: object) -> dict[str, float]:
    try:
        codes = ast.literal_eval(str(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        codes = None
    if not isinstance(codes, dict):
        raise ValueError(f"{file}: found scp_codes {str(text)[:60]!r} for ecg_id {ecg_id}, needed {{code: likelihood}}")
    return {str(code): likelihood for code, likelihood in codes.items()}


def _read_statements(root: Path) -> pd.DataFrame:
    if not root.is_dir():
        raise ValueError(f"root: found no folder {root}, needed {_LAYOUT}")
    columns = ["diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"]
    statements = _read_csv(root / "scp_statements.csv", columns, index=0)
    statements.index = statements.index.astype(str)
    return statements


def _read_csv(file: Path, columns: Sequence[str], index: str | int) -> pd.DataFrame:
    if not file.is_file():
        raise ValueError(f"{file}: found no such file, needed {_LAYOUT}")
    try:
        table = pd.read_csv(file, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{file}: cannot read the table ({error})") from error
    for column in columns:
        if column not in table.columns:
            raise ValueError(f"{file}: found columns {list(table.columns)}, needed also {column!r}")
    return table.set_index(table.columns[index] if isinstance(index, int) else index)


def _patient(value: object) -> str:
    """Patient numbers are floats in the file (15709.0)."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
