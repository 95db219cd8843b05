"""``proto-ecg phenotypes`` on the shared run: diagnoses by record and by patient, covariates, and what it refuses."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cli_runs import call, refused

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def table(run) -> pd.DataFrame:
    """One row per record of the run's data, with the diagnosis that its first statement stands for."""
    found = pd.read_csv(run.data / "ptbxl_database.csv")
    first = found.scp_codes.map(lambda text: sorted(ast.literal_eval(text))[0])
    return pd.DataFrame(
        {
            "record": found.filename_lr,
            "patient_id": found.patient_id.astype(int),
            "icd_code": np.where(first < "N", "I4891", "I10"),
            "icd_version": 10,
            "age": found.age,
            "flag": (first < "M").astype(int),
        }
    )


def study(run, table: pd.DataFrame, folder: Path, *more: str | Path) -> int:
    diagnoses = folder / "diagnoses.csv"
    table.to_csv(diagnoses, index=False)
    return call(
        *("phenotypes", "--ckpt_path", run.checkpoint, "--diagnoses", diagnoses, "--out", folder / "out"),
        *("--min_cases", "5", *more),
    )


def test_records_of_any_folder(run, table, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(run.data / "records100", moved / "ecgs")
    table["record"] = table["record"].str.replace("records100", "ecgs")
    more = ["--data.root", moved, "--all_records", "--covariates", "age", "--concepts", "flag", "--predict", "1"]
    assert study(run, table, tmp_path, *more) == 0
    out = tmp_path / "out"
    associations = pd.read_csv(out / "associations.csv")
    prototypes = pd.read_csv(out / "prototypes.csv")
    assert set(associations["phecode"]) == {"ICD10CM I48", "ICD10CM I10"}
    assert set(associations["prototype"]) == set(prototypes["prototype"])
    assert prototypes["case"].str.startswith("records100/").any()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["min_cases"]) == (60, 5)
    assert summary["prototypes"] == len(prototypes)
    compared = set(pd.read_csv(out / "comparison.csv")["score"])
    assert compared == {"prototype", "class activation", "class probability", "concept"}
    assert {"prediction.csv", "figure.svg", "figure.png"} <= {path.name for path in out.iterdir()}
    text = capsys.readouterr().out
    assert "odds ratio" in text
    assert str(out) in text.replace("\n", "")


def test_patients_count_once_and_by_record_or_by_patient_alike(run, table, tmp_path):
    by_patient = table.drop(columns="record").drop_duplicates("patient_id")
    by_record = table.drop_duplicates("patient_id")
    for name, rows in (("p", by_patient), ("r", by_record)):
        (tmp_path / name).mkdir()
        assert study(run, rows, tmp_path / name, "--predict", "0", "--correction", "fdr_bh") == 0
    tables = [pd.read_csv(tmp_path / name / "out" / "associations.csv") for name in ("p", "r")]
    pd.testing.assert_frame_equal(*tables)
    summary = json.loads((tmp_path / "p/out/summary.json").read_text())
    assert summary["rows"] == table["patient_id"].nunique()
    assert summary["correction"] == "fdr_bh"


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"patient_id": "nobody", "record": None}, [], "found no patient_id of"),
        ({"record": "records100/none"}, [], "none"),
        ({"icd_version": 8}, [], "icd_version '8', needed 9 or 10"),
        ({}, ["--covariates", "weight"], "no column 'weight'"),
        ({"age": "old"}, ["--covariates", "age"], "column 'age'"),
        ({}, ["--min_cases", "500"], "no outcome could be fitted: needed 500 cases"),
        ({}, ["--alpha", "2"], "alpha: found 2"),
        ({}, ["--config", "none.yaml"], "no file 'none.yaml'"),
    ],
)
def test_bad_input_is_named(run, table, tmp_path, capsys, change, more, message):
    for column, value in change.items():
        table = table.drop(columns=column) if value is None else table.assign(**{column: value})
    assert study(run, table, tmp_path, *more) == 2
    refused(capsys, message)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
