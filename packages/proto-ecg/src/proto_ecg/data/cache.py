"""Decode once: every record of a data set in one memory-mapped array, in a cache folder of its own.

``wfdb`` needs milliseconds for a record, a training epoch has microseconds. The first pass decodes all records in
worker processes into one float32 array ``[N, 12, L]``; later passes and later runs map it. The cache key covers the
record list, every file's size and modification time, and the settings, so a changed file is decoded anew. Nothing is
written into the data folder; the cache may be deleted at any time; an entry appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress

from proto_core.files import atomic_write, writable_folder
from proto_ecg.data.header import read_header
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.records import PROBLEMS, ECGWarning, join_record, preprocess_record, resolve_record

__all__ = ["CachedSignals", "Problem", "cached_signals", "default_cache_dir", "summarize_problems", "whole_folder"]

FORMAT_VERSION = 1  # part of the key: raise it whenever preprocessing changes its result
CHUNK = 64  # records per task: about a third of a second of decoding
FEW_RECORDS = 1000  # below this, starting workers costs more than they save
TOO_MANY_ERRORS = 20
ABANDONED_SECONDS = 24 * 3600


class Problem(NamedTuple):
    """Something about one record that is kept but should be known; ``kind`` is a key of ``records.PROBLEMS``."""

    kind: str
    record_id: str
    leads: tuple[str, ...]


class CachedSignals(NamedTuple):
    """The decoded data set.

    Attributes:
        signals: ``[N, 12, L]`` float32 in mV, a read-only memory map; row = position in the record list.
        problems: what was warned about while the records were decoded.
        folder: where the cache entry lies.
    """

    signals: Float[np.ndarray, "N 12 L"]
    problems: list[Problem]
    folder: Path


class _Settings(NamedTuple):
    sampling_rate: int
    num_samples: int
    remove_baseline: bool


def default_cache_dir() -> Path:
    """``$PROTO_CACHE``, else ``proto-ecg`` in the user's cache folder.

    Example:
        >>> from proto_ecg.data.cache import default_cache_dir
        >>> default_cache_dir().is_absolute()
        True
    """
    if chosen := os.environ.get("PROTO_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "proto-ecg").absolute()


def cached_signals(
    root: str | Path,
    record_ids: Sequence[str],
    *,
    sampling_rate: int,
    num_samples: int,
    remove_baseline: bool = True,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    quiet: bool = False,
) -> CachedSignals:
    """Map the decoded records, decoding them first where the cache does not hold them yet.

    Several processes may call this at once with the same arguments: all end with the same whole array.

    Args:
        root: the data set's folder.
        record_ids: paths of the records relative to ``root``, without extension.
        sampling_rate: in Hz.
        num_samples: length of every row at that rate.
        remove_baseline: take slow drift out (see :func:`proto_ecg.data.records.remove_baseline_wander`).
        cache_dir: where the cache lies; :func:`default_cache_dir` if ``None``.
        num_workers: worker processes for decoding; ``None`` takes one per usable core, 0 decodes in this process.
        quiet: no progress bar (it goes to the standard error).

    Raises:
        ValueError: no records, an id that leaves ``root``, a cache folder that cannot be written to or is too small,
            or records that cannot be used; the message lists the first of these with their files.
    """
    if not record_ids:
        raise ValueError("record_ids: found none, needed at least one record")
    root = Path(root).resolve()
    settings = _Settings(sampling_rate, num_samples, remove_baseline)
    shape = (len(record_ids), len(STANDARD_LEADS), num_samples)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser().absolute()
    entry = folder / f"signals-{_cache_key(root, record_ids, settings)}"
    found = _open_entry(entry, shape)
    while found is None:
        writable_folder(folder, "cache_dir")
        _sweep(folder)
        _check_space(folder, 4 * int(np.prod(shape)))
        with whole_folder(entry) as temporary:
            _build(temporary, root, record_ids, settings, num_workers, quiet)
        found = _open_entry(entry, shape)
    return found


def summarize_problems(problems: Sequence[Problem]) -> list[str]:
    """One sentence for each kind of problem: how many records have it, and the first of them.

    Example:
        >>> from proto_ecg.data.cache import Problem, summarize_problems
        >>> summarize_problems([Problem("flat", "a", ("V1",)), Problem("flat", "b", ("I", "II"))])
        ['2 records have a flat lead, kept; first: a (V1)']
    """
    sentences = []
    for kind, text in PROBLEMS.items():
        hits = [problem for problem in problems if problem.kind == kind]
        if hits:
            have = "record has" if len(hits) == 1 else "records have"
            sentences.append(f"{len(hits)} {have} {text}; first: {hits[0].record_id} ({', '.join(hits[0].leads)})")
    return sentences


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``final`` when the block ends without an error.

    Whoever comes second finds the first one's folder in place, and its own is thrown away.

    Example:
        >>> import pathlib, tempfile
        >>> from proto_ecg.data.cache import whole_folder
        >>> final = pathlib.Path(tempfile.mkdtemp()) / "entry"
        >>> with whole_folder(final) as folder:
        ...     _ = (folder / "a.txt").write_text("whole")
        >>> [path.name for path in final.iterdir()]
        ['a.txt']
    """
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.part")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cache_key(root: Path, record_ids: Sequence[str], settings: _Settings) -> str:
    digest = hashlib.sha256(repr((FORMAT_VERSION, str(root), tuple(settings), STANDARD_LEADS)).encode())
    for record_id in record_ids:
        path = join_record(root, record_id)  # links are followed and checked when the record is decoded
        stamps = [_stamp(Path(f"{path}.hea")), _stamp(Path(f"{path}.dat"))]
        if stamps[1] is None and stamps[0] is not None:
            with suppress(ValueError):  # what is wrong with it is reported when it is decoded
                names = {signal.file_name for signal in read_header(path).signals}
                stamps += [_stamp(path.parent / name) for name in sorted(names)]
        digest.update(repr((record_id, stamps)).encode())
    return digest.hexdigest()[:32]


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _open_entry(entry: Path, shape: tuple[int, int, int]) -> CachedSignals | None:
    """The entry if it is whole; one that is damaged is moved out of the way."""
    if not entry.is_dir():
        return None
    try:
        signals = np.load(entry / "signals.npy", mmap_mode="r", allow_pickle=False)
        rows = json.loads((entry / "warnings.json").read_text(encoding="utf-8"))
        problems = [Problem(kind, record_id, tuple(leads)) for kind, record_id, leads in rows]
        if signals.shape == shape and signals.dtype == np.float32:
            return CachedSignals(signals, problems, entry)
    except (OSError, ValueError, TypeError, EOFError):
        pass
    aside = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.part")
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(entry, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _sweep(folder: Path) -> None:
    """Remove what a killed process left unfinished a day ago or earlier."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(part, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"cache_dir: found {free / 1e9:.2f} GB free in {folder}, needed {needed / 1e9:.2f} GB")


def _build(
    folder: Path, root: Path, record_ids: Sequence[str], settings: _Settings, num_workers: int | None, quiet: bool
) -> None:
    """Decode all records into ``folder/signals.npy`` and ``folder/warnings.json``."""
    problems: list[Problem] = []
    errors: list[str] = []
    done = 0
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(record_ids), 12, settings.num_samples)}
    bar = Progress(console=Console(stderr=True), disable=quiet, transient=not sys.stderr.isatty())
    with open(folder / "signals.npy", "wb") as file, bar:
        task = bar.add_task("Decoding ECG records", total=len(record_ids))
        np.lib.format.write_array_header_1_0(file, header)
        for signals, found, failed in _decoded_chunks(root, record_ids, settings, num_workers):
            _write(file, signals)
            problems += found
            errors += failed
            done += len(signals) + len(failed)
            if len(errors) >= TOO_MANY_ERRORS:
                break
            bar.advance(task, len(signals))
        file.flush()
        os.fsync(file.fileno())
    if errors:
        shown = "\n  ".join(errors[:5])
        raise ValueError(f"{len(errors)} of the first {done} records cannot be used; needed none such:\n  {shown}")
    with atomic_write(folder / "warnings.json") as file:
        json.dump([tuple(problem) for problem in problems], file)


def _write(file: IO[bytes], signals: np.ndarray) -> None:
    try:
        file.write(np.ascontiguousarray(signals, dtype="<f4").data)
    except OSError as error:
        raise ValueError(f"cache_dir: cannot write {file.name} ({error.strerror}), needed a disk with space") from error


Decoded = tuple[np.ndarray, list[Problem], list[str]]


def _decode(root: Path, record_ids: Sequence[str], settings: _Settings) -> Decoded:
    """Decode some records: signals, what to warn about, and what cannot be used. Runs in a worker."""
    signals: list[np.ndarray] = []
    problems: list[Problem] = []
    errors: list[str] = []
    for record_id in record_ids:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                signals.append(preprocess_record(resolve_record(root, record_id), **settings._asdict()))
            except ValueError as error:
                errors.append(str(error))
        marks = [entry.message for entry in caught if isinstance(entry.message, ECGWarning)]
        problems += [Problem(mark.kind, record_id, mark.leads) for mark in marks]
    stacked = np.stack(signals) if signals else np.empty((0, len(STANDARD_LEADS), settings.num_samples), np.float32)
    return stacked, problems, errors


def _decoded_chunks(
    root: Path, record_ids: Sequence[str], settings: _Settings, num_workers: int | None
) -> Iterator[Decoded]:
    """Chunks in order. At most two chunks per worker are in memory, so a slow disk does not fill it."""
    chunks = [record_ids[start : start + CHUNK] for start in range(0, len(record_ids), CHUNK)]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(usable if num_workers is None else num_workers, len(chunks))
    if workers <= 1 or (num_workers is None and len(record_ids) < FEW_RECORDS):
        for chunk in chunks:
            yield _decode(root, chunk, settings)
        return
    with ProcessPoolExecutor(workers, mp_context=_WorkerContext()) as pool:
        waiting: deque[Future[Decoded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_decode, root, chunk, settings))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _WorkerProcess(SpawnProcess):
    """A fresh process that does not import the user's script.

    Decoding needs nothing from it, and a script without ``if __name__ == "__main__"`` would start itself again.
    """

    def start(self) -> None:
        main: Any = sys.modules["__main__"]
        hidden = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__spec__ = None
        try:
            super().start()
        finally:
            main.__dict__.update(hidden)


class _WorkerContext(SpawnContext):
    Process = _WorkerProcess
