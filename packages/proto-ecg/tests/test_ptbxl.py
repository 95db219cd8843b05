"""PTB-XL from its folder: the real excerpt, every label set, and what a damaged folder gets."""

from __future__ import annotations

import ast
import logging
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wfdb

from proto_ecg.data.labels import PTBXL_ALL, PTBXL_DIFFUSE, PTBXL_MORPHOLOGY, PTBXL_RHYTHM
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.ptbxl import PTBXL
from proto_ecg.data.records import ECGWarning, remove_baseline_wander

pytestmark = pytest.mark.filterwarnings("ignore::proto_ecg.data.records.ECGWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def excerpt(ptbxl_500: Path, cache: Path) -> PTBXL:
    data = PTBXL(ptbxl_500, cache_dir=cache, quiet=True)
    data.prepare_data()
    return data


def test_the_real_excerpt(excerpt: PTBXL, ptbxl_500: Path) -> None:
    excerpt.setup()
    assert excerpt.label_names == list(PTBXL_ALL)
    assert [len(excerpt.branch_labels[name]) for name in ("rhythm", "morphology", "diffuse")] == [16, 52, 3]
    assert excerpt.signals.shape == (500, 12, 1000)
    assert (len(excerpt.train_set), len(excerpt.val_set), len(excerpt.test_set)) == (353, 81, 66)
    assert int((excerpt.targets.sum(dim=0) > 0).sum()) == 57
    table = pd.read_csv(ptbxl_500 / "ptbxl_database.csv")
    for row in (0, 123, 499):
        assert excerpt.record_ids[row] == table.filename_lr[row]
        found = {name for name, hit in zip(PTBXL_ALL, excerpt.targets[row].tolist(), strict=True) if hit}
        assert found == set(ast.literal_eval(table.scp_codes[row]))
        assert excerpt.patient_ids is not None
        assert excerpt.patient_ids[row] == str(int(table.patient_id[row]))
    assert excerpt.targets[0, PTBXL_ALL.index("LVOLT")] == 1  # likelihood 0 counts


def test_signals_are_the_files(excerpt: PTBXL, ptbxl_500: Path) -> None:
    expected, _ = wfdb.rdsamp(str(ptbxl_500 / excerpt.record_ids[7]))
    raw = expected.T.astype(np.float32)
    assert np.array_equal(excerpt.read(excerpt.record_ids[7]).signal, raw)
    assert np.array_equal(excerpt.signals[7], remove_baseline_wander(raw))
    assert torch.equal(excerpt.model_input(excerpt.record_ids[7]), torch.from_numpy(np.array(excerpt.signals[7])))
    assert torch.equal(excerpt.model_input(ptbxl_500 / excerpt.record_ids[7]), excerpt.model_input("8"))
    assert np.abs(raw).max() < 20  # millivolts


def test_loaders(excerpt: PTBXL) -> None:
    excerpt.setup("fit")
    seen = torch.cat([batch.index for batch in excerpt.train_dataloader()])
    rows = torch.from_numpy(excerpt.rows("train"))
    assert torch.equal(seen.sort().values, rows)
    assert not torch.equal(seen, rows)
    batches = list(excerpt.val_dataloader())
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.from_numpy(excerpt.rows("val")))
    assert batches[0].signal.shape == (32, 12, 1000)
    assert torch.equal(batches[0].targets, excerpt.targets[batches[0].index])
    projection = excerpt.projection_dataset()
    assert [projection[position].index.item() for position in range(3)] == rows[:3].tolist()
    predicted = torch.cat([batch.index for batch in excerpt.predict_dataloader()])
    assert torch.equal(predicted, torch.from_numpy(excerpt.rows("test")))


def test_predicting_all(ptbxl_500: Path, cache: Path) -> None:
    data = PTBXL(ptbxl_500, cache_dir=cache, quiet=True, predict_fold="all", test_folds=())
    data.setup("predict")
    assert len(data.predict_set) == 500
    with pytest.raises(ValueError, match="the test fold holds no record"):
        data.setup("test")


def test_training_statistics(excerpt: PTBXL, caplog: pytest.LogCaptureFixture) -> None:
    train = excerpt.targets[torch.from_numpy(excerpt.rows("train"))]
    counts = train.sum(dim=0)
    first, second = PTBXL_ALL.index("NORM"), PTBXL_ALL.index("SR")
    both = (train[:, first] * train[:, second]).sum()
    expected = both / (counts[first] + counts[second] - both)
    assert excerpt.cooccurrence.shape == (71, 71)
    assert excerpt.cooccurrence[first, second] == pytest.approx(expected.item(), rel=1e-5)
    weight = (counts.sum() - counts[first]) / counts[first]
    assert excerpt.pos_weight[first] == pytest.approx(weight.item(), rel=1e-5)
    assert (excerpt.pos_weight[counts == 0] == 1).all()
    with caplog.at_level(logging.INFO), pytest.warns(ECGWarning, match="21 of 71 labels .* weight 1.*: ILMI, INJAS"):
        excerpt.setup("fit")
    assert "Largest positive weight: 861 (DIG)" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names", "count", "records"),
    [
        ("super", ["STTC", "NORM", "MI", "HYP", "CD"], 5, 488),
        ("sub", ["STTC", "NST_", "NORM"], 23, 488),
        ("diagnostic", ["NDT", "NST_", "DIG"], 44, 500),
        ("form", ["NDT", "NST_", "DIG"], 19, 500),
        ("rhythm", ["SR", "AFIB", "STACH"], 12, 500),
        ("branch:rhythm", list(PTBXL_RHYTHM[:3]), 16, 500),
        ("branch:morphology", list(PTBXL_MORPHOLOGY[:3]), 52, 500),
        ("branch:diffuse", ["DIG", "NORM", "EL"], 3, 500),
        (["AFIB", "NORM"], ["AFIB", "NORM"], 2, 500),
    ],
)
def test_label_sets(ptbxl_500: Path, labels: str | list[str], names: list[str], count: int, records: int) -> None:
    data = PTBXL(ptbxl_500, labels=labels, quiet=True)
    assert data.label_names[: len(names)] == names
    assert len(data.label_names) == count
    assert data.targets.shape == (records, count)


def test_classes_are_those_of_the_statements(ptbxl_500: Path) -> None:
    """Superclasses counted the long way round, from the two files."""
    statements = pd.read_csv(ptbxl_500 / "scp_statements.csv", index_col=0)
    table = pd.read_csv(ptbxl_500 / "ptbxl_database.csv")
    expected = []
    for text in table.scp_codes:
        classes = {statements.diagnostic_class.get(code) for code in ast.literal_eval(text)}
        classes = {name for name in classes if isinstance(name, str)}
        if classes:
            expected.append([float(name in classes) for name in ("STTC", "NORM", "MI", "HYP", "CD")])
    assert PTBXL(ptbxl_500, labels="super").targets.tolist() == expected


def test_finding_records(excerpt: PTBXL, ptbxl_500: Path, tmp_path: Path) -> None:
    inside = ptbxl_500.resolve() / "records100/00000/00017_lr"
    assert excerpt.record_path("17") == inside
    for name in ("17", "records100/00000/00017_lr", "records100/00000/00017_lr.hea"):
        assert excerpt.find_record(name) == inside
    outside = tmp_path / "mine"
    for extension in ("hea", "dat"):
        shutil.copy(f"{inside}.{extension}", f"{outside}.{extension}")
    assert excerpt.find_record(str(outside)) == outside
    with pytest.raises(ValueError, match="leaves the data folder"):
        excerpt.record_path(str(outside))
    with pytest.raises(ValueError, match="leaves the data folder"):
        excerpt.read("../mine")
    with pytest.raises(ValueError, match="found neither"):
        excerpt.find_record(str(tmp_path / "none"))


HEADER = "ecg_id,patient_id,scp_codes,strat_fold,filename_lr,filename_hr\n"


def small(root: Path, ptbxl_500: Path, rows: list[str], header: str = HEADER) -> Path:
    """A PTB-XL folder with the real statements and our own rows."""
    root.mkdir(exist_ok=True)
    shutil.copy(ptbxl_500 / "scp_statements.csv", root)
    (root / "ptbxl_database.csv").write_text(header + "\n".join(rows) + "\n")
    return root


def write(root: Path, rate: int, number: int, hertz: float) -> None:
    """Ten seconds of one sine in all leads, under PTB-XL's name."""
    folder = root / f"records{rate}/00000"
    folder.mkdir(parents=True, exist_ok=True)
    wave = np.sin(2 * np.pi * hertz * np.arange(10 * rate) / rate)
    name = f"{number:05d}_{'lr' if rate == 100 else 'hr'}"
    wfdb.wrsamp(
        name,
        rate,
        ["mV"] * 12,
        list(STANDARD_LEADS),
        np.repeat(wave[:, None], 12, axis=1),
        fmt=["16"] * 12,
        adc_gain=[1000] * 12,
        baseline=[0] * 12,
        write_dir=str(folder),
    )


def row(number: int = 1, codes: str = "{'NORM': 100.0}", fold: str = "1") -> str:
    lr, hr = (f"records{rate}/00000/{number:05d}_{tag}" for rate, tag in ((100, "lr"), (500, "hr")))
    return f'{number},7.0,"{codes}",{fold},{lr},{hr}'


@pytest.mark.parametrize(
    ("written", "wanted", "column", "warned"),
    [
        ((100, 500), 100, "_lr", False),
        ((100, 500), 500, "_hr", False),
        ((100, 500), 250, "_hr", False),
        ((500,), 100, "_hr", False),
        ((100,), 50, "_lr", False),
        ((100,), 500, "_lr", True),
    ],
)
def test_which_files_are_read(
    tmp_path: Path, ptbxl_500: Path, written: tuple[int, ...], wanted: int, column: str, warned: bool
) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row()])
    for rate in written:
        write(root, rate, 1, 3)
    data = PTBXL(root, sampling_rate=wanted, remove_baseline=False, cache_dir=tmp_path / "cache", quiet=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert data.record_ids[0].endswith(column)
    assert any("nothing above 50 Hz" in str(entry.message) for entry in caught) is warned
    assert data.signals.shape == (1, 12, 10 * wanted)
    expected = np.sin(2 * np.pi * 3 * np.arange(10 * wanted) / wanted)
    assert np.abs(data.signals[0, 4] - expected)[wanted:-wanted].max() < 0.02


def test_flat_leads_are_reported_in_one_sentence(tmp_path: Path, ptbxl_500: Path) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row(1), row(2, fold="9"), row(3, fold="10")])
    for number, hertz in ((1, 0), (2, 2), (3, 0)):
        write(root, 100, number, hertz)
    for _ in range(2):
        data = PTBXL(root, labels=["NORM", "AFIB"], cache_dir=tmp_path / "cache", quiet=True)
        with pytest.warns(ECGWarning, match="2 records have a flat lead, kept; first: records100/00000/00001_lr"):
            data.setup("validate")


def test_an_empty_fold_is_named(tmp_path: Path, ptbxl_500: Path) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row()])
    write(root, 100, 1, 2)
    data = PTBXL(root, cache_dir=tmp_path / "cache", quiet=True)
    with pytest.raises(ValueError, match=r"the val fold holds no record.*'train': 1, 'val': 0, 'test': 0"):
        data.setup("fit")


def test_missing_record_files_are_named(tmp_path: Path, ptbxl_500: Path) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row(1), row(2)])
    with pytest.raises(ValueError, match=r"found none of the files in .* needed a PTB-XL folder"):
        _ = PTBXL(root, quiet=True).record_ids
    write(root, 100, 1, 2)
    with pytest.raises(ValueError, match=r"1 of the first 2 records cannot be used(.|\n)*00002_lr\.hea"):
        PTBXL(root, cache_dir=tmp_path / "cache", quiet=True).prepare_data()


def test_missing_folder_and_tables(tmp_path: Path, ptbxl_500: Path) -> None:
    with pytest.raises(ValueError, match=r"root: found no folder .*nowhere, needed a PTB-XL folder"):
        PTBXL(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"scp_statements\.csv: found no such file, needed a PTB-XL folder"):
        PTBXL(tmp_path)
    root = small(tmp_path / "ptbxl", ptbxl_500, [row()])
    os.unlink(root / "ptbxl_database.csv")
    with pytest.raises(ValueError, match=r"ptbxl_database\.csv: found no such file"):
        _ = PTBXL(root).record_ids


@pytest.mark.parametrize("column", ["ecg_id", "patient_id", "scp_codes", "strat_fold"])
def test_missing_column(tmp_path: Path, ptbxl_500: Path, column: str) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row()], HEADER.replace(column, "other"))
    with pytest.raises(
        ValueError, match=rf"ptbxl_database\.csv: found columns \[.*'other'.*\], needed also '{column}'"
    ):
        _ = PTBXL(root).record_ids


def test_no_file_column_and_no_rows(tmp_path: Path, ptbxl_500: Path) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row()], HEADER.replace("filename", "name"))
    with pytest.raises(ValueError, match="needed filename_lr or filename_hr"):
        _ = PTBXL(root).record_ids
    with pytest.raises(ValueError, match="found no record"):
        _ = PTBXL(small(tmp_path / "ptbxl", ptbxl_500, [])).record_ids


def test_missing_statement_column(tmp_path: Path, ptbxl_500: Path) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row()])
    text = (root / "scp_statements.csv").read_text()
    (root / "scp_statements.csv").write_text(text.replace("diagnostic_class", "class"))
    with pytest.raises(ValueError, match=r"scp_statements\.csv: found columns .*needed also 'diagnostic_class'"):
        PTBXL(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(5, "{'NORM': 100.0, 'XYZ': 0.0}"), "found the statement 'XYZ' for ecg_id 5"),
        (row(5, "__import__('os')"), "found scp_codes \"__import__('os')\" for ecg_id 5"),
        (row(5, "['NORM']"), "for ecg_id 5, needed {code: likelihood}"),
        (row(5, fold=""), "found strat_fold nan for ecg_id 5"),
        (row(5, fold="1.5"), "found strat_fold 1.5 for ecg_id 5"),
        (row(5).replace("records100", "../records100"), "leaves the data folder"),
    ],
)
def test_damaged_rows(tmp_path: Path, ptbxl_500: Path, line: str, message: str) -> None:
    root = small(tmp_path / "ptbxl", ptbxl_500, [row(4), line, row(6)])
    with pytest.raises(ValueError, match=re.escape(message)):
        PTBXL(root, quiet=True, cache_dir=tmp_path / "cache").prepare_data()


def test_unknown_label_sets(ptbxl_500: Path) -> None:
    with pytest.raises(ValueError, match="labels: found 'everything', needed one of"):
        PTBXL(ptbxl_500, labels="everything")
    with pytest.raises(ValueError, match="labels: unknown SCP code 'XYZ'"):
        PTBXL(ptbxl_500, labels=["NORM", "XYZ"])


def test_branches_from_a_file(ptbxl_500: Path, tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("code,branch\nNORM,rhythm\n")
    data = PTBXL(ptbxl_500, labels=list(PTBXL_DIFFUSE), branches=tmp_path / "groups.csv")
    assert data.branch_labels == {"rhythm": ["NORM"], "diffuse": ["DIG", "EL"]}


@pytest.mark.parametrize(
    "argument",
    [
        {"batch_size": 0},
        {"sampling_rate": 0},
        {"seconds": 0},
        {"num_workers": -1},
        {"predict_fold": "val"},
        {"val_folds": (8,)},
    ],
)
def test_arguments_out_of_range(ptbxl_500: Path, argument: dict[str, object]) -> None:
    name = next(iter(argument))
    with pytest.raises(ValueError, match=name):
        PTBXL(ptbxl_500, **argument)
