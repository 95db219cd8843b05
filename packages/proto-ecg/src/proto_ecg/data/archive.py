"""A user's own ECGs: a folder of WFDB records and one CSV that says what they show.

Any number of labels, any sampling rate, leads in any order, records longer than the model's input. The CSV's columns:

==============  ========================================================================================================
``record``      path of the record relative to the folder, without extension (needed)
``fold``        a whole number, or ``train``, ``val``, ``test`` (optional)
``patient_id``  keeps a patient's records in one fold where there is no ``fold`` column (optional)
``labels``      names separated by ``;`` (instead of label columns); all other columns are then ignored
any other       a label: 1, 0 or empty (= 0); columns that are no labels are named in ``ignore_columns``
==============  ========================================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from proto_ecg.data.labels import read_branches
from proto_ecg.data.module import FOLDS, ECGDataModule, ECGTable
from proto_ecg.data.records import join_record, strip_extension

__all__ = ["ECGArchive"]

_KNOWN_COLUMNS = ("record", "fold", "patient_id", "labels")
_VALUES = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}
_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


class ECGArchive(ECGDataModule):
    """A folder of WFDB records and a CSV of labels; the columns are described at the head of this file.

    Without a ``fold`` column the records are split 80/10/10 by a hash of the patient (or of the record where there is
    no ``patient_id``): the split depends on neither the order nor the other rows, so adding records moves none.

    Args:
        root: the folder.
        csv: the table; a relative path is taken from ``root``.
        labels: the labels to use, in this order; all in the table if ``None`` (columns in their order, names in a
            ``labels`` column by alphabet). Name them where several archives shall serve one model.
        ignore_columns: columns that are no labels.
        branches: a CSV ``code,branch`` that says which branch looks at which label; PTB-XL's codes are known, other
            labels go to every branch.
        train_folds: numbers in the ``fold`` column to train on; all that are not in the other two if ``None``.
        val_folds: numbers to validate on.
        test_folds: numbers to test on.
        batch_size: see :class:`ECGDataModule`, as all that follow.
        num_workers: processes of each data loader.
        sampling_rate: of the model's input, in Hz.
        seconds: length of the model's input; longer records are cut after it, shorter ones refused.
        remove_baseline: take slow drift out.
        predict_fold: ``"test"`` or ``"all"``.
        cache_dir: where decoded signals are kept.
        decode_workers: processes of the first pass.
        quiet: no progress bar in the first pass.

    Raises:
        ValueError: a missing folder, table or column, a value other than 0, 1 and empty, a record named twice, an
            unknown label; the message names the table, the row (the header is row 1) and the column.

    Example:
        >>> import pathlib, tempfile
        >>> from proto_ecg.data.archive import ECGArchive
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (root / "labels.csv").write_text("record,patient_id,AFIB,AMYLOID\\na/1,7,1,0\\na/2,7,0,1\\n")
        >>> archive = ECGArchive(root)
        >>> archive.label_names, archive.branch_labels["morphology"]
        (['AFIB', 'AMYLOID'], ['AMYLOID'])
        >>> archive.targets.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(
        self,
        root: str | Path,
        csv: str | Path = "labels.csv",
        *,
        labels: list[str] | None = None,
        ignore_columns: Sequence[str] = (),
        branches: str | Path | None = None,
        train_folds: Sequence[int] | None = None,
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
        root = Path(root).expanduser()
        if not root.is_dir():
            raise ValueError(f"root: found no folder {root}, needed a folder of WFDB records")
        self.csv = root / Path(csv).expanduser()
        self.folds = {"train": train_folds, "val": val_folds, "test": test_folds}
        self._rows = _read_rows(self.csv)
        names, self._label_values = _read_labels(self.csv, self._rows, labels, ignore_columns)
        super().__init__(
            root,
            names,
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

    def read_table(self) -> ECGTable:
        """Records, targets, folds and patients of the CSV.

        Raises:
            ValueError: a row without a record, a record named twice or outside the root, or an unknown fold.
        """
        records = [str(strip_extension(name.strip())) if name.strip() else "" for name in self._rows["record"]]
        seen: dict[str, int] = {}
        for row, record in enumerate(records, start=2):
            if not record:
                raise ValueError(f"{self.csv}: found no record in row {row}, needed a path without extension")
            if record in seen:
                raise ValueError(
                    f"{self.csv}: found record {record!r} in rows {seen[record]} and {row}, needed it once"
                )
            join_record(self.root, record)
            seen[record] = row
        patients = self._rows["patient_id"].tolist() if "patient_id" in self._rows else None
        if "fold" in self._rows:
            fold = np.array([self._named_fold(row, text) for row, text in enumerate(self._rows["fold"], start=2)])
        else:
            owners = records if patients is None else [p or r for p, r in zip(patients, records, strict=True)]
            fold = np.array([_hashed_fold(owner) for owner in owners])
        return ECGTable(records, self._label_values, fold, patients)

    def _named_fold(self, row: int, text: str) -> str:
        text = text.strip()
        if text in FOLDS:
            return text
        try:
            number = int(text.removesuffix(".0"))
        except ValueError as error:
            raise ValueError(
                f"{self.csv}: found fold {text!r} in row {row}, needed a whole number or one of {list(FOLDS)}"
            ) from error
        for name in ("val", "test", "train"):
            numbers = self.folds[name]
            if numbers is None or number in numbers:
                return name
        return ""


def _hashed_fold(owner: str) -> str:
    """80/10/10 by the hash of a name."""
    share = int.from_bytes(hashlib.sha256(owner.encode()).digest()[:8], "big") / 2**64
    if share < _SHARES["train"]:
        return "train"
    return "val" if share < _SHARES["train"] + _SHARES["val"] else "test"


def _read_rows(file: Path) -> pd.DataFrame:
    """The table as text, so that nothing is guessed."""
    try:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{file}: cannot read the table ({error}), needed a CSV with a column 'record'") from error
    if "record" not in rows.columns:
        raise ValueError(f"{file}: found columns {list(rows.columns)}, needed also 'record'")
    if rows.empty:
        raise ValueError(f"{file}: found no record, needed at least one row below the header")
    return rows


def _read_labels(
    file: Path, rows: pd.DataFrame, labels: Sequence[str] | None, ignore_columns: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    for column in ignore_columns:
        if column not in rows.columns:
            raise ValueError(f"ignore_columns: found {column!r}, which is no column of {file}: {list(rows.columns)}")
    if "labels" in rows.columns and "labels" not in ignore_columns:
        return _from_names(file, rows["labels"], labels)
    names = [column for column in rows.columns if column not in (*_KNOWN_COLUMNS, *ignore_columns)]
    if labels is not None:
        missing = [name for name in labels if name not in names]
        if missing:
            raise ValueError(f"{file}: found columns {list(rows.columns)}, needed also the label {missing[0]!r}")
        names = list(labels)
    if not names:
        raise ValueError(f"{file}: found columns {list(rows.columns)}, needed a column per label or 'labels'")
    text = rows[names].apply(lambda column: column.str.strip())
    wrong = ~text.isin(list(_VALUES))
    if wrong.to_numpy().any():
        row, column = np.argwhere(wrong.to_numpy())[0]
        raise ValueError(
            f"{file}: found {text.iat[row, column]!r} in row {row + 2}, column {names[column]!r}, needed 0, 1 or empty "
            "(name columns that are no labels in ignore_columns)"
        )
    return names, np.column_stack([text[name].map(_VALUES) for name in names]).astype(np.float32)


def _from_names(file: Path, column: pd.Series, labels: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Targets from cells such as ``AFIB; LVH``."""
    cells = [[name.strip() for name in cell.split(";") if name.strip()] for cell in column]
    names = sorted({name for cell in cells for name in cell}) if labels is None else list(labels)
    if not names:
        raise ValueError(f"{file}: found no label in the column 'labels', needed at least one")
    place = {name: position for position, name in enumerate(names)}
    targets = np.zeros((len(cells), len(names)), dtype=np.float32)
    for row, cell in enumerate(cells):
        for name in cell:
            if name not in place:
                raise ValueError(f"{file}: found the label {name!r} in row {row + 2}, needed one of {names}")
            targets[row, place[name]] = 1
    return names, targets
