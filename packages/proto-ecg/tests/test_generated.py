"""The built-in data set is read by the real PTB-XL reader, from files that are whole and of these settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from proto_ecg.data.generated import GeneratedECG
from proto_ecg.data.ptbxl import PTBXL
from proto_ecg.data.synthetic import DEFAULT_LABELS, generate_ecgs

pytestmark = pytest.mark.filterwarnings("ignore::proto_ecg.data.records.ECGWarning")
RECORDS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def make(cache: Path, **settings: object) -> GeneratedECG:
    return GeneratedECG(RECORDS, cache_dir=cache, quiet=True, **settings)


def test_files_hold_what_was_generated(cache: Path) -> None:
    data = make(cache, remove_baseline=False)
    assert data.label_names == list(DEFAULT_LABELS)
    assert not data.root.exists()  # nothing is made before it is needed
    data.setup("predict")
    made = generate_ecgs(RECORDS, sampling_rate=100, duration=10.0, seed=0)
    assert data.signals.shape == (RECORDS, 12, 1000)
    assert np.abs(data.signals - np.asarray(made.signals)).max() < 2e-3  # 16 bit files
    assert torch.equal(data.targets, torch.as_tensor(np.asarray(made.targets), dtype=torch.float32))
    assert data.root.is_relative_to(cache)


def test_the_same_settings_are_written_once(cache: Path) -> None:
    first, second, other = make(cache), make(cache), make(cache, seed=1)
    for data in (first, second, other):
        data.setup("predict")
    assert first.root == second.root != other.root
    assert np.array_equal(first.signals, second.signals)
    assert not np.array_equal(first.signals, other.signals)


def test_kept_files_are_ptbxl(cache: Path, tmp_path: Path) -> None:
    kept = make(cache, keep_data=tmp_path / "kept")
    kept.prepare_data()
    plain = PTBXL(tmp_path / "kept", cache_dir=cache, quiet=True)
    assert plain.label_names == kept.label_names
    assert torch.equal(plain.targets, kept.targets)
    assert np.array_equal(plain.signals, kept.signals)
    again = make(cache, keep_data=tmp_path / "kept")
    assert again.record_ids == kept.record_ids
    with pytest.raises(ValueError, match="keep_data: found ECGs generated with other settings"):
        _ = make(cache, keep_data=tmp_path / "kept", seed=5).record_ids


def test_other_peoples_files_are_left_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="keep_data: found other files"):
        make(cache, keep_data=tmp_path).prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="keep_data: cannot write"):
        make(cache, keep_data=tmp_path / "notes.txt" / "data").prepare_data()
    with pytest.raises(ValueError, match="num_records: found 0"):
        GeneratedECG(0)
