"""The decode-once cache: same numbers, one entry per content, whole or absent, and nothing in the data folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from torch.utils.data import DataLoader

from proto_ecg.data import cache
from proto_ecg.data.cache import CachedSignals, cached_signals, default_cache_dir, whole_folder
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.module import ECGBatch, ECGDataset
from proto_ecg.data.records import preprocess_record

SETTINGS = {"sampling_rate": 100, "num_samples": 200, "quiet": True}


def write(folder: Path, name: str, signal: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp(
        name,
        100,
        ["mV"] * 12,
        list(STANDARD_LEADS),
        signal,
        fmt=["16"] * 12,
        adc_gain=[1000] * 12,
        baseline=[0] * 12,
        write_dir=str(folder),
    )


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, list[str]]:
    """Five short records."""
    random = np.random.default_rng(0)
    for number in range(5):
        write(tmp_path / "data/a", f"r{number}", random.normal(size=(200, 12)))
    return tmp_path / "data", [f"a/r{number}" for number in range(5)]


def test_rows_are_the_preprocessed_records(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for filtered in (True, False):
        found = cached_signals(root, ids, remove_baseline=filtered, cache_dir=tmp_path / "cache", **SETTINGS)
        expected = [
            preprocess_record(root / name, sampling_rate=100, num_samples=200, remove_baseline=filtered) for name in ids
        ]
        assert np.array_equal(found.signals, np.stack(expected))
        assert isinstance(found.signals, np.memmap)
        assert found.signals.dtype == np.float32
        assert not found.signals.flags.writeable
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_key_follows_content_and_settings(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive

    def entry(names: list[str] = ids, **settings: object) -> CachedSignals:
        return cached_signals(root, names, cache_dir=tmp_path / "cache", **{**SETTINGS, **settings})

    first = entry()
    stamp = (first.folder / "signals.npy").stat().st_mtime_ns
    assert entry().folder == first.folder
    assert (first.folder / "signals.npy").stat().st_mtime_ns == stamp
    folders = {
        first.folder,
        entry(ids[:3]).folder,
        entry(ids[::-1]).folder,
        entry(remove_baseline=False).folder,
        entry(num_samples=100).folder,
        entry(sampling_rate=50, num_samples=100).folder,
    }
    assert len(folders) == 6
    time.sleep(0.01)
    write(root / "a", "r0", np.ones((200, 12)) * np.arange(200)[:, None] / 100)
    changed = entry()
    assert changed.folder not in folders
    assert not np.array_equal(changed.signals[0], first.signals[0])
    assert np.array_equal(changed.signals[1:], first.signals[1:])


def test_workers_give_the_same_array(archive: tuple[Path, list[str]], tmp_path: Path, monkeypatch) -> None:
    root, ids = archive
    monkeypatch.setattr(cache, "CHUNK", 2)
    alone = cached_signals(root, ids, cache_dir=tmp_path / "one", num_workers=0, **SETTINGS)
    monkeypatch.chdir(tmp_path)
    together = cached_signals(root, ids, cache_dir=tmp_path / "two", num_workers=2, **SETTINGS)
    assert np.array_equal(alone.signals, together.signals)


def test_workers_do_not_run_the_users_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without a guard would start itself again in every worker."""
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    for context, expected in ((cache._WorkerContext(), False), (multiprocessing.get_context("spawn"), True)):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            assert pool.submit(abs, -1).result() == 1
        assert ran.exists() is expected
        assert sys.modules["__main__"].__file__ == str(script)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "no warnings", "other shape"])
def test_a_damaged_entry_is_rebuilt(archive: tuple[Path, list[str]], tmp_path: Path, damage: str) -> None:
    root, ids = archive
    first = cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS)
    values, file = np.array(first.signals), first.folder / "signals.npy"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "garbage":
        file.write_bytes(b"nothing")
    elif damage == "other shape":
        np.save(file, values[:2])
    else:
        (first.folder / "warnings.json").write_text("{")
    again = cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS)
    assert np.array_equal(again.signals, values)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_two_processes_end_with_the_same_whole_cache(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    program = (
        "import sys, time, hashlib\n"
        "from proto_ecg.data.cache import cached_signals\n"
        "open(sys.argv[3], 'w').close()\n"
        "import pathlib\n"
        "while len(list(pathlib.Path(sys.argv[3]).parent.glob('ready*'))) < 2: time.sleep(0.002)\n"
        "found = cached_signals(sys.argv[1], sys.argv[4:], sampling_rate=100, num_samples=200,\n"
        "                       cache_dir=sys.argv[2], quiet=True)\n"
        "sys.stdout.write(found.folder.name + ' ' + hashlib.sha256(found.signals.tobytes()).hexdigest())\n"
    )
    script = tmp_path / "race.py"
    script.write_text(program)
    start = [sys.executable, "-W", "ignore", str(script), str(root), str(tmp_path / "cache")]
    running = [
        subprocess.Popen([*start, str(tmp_path / f"ready{k}"), *ids], stdout=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    answers = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert answers[0] == answers[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [answers[0].split()[0]]


def test_second_comer_keeps_the_first_folder(tmp_path: Path) -> None:
    final = tmp_path / "entry"
    with whole_folder(final) as slow:
        (slow / "who.txt").write_text("slow")
        with whole_folder(final) as fast:
            (fast / "who.txt").write_text("fast")
    assert (final / "who.txt").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def killed_half_way() -> None:
        with whole_folder(tmp_path / "entry") as folder:
            (folder / "half.txt").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed_half_way()
    assert list(tmp_path.iterdir()) == []


def test_full_disk(archive: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, ids = archive

    class Usage:
        free = 1000

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(ValueError, match=r"cache_dir: found 0\.00 GB free"):
        cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS)


def test_disk_fills_up_while_writing(archive, tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(ValueError, match="cache_dir: cannot write /dev/full"),
    ):
        cache._write(full, np.zeros((2, 12, 200), np.float32))


def test_unwritable_cache(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cache_dir: cannot write to folder"):
        cached_signals(root, ids, cache_dir=tmp_path / "file" / "cache", **SETTINGS)


def test_all_bad_records_are_named_at_once(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    os.unlink(root / "a/r1.dat")
    write(root / "a", "r3", np.full((200, 12), np.nan))
    with pytest.raises(ValueError, match="2 of the first 5 records cannot be used") as error:
        cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS)
    assert "r1.dat: cannot read" in str(error.value)
    assert "r3: found no valid sample" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_ids_outside_and_no_ids(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, _ = archive
    with pytest.raises(ValueError, match="leaves the data folder"):
        cached_signals(root, ["../x"], cache_dir=tmp_path / "cache", **SETTINGS)
    with pytest.raises(ValueError, match="record_ids: found none"):
        cached_signals(root, [], cache_dir=tmp_path / "cache", **SETTINGS)


def test_problems_are_kept_with_the_array(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    flat = np.random.default_rng(1).normal(size=(200, 12))
    flat[:, 6] = 0
    write(root / "a", "r2", flat)
    write(root / "a", "r4", flat)
    for _ in range(2):  # decoded, then read
        found = cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS)
        assert found.problems == [("flat", "a/r2", ("V1",)), ("flat", "a/r4", ("V1",))]
    assert cache.summarize_problems(found.problems) == ["2 records have a flat lead, kept; first: a/r2 (V1)"]
    assert json.loads((found.folder / "warnings.json").read_text())[0] == ["flat", "a/r2", ["V1"]]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROTO_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("PROTO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "proto-ecg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "proto-ecg"


def test_leftovers_of_killed_builds_go_after_a_day(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    old, new = tmp_path / "cache/.signals-x.1.part", tmp_path / "cache/.signals-x.2.part"
    for part in (old, new):
        part.mkdir(parents=True)
    os.utime(old, (0, 0))
    cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS)
    assert not old.exists()
    assert new.exists()


def test_a_batch_is_one_read(archive: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = archive
    signals = cached_signals(root, ids, cache_dir=tmp_path / "cache", **SETTINGS).signals
    data = ECGDataset(signals, torch.eye(5), np.array([4, 0, 2]))
    (batch,) = DataLoader(data, batch_size=3, collate_fn=ECGDataset.collate)
    assert isinstance(batch, ECGBatch)
    assert batch.index.tolist() == [4, 0, 2]
    assert np.array_equal(batch.signal.numpy(), signals[[4, 0, 2]])
    assert torch.equal(batch.targets, torch.eye(5)[[4, 0, 2]])
    one = data[1]
    assert torch.equal(one.signal, batch.signal[1])
    assert one.index.item() == 0
    packed = pickle.dumps(data)
    assert len(packed) < 5000 < signals.nbytes
    assert torch.equal(pickle.loads(packed)[2].signal, data[2].signal)


@pytest.mark.bad_input
def test_rows_and_targets_must_fit() -> None:
    signals = np.zeros((3, 12, 10), np.float32)
    with pytest.raises(ValueError, match=r"targets: found shape \(2, 4\), needed \[3, C\]"):
        ECGDataset(signals, torch.zeros(2, 4), np.arange(2))
    with pytest.raises(ValueError, match="rows: found 0 to 3, needed 0 to 2"):
        ECGDataset(signals, torch.zeros(3, 4), np.arange(4))
