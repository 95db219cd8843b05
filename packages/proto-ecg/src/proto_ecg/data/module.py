"""ECG data sets for training: one memory map, rows of it, and the Lightning data module that all ECG sources share.

A batch is one fancy index into the map of :mod:`proto_ecg.data.cache`; no Python code runs per record. A source
(PTB-XL, an archive, the generator) only says which records it has, with which labels and folds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from proto_ecg.data.cache import CachedSignals, cached_signals, summarize_problems
from proto_ecg.data.labels import branch_labels
from proto_ecg.data.records import (
    ECGWarning,
    Record,
    preprocess_record,
    read_record,
    resolve_record,
    strip_extension,
)

__all__ = ["ECGBatch", "ECGDataModule", "ECGDataset", "ECGTable"]

FOLDS: tuple[str, ...] = ("train", "val", "test")
_STAGE_FOLDS: dict[str | None, tuple[str, ...]] = {
    None: FOLDS,
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}


class ECGBatch(NamedTuple):
    """A batch, or without the leading ``N`` a sample.

    Attributes:
        signal: ``[N, 12, L]`` float32, in mV, leads in standard order.
        targets: ``[N, C]`` float32 multi-hot.
        index: ``[N]`` int64, row of the data set's full array.
    """

    signal: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a batch


class ECGTable(NamedTuple):
    """What a source knows about its records before any signal is read.

    Attributes:
        record_ids: paths relative to the root, without extension; row -> id.
        targets: ``[N, C]`` float32 multi-hot.
        fold: ``[N]`` of ``"train"``, ``"val"``, ``"test"``, or ``""`` for records in no fold.
        patient_ids: ``N`` names, or ``None`` where the source does not know its patients.
    """

    record_ids: list[str]
    targets: np.ndarray
    fold: np.ndarray
    patient_ids: list[str] | None = None


class ECGDataset(Dataset[ECGBatch]):
    """Some rows of a signal array.

    ``DataLoader`` fetches a whole batch at once through ``__getitems__``; give it ``collate_fn=ECGDataset.collate``,
    which passes the finished batch on.

    Args:
        signals: ``[N, 12, L]`` float32 array or memory map.
        targets: ``[N, C]`` multi-hot, of all N rows.
        rows: the rows that belong to this data set, in its order.

    Raises:
        ValueError: ``targets`` has another number of rows than ``signals``, or ``rows`` reaches outside.

    Example:
        >>> import numpy as np, torch
        >>> from proto_ecg.data.module import ECGDataset
        >>> data = ECGDataset(np.zeros((5, 12, 100), np.float32), torch.eye(5), np.array([4, 2]))
        >>> data[0].index.item(), tuple(data.__getitems__([0, 1]).signal.shape)
        (4, (2, 12, 100))
    """

    def __init__(
        self, signals: Float[np.ndarray, "N leads L"], targets: Float[Tensor, "N C"], rows: Int[np.ndarray, " n"]
    ) -> None:
        if targets.ndim != 2 or len(targets) != len(signals):
            raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed [{len(signals)}, C]")
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(signals)):
            raise ValueError(f"rows: found {rows.min()} to {rows.max()}, needed 0 to {len(signals) - 1}")
        self.signals, self.targets, self.rows = signals, targets, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> ECGBatch:
        row = int(self.rows[position])
        signal = torch.from_numpy(np.array(self.signals[row]))
        return ECGBatch(signal, self.targets[row], torch.tensor(row))

    def __getitems__(self, positions: Sequence[int]) -> ECGBatch:
        """A whole batch with one read of the array."""
        rows = self.rows[np.asarray(positions, dtype=np.int64)]
        index = torch.from_numpy(rows)
        return ECGBatch(torch.from_numpy(np.asarray(self.signals[rows])), self.targets[index], index)

    @staticmethod
    def collate(batch: Any) -> ECGBatch:
        """The batch as ``__getitems__`` made it."""
        return batch

    def __getstate__(self) -> dict[str, Any]:
        """A memory map travels to a worker process as its file name, not as its gigabytes."""
        state = self.__dict__.copy()
        if isinstance(self.signals, np.memmap) and self.signals.filename is not None:
            state["signals"] = Path(str(self.signals.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["signals"], Path):
            state["signals"] = np.load(state["signals"], mmap_mode="r", allow_pickle=False)
        self.__dict__.update(state)


class ECGDataModule(LightningDataModule, ABC):
    """What every source of ECGs offers for training, testing and explaining. Subclasses read the table.

    Everything is read on first use and kept; ``setup`` does it at the moment Lightning expects. Under DDP only one
    process per node decodes (``prepare_data``).

    Args:
        root: the data set's folder; nothing is written into it.
        label_names: the labels, in the order of the target columns.
        branches: label -> branch, overrides PTB-XL's grouping (see :func:`proto_ecg.data.labels.branch_labels`).
        batch_size: records in a batch.
        num_workers: processes of each data loader; 0 is fast enough for a memory map.
        sampling_rate: of the model's input, in Hz; records at another rate are resampled.
        seconds: length of the model's input.
        remove_baseline: take slow drift out (0.5 Hz high-pass).
        predict_fold: which records ``predict`` goes through, ``"test"`` or ``"all"``.
        cache_dir: where decoded signals are kept; ``$PROTO_CACHE`` or the user's cache folder if ``None``.
        decode_workers: processes of the first pass; ``None`` takes one per usable core.
        quiet: no progress bar in the first pass.

    Attributes:
        label_names: list of the C labels.
        branch_labels: branch -> its labels.
        sampling_rate: in Hz.
        num_samples: length L of the model's input.

    Raises:
        ValueError: an argument out of range, or a root that is not a folder.
    """

    def __init__(
        self,
        root: str | Path,
        label_names: Sequence[str],
        *,
        branches: Mapping[str, str] | None = None,
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
        super().__init__()
        limits = {"batch_size": batch_size, "sampling_rate": sampling_rate, "seconds": seconds}
        for argument, value in limits.items():
            if value <= 0:
                raise ValueError(f"{argument}: found {value}, needed a number above 0")
        if num_workers < 0:
            raise ValueError(f"num_workers: found {num_workers}, needed 0 or more")
        if predict_fold not in ("test", "all"):
            raise ValueError(f"predict_fold: found {predict_fold!r}, needed 'test' or 'all'")
        self.root = Path(root).expanduser()
        self.label_names = list(label_names)
        self.branch_labels = branch_labels(self.label_names, branches)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.sampling_rate, self.num_samples = sampling_rate, round(seconds * sampling_rate)
        self.remove_baseline, self.predict_fold = remove_baseline, predict_fold
        self.cache_dir, self.decode_workers, self.quiet = cache_dir, decode_workers, quiet
        self._table: ECGTable | None = None
        self._cached: CachedSignals | None = None
        self._targets: Tensor | None = None

    def __str__(self) -> str:
        """Source, place and number of labels; reads no file, where Lightning's would decode every record."""
        return f"{type(self).__name__}({str(self.root)!r}, {len(self.label_names)} labels)"

    @abstractmethod
    def read_table(self) -> ECGTable:
        """The source's records, targets and folds; reads no signal."""

    @property
    def table(self) -> ECGTable:
        """The source's records, targets and folds, read on first use."""
        if self._table is None:
            self._table = self.read_table()
        return self._table

    @property
    def signals(self) -> Float[np.ndarray, "N 12 L"]:
        """``[N, 12, L]`` the preprocessed signals of all records, a read-only memory map."""
        if self._cached is None:
            self._cached = cached_signals(
                self.root,
                self.table.record_ids,
                sampling_rate=self.sampling_rate,
                num_samples=self.num_samples,
                remove_baseline=self.remove_baseline,
                cache_dir=self.cache_dir,
                num_workers=self.decode_workers,
                quiet=self.quiet,
            )
            for sentence in summarize_problems(self._cached.problems):
                rank_zero_warn(f"{self.root}: {sentence}", category=ECGWarning)
        return self._cached.signals

    @property
    def record_ids(self) -> list[str]:
        """Row -> record id (path relative to the root, without extension)."""
        return self.table.record_ids

    @property
    def patient_ids(self) -> list[str] | None:
        """Row -> patient, or ``None`` where the source does not know its patients."""
        return self.table.patient_ids

    @property
    def targets(self) -> Float[Tensor, "N C"]:
        """``[N, C]`` multi-hot targets of all records."""
        if self._targets is None:
            self._targets = torch.from_numpy(np.ascontiguousarray(self.table.targets, dtype=np.float32))
        return self._targets

    def rows(self, fold: str) -> Int[np.ndarray, " n"]:
        """The rows of one fold, ``"train"``, ``"val"`` or ``"test"``, in the order of the table.

        Raises:
            ValueError: the fold holds no record.
        """
        rows = np.flatnonzero(self.table.fold == fold)
        if not rows.size:
            counts = {name: int((self.table.fold == name).sum()) for name in FOLDS}
            raise ValueError(f"{self.root}: the {fold} fold holds no record, needed at least one; found {counts}")
        return rows

    def _subset(self, fold: str) -> ECGDataset:
        return ECGDataset(self.signals, self.targets, self.rows(fold))

    @property
    def train_set(self) -> ECGDataset:
        """Records of the training folds."""
        return self._subset("train")

    @property
    def val_set(self) -> ECGDataset:
        """Records of the validation fold."""
        return self._subset("val")

    @property
    def test_set(self) -> ECGDataset:
        """Records of the test fold."""
        return self._subset("test")

    @property
    def predict_set(self) -> ECGDataset:
        """Records that ``predict`` goes through: the test fold, or all records."""
        if self.predict_fold == "test":
            return self.test_set
        return ECGDataset(self.signals, self.targets, np.arange(len(self.record_ids)))

    def projection_dataset(self) -> ECGDataset:
        """The training records in the order of the table: what prototypes are projected onto."""
        return self.train_set

    @property
    def cooccurrence(self) -> Float[Tensor, "C C"]:
        """``[C, C]`` Jaccard co-occurrence of the labels in the training folds."""
        from proto_core.data.multilabel import label_cooccurrence

        return label_cooccurrence(self.targets[torch.from_numpy(self.rows("train"))])

    @property
    def pos_weight(self) -> Float[Tensor, " C"]:
        """``[C]`` weight of each label's positives, from the training folds; 1 for a label without a positive."""
        from proto_core.data.multilabel import class_pos_weight

        return class_pos_weight(self.targets[torch.from_numpy(self.rows("train"))])

    def prepare_data(self) -> None:
        """Decode all records into the cache, unless it holds them. Lightning calls this in one process per node."""
        _ = self.signals

    def setup(self, stage: str | None = None) -> None:
        """Map the signals and check that the folds of this stage hold records.

        Raises:
            ValueError: an empty fold, or anything wrong with the files.
        """
        predict = ("test",) if self.predict_fold == "test" else ()
        for fold in _STAGE_FOLDS.get(stage, predict):
            self.rows(fold)
        _ = self.signals
        if stage in (None, "fit"):
            self._report_labels()

    def _report_labels(self) -> None:
        counts = self.targets[torch.from_numpy(self.rows("train"))].sum(dim=0)
        empty = [name for name, count in zip(self.label_names, counts.tolist(), strict=True) if count == 0]
        if empty:
            message = f"{len(empty)} of {len(self.label_names)} labels have no positive in training (kept, weight 1)"
            rank_zero_warn(f"{message}: {', '.join(empty)}", category=ECGWarning)
        weight, label = self.pos_weight.max(dim=0)
        rank_zero_info(f"Largest positive weight: {weight.item():.0f} ({self.label_names[int(label)]})")

    def _loader(self, dataset: ECGDataset, shuffle: bool = False) -> DataLoader[ECGBatch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=ECGDataset.collate,
        )

    def train_dataloader(self) -> DataLoader[ECGBatch]:
        """Training records in random order."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[ECGBatch]:
        """Validation records in the order of the table."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[ECGBatch]:
        """Test records in the order of the table."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[ECGBatch]:
        """Records of ``predict_fold`` in the order of the table."""
        return self._loader(self.predict_set)

    def describe(self, index: int) -> tuple[str, list[str]]:
        """Record id and label names of a row: what a prototype remembers of its case."""
        flags = self.targets[index].tolist()
        return self.record_ids[index], [name for name, flag in zip(self.label_names, flags, strict=True) if flag]

    def record_path(self, record_id: str) -> Path:
        """Where a record of this data set lies; ids come from :attr:`record_ids` or a checkpoint's case table.

        Raises:
            ValueError: the id leads out of the root.
        """
        return resolve_record(self.root, record_id)

    def find_record(self, record: str) -> Path:
        """Where the record lies that a person named: an id of this data set, or else a path anywhere on disk.

        Raises:
            ValueError: there is neither; names both places.
        """
        try:
            inside = self.record_path(str(strip_extension(record)))
            if Path(f"{inside}.hea").is_file():
                return inside
        except ValueError:
            inside = self.root
        path = strip_extension(Path(record).expanduser())
        if Path(f"{path}.hea").is_file():
            return path
        raise ValueError(f"record: found neither {path}.hea nor a record {record!r} in {self.root}")

    def read(self, record: str | Path) -> Record:
        """The raw signal as the file has it, for drawing: standard leads, the model's rate and length, unfiltered.

        Args:
            record: an id of this data set (``str``), or a file without extension (``Path``).

        Raises:
            ValueError: as :func:`proto_ecg.data.records.read_record`.
        """
        return read_record(self._locate(record), sampling_rate=self.sampling_rate, num_samples=self.num_samples)

    def model_input(self, record: str | Path) -> Float[Tensor, "12 L"]:
        """``[12, L]`` a record preprocessed as the model sees it; the same numbers as in :attr:`signals`.

        Args:
            record: an id of this data set (``str``), or a file without extension (``Path``).

        Raises:
            ValueError: as :func:`proto_ecg.data.records.read_record`.
        """
        signal = preprocess_record(
            self._locate(record),
            sampling_rate=self.sampling_rate,
            num_samples=self.num_samples,
            remove_baseline=self.remove_baseline,
        )
        return torch.from_numpy(np.ascontiguousarray(signal))

    def _locate(self, record: str | Path) -> Path:
        return record if isinstance(record, Path) else self.record_path(record)
