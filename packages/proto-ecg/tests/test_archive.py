"""A user's own archive: one CSV, any labels, any leads' order, any rate; and every mistake in the CSV by its row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_ecg.data.archive import ECGArchive, _hashed_fold
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.records import ECGWarning

pytestmark = pytest.mark.filterwarnings("ignore::proto_ecg.data.records.ECGWarning")


def write(folder: Path, name: str, rate: int = 100, seconds: float = 10, order: int = 1) -> None:
    """Lead ``k`` of the standard order is a sine of ``k + 1`` Hz; ``order`` -1 stores the leads backwards."""
    folder.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(rate * seconds)) / rate
    waves = np.sin(2 * np.pi * t[:, None] * (1 + np.arange(12)))
    wfdb.wrsamp(
        name,
        rate,
        ["mV"] * 12,
        list(STANDARD_LEADS)[::order],
        waves[:, ::order],
        fmt=["16"] * 12,
        adc_gain=[1000] * 12,
        baseline=[0] * 12,
        write_dir=str(folder),
    )


def table(root: Path, text: str) -> Path:
    root.mkdir(exist_ok=True)
    (root / "labels.csv").write_text(text, encoding="utf-8")
    return root


def test_rates_lengths_and_lead_orders_of_one_archive(tmp_path: Path) -> None:
    root = table(
        tmp_path / "data",
        "record,fold,age,AFIB,AMYLOID\nx/a,train,71,1,0\nx/b,val,,0,1\nc.hea,test,44,,1.0\nx/d,train,50,1,1\n",
    )
    write(root / "x", "a")
    write(root / "x", "b", rate=500, order=-1)
    write(root, "c", rate=250, seconds=30)
    write(root / "x", "d", rate=1000, seconds=12, order=-1)
    data = ECGArchive(root, ignore_columns=["age"], remove_baseline=False, cache_dir=tmp_path / "cache", quiet=True)
    assert data.label_names == ["AFIB", "AMYLOID"]
    assert data.branch_labels == {"rhythm": ["AFIB", "AMYLOID"], "morphology": ["AMYLOID"], "diffuse": ["AMYLOID"]}
    data.setup()
    assert data.record_ids == ["x/a", "x/b", "c", "x/d"]
    assert data.targets.tolist() == [[1, 0], [0, 1], [0, 1], [1, 1]]
    assert [data.rows(fold).tolist() for fold in ("train", "val", "test")] == [[0, 3], [1], [2]]
    expected = np.sin(2 * np.pi * np.arange(1000) / 100 * (1 + np.arange(12))[:, None])
    assert data.signals.shape == (4, 12, 1000)
    assert np.abs(data.signals - expected)[:, :, 50:-50].max() < 0.02
    assert torch.equal(data.model_input("x/b"), torch.from_numpy(np.array(data.signals[1])))
    assert data.cooccurrence.tolist() == [[1, 0.5], [0.5, 1]]
    assert data.pos_weight.tolist() == [0.5, 2.0]


def test_another_rate_and_length_for_the_model(tmp_path: Path) -> None:
    root = table(tmp_path / "data", "record,fold,A\na,train,1\nb,val,0\n")
    write(root, "a", rate=500, seconds=5)
    write(root, "b", rate=250, seconds=6)
    data = ECGArchive(root, sampling_rate=250, seconds=4.0, cache_dir=tmp_path / "cache", quiet=True)
    assert data.signals.shape == (2, 12, 1000)
    assert data.num_samples == 1000


def test_a_record_that_is_too_short(tmp_path: Path) -> None:
    root = table(tmp_path / "data", "record,A\na,1\n")
    write(root, "a", seconds=8)
    with pytest.raises(ValueError, match=r"a: found 8\.00 s of signal, needed 10\.00 s"):
        ECGArchive(root, cache_dir=tmp_path / "cache", quiet=True).prepare_data()


def test_labels_in_one_column(tmp_path: Path) -> None:
    root = table(tmp_path, 'record,labels,note\na,AFIB; LVH,?\nb,,"x,y"\nc,LVH;,\n')
    data = ECGArchive(root)
    assert data.label_names == ["AFIB", "LVH"]
    assert data.targets.tolist() == [[1, 1], [0, 0], [0, 1]]
    chosen = ECGArchive(root, labels=["LVH", "NORM", "AFIB"])
    assert chosen.targets.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"labels\.csv: found the label 'AFIB' in row 2, needed one of \['LVH'\]"):
        ECGArchive(root, labels=["LVH"])


def test_chosen_label_columns(tmp_path: Path) -> None:
    root = table(tmp_path, "record,A,B,C\na,1,0,x\nb,0,1,y\n")
    data = ECGArchive(root, labels=["B", "A"])
    assert data.targets.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="needed also the label 'D'"):
        ECGArchive(root, labels=["D"])


def test_fold_numbers(tmp_path: Path) -> None:
    root = table(tmp_path, "record,fold,A\na,1,1\nb,9,1\nc,10.0,0\nd,4,0\n")
    assert ECGArchive(root).read_table().fold.tolist() == ["train", "val", "test", "train"]
    mine = ECGArchive(root, train_folds=[1], val_folds=[4], test_folds=[9])
    assert mine.read_table().fold.tolist() == ["train", "test", "", "val"]


def test_patients_stay_together_without_a_fold_column(tmp_path: Path) -> None:
    rows = [(f"r{number}", f"p{number % 200}") for number in range(600)]
    text = "record,patient_id,A\n" + "".join(f"{record},{patient},1\n" for record, patient in rows)
    first = ECGArchive(table(tmp_path / "one", text)).read_table()
    folds = dict(zip(first.record_ids, first.fold.tolist(), strict=True))
    for record, patient in rows:
        assert folds[record] == _hashed_fold(patient)
    shares = [(first.fold == name).mean() for name in ("train", "val", "test")]
    assert np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.06
    fewer = "record,patient_id,A\n" + "".join(f"{record},{patient},1\n" for record, patient in rows[300:][::-1])
    second = ECGArchive(table(tmp_path / "two", fewer)).read_table()
    assert {record: folds[record] for record in second.record_ids} == dict(
        zip(second.record_ids, second.fold.tolist(), strict=True)
    )


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1))
def test_every_name_has_one_fold(name: str) -> None:
    assert _hashed_fold(name) == _hashed_fold(name)
    assert _hashed_fold(name) in ("train", "val", "test")


def test_branches_file(tmp_path: Path) -> None:
    root = table(tmp_path, "record,A,AFIB\na,1,0\n")
    (root / "branches.csv").write_text("code,branch\nA,diffuse\n")
    assert ECGArchive(root, branches=root / "branches.csv").branch_labels == {"rhythm": ["AFIB"], "diffuse": ["A"]}
    (root / "branches.csv").write_text("code,branch\nB,diffuse\n")
    with pytest.raises(ValueError, match="unknown SCP code 'B'"):
        ECGArchive(root, branches=root / "branches.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,A\na,1\n", r"labels\.csv: found columns \['name', 'A'\], needed also 'record'"),
        ("record,A\n", r"labels\.csv: found no record"),
        ("", r"labels\.csv: cannot read the table"),
        ("record,fold\na,1\n", "needed a column per label or 'labels'"),
        ("record,A,B\na,1,0\nb,0,0.5\n", "found '0.5' in row 3, column 'B', needed 0, 1 or empty"),
        ("record,A\na,yes\n", "found 'yes' in row 2, column 'A'"),
        ("record,labels\na,\n", "found no label in the column 'labels'"),
        ("record,A\na,1,2,3\nb,1\n", r"labels\.csv"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ECGArchive(table(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("record,A\na,1\n ,1\n", "found no record in row 3"),
        ("record,A\na,1\nb,1\na.hea,0\n", "found record 'a' in rows 2 and 4"),
        ("record,A\n../a,1\n", "leaves the data folder"),
        ("record,fold,A\na,first,1\n", "found fold 'first' in row 2"),
        ("record,fold,A\na,,1\n", "found fold '' in row 2"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = ECGArchive(table(tmp_path, text)).record_ids


def test_folders_and_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root: found no folder"):
        ECGArchive(tmp_path / "none")
    with pytest.raises(ValueError, match=r"labels\.csv: cannot read the table"):
        ECGArchive(tmp_path)
    root = table(tmp_path, "record,A\na,1\n")
    with pytest.raises(ValueError, match="ignore_columns: found 'age'"):
        ECGArchive(root, ignore_columns=["age"])


def test_a_label_without_a_positive_is_kept_and_named(tmp_path: Path) -> None:
    root = table(tmp_path / "data", "record,fold,A,B\na,train,1,0\nb,val,0,1\n")
    write(root, "a")
    write(root, "b")
    data = ECGArchive(root, cache_dir=tmp_path / "cache", quiet=True)
    with pytest.warns(ECGWarning, match=r"1 of 2 labels have no positive in training \(kept, weight 1\): B"):
        data.setup("fit")
    assert data.pos_weight[1] == 1
    with pytest.raises(ValueError, match="the test fold holds no record"):
        data.setup("test")
