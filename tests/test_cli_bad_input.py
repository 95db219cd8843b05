"""What ``proto-ecg`` refuses: with a name and a reason, before any work, with nothing half-written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from proto_ecg import ProtoECGNet
from proto_ecg.data.leads import STANDARD_LEADS
from tests.cli_runs import (
    DEMO,
    QUIET,
    Run,
    archive,
    call,
    fit,
    fit_archive,
    refused,
)

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["explode"], "needed one of list, fit"),
        (["fit", *DEMO, "--modell.x", "3"], "--modell.x"),
        (["explain", "--ckpt", "x"], "--ckpt"),
        (["export", "--ckpt_path", "x", "--format", "pickle"], "pickle"),
        (["predict"], "--ckpt_path: found none"),
        (["fit", "--config", "none.yaml"], "protoecgnet/paper.yaml"),
        (["fit", *DEMO, "--data.num_records", "many"], "num_records"),
    ],
)
def test_misspelled_commands_and_options_get_a_short_answer(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    refused(capsys, part)


def test_nothing_is_decoded_before_the_arguments_are_known_to_fit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROTO_CACHE", str(tmp_path / "cache"))
    assert fit(run.data, tmp_path / "run", "--model.morphology.window", "99") == 2
    refused(capsys, "window of 99 steps is longer than the record's 32")
    (tmp_path / "file").write_text("")
    assert fit(run.data, tmp_path / "file/run") == 2
    refused(capsys, "--trainer.default_root_dir", "cannot write to folder")
    assert not (tmp_path / "cache").exists()


def test_a_case_table_that_leaves_the_data_folder_shows_nothing(run: Run, test_ids: list[str], tmp_path: Path) -> None:
    secret = run.data.parent / "secret"
    for ending in (".hea", ".dat"):
        shutil.copy(f"{run.data / test_ids[0]}{ending}", f"{secret}{ending}")
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    for name, state in checkpoint["state_dict"].items():
        if name.endswith("layer._extra_state"):
            state["case_ids"] = ["../secret" for _ in state["case_ids"]]
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    out = tmp_path / "report.html"
    assert call("explain", test_ids[0], "--ckpt_path", tmp_path / "evil.ckpt", "--out", out) == 0
    html = out.read_text(encoding="utf-8")
    assert "leaves the data folder" in html
    assert "s marked" in html
    assert "Training ECG ../secret, " not in html  # the caption of a drawing


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["none"], ["record", "none.hea", "found neither"]),
        (["ID", "--labels", "XXX"], ["labels", "XXX"]),
        (["ID", "--data.root", "nowhere"], ["root", "nowhere", "needed"]),
        (["ID", "--top", "0"], ["top", "needed 1 or more"]),
    ],
)
def test_what_cannot_be_explained(
    run: Run,
    test_ids: list[str],
    tmp_path: Path,
    arguments: list[str],
    parts: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [test_ids[0] if argument == "ID" else argument for argument in arguments]
    assert call("explain", *chosen, "--ckpt_path", run.checkpoint, "--out", tmp_path / "x.html") == 2
    refused(capsys, *parts)
    assert not list(tmp_path.iterdir())


def broken(root: Path, how: str) -> None:
    header, signal, table = root / "ecg/r1.hea", root / "ecg/r1.dat", root / "labels.csv"
    if how == "missing":
        signal.unlink()
    elif how == "truncated":
        signal.write_bytes(signal.read_bytes()[:1000])
    elif how == "leads":
        header.write_text(header.read_text().replace(" V6", " V7"))
    elif how == "rate":
        header.write_text(header.read_text().replace("r1 12 250 2750", "r1 12"))
    elif how == "nan":
        signal.write_bytes(np.full(2750 * 12, -32768, "<i2").tobytes())
    elif how == "column":
        table.write_text(table.read_text().replace("record,", "file,"))
    elif how == "fold":
        table.write_text(table.read_text().replace(",val,", ",train,"))
    elif how == "value":
        table.write_text(table.read_text().replace("ecg/r1,train,1", "ecg/r1,train,yes"))


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("missing", ["r1.dat"]),
        ("truncated", ["r1", "needed"]),
        ("leads", ["r1", "V6", "needed"]),
        ("rate", ["r1", "sampling"]),
        ("nan", ["r1", "no valid sample in any lead"]),
        ("column", ["labels.csv", "needed also 'record'"]),
        ("fold", ["the val fold holds no record", "needed at least one"]),
        ("value", ["labels.csv", "'yes'", "row 3", "AMYLOID"]),
    ],
)
def test_a_damaged_archive(tmp_path: Path, how: str, parts: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    root = archive(tmp_path / "mine", 8)
    broken(root, how)
    assert fit_archive(root, tmp_path / "run") == 2
    refused(capsys, *parts)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_records_with_fewer_leads_and_with_a_flat_one(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(tmp_path / "few", 1, leads=STANDARD_LEADS[:8])
    assert call("explain", tmp_path / "few/ecg/r0", "--ckpt_path", run.checkpoint, "--out", tmp_path / "x.html") == 2
    refused(capsys, "r0.hea", "V6", "needed")
    record = archive(tmp_path / "flat", 1) / "ecg/r0"
    signal = np.fromfile(f"{record}.dat", "<i2").reshape(-1, 12)
    signal[:, 11] = 0  # leads lie backwards: lead I
    Path(f"{record}.dat").write_bytes(signal.tobytes())
    Path(f"{record}.hea").write_text(
        re.sub(r"(?m)^(r0\.dat \S+ \S+ \S+ \S+) -?\d+ -?\d+ ", r"\1 0 0 ", Path(f"{record}.hea").read_text())
    )
    with pytest.warns(UserWarning, match=r"r0: a flat lead, kept: I$"):
        assert call("explain", record, "--ckpt_path", run.checkpoint, "--out", tmp_path / "x.html") == 0
    assert (tmp_path / "x.html").is_file()


def test_an_unknown_statement(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    shutil.copytree(run.data, root)
    table = root / "ptbxl_database.csv"
    table.write_text(table.read_text().replace("'SR': 0.0", "'WHAT': 0.0"))
    assert fit(root, tmp_path / "run") == 2
    refused(capsys, "ptbxl_database.csv", "'WHAT'", "ecg_id", "needed one of scp_statements.csv")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("command", ["fit", "test", "predict", "explain", "export", "demo", "checkpoints"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    run: Run, test_ids: list[str], tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("mine")

    def work(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(ProtoECGNet, "forward", work)
    monkeypatch.setattr(ProtoECGNet, "training_step", work)
    given = ("--ckpt_path", run.checkpoint, "--out", blocked / "sub/x.csv")
    if command == "fit":
        status = fit(run.data, blocked / "run")
    elif command == "checkpoints":
        status = fit(run.data, tmp_path / "run", "--curriculum.dirpath", blocked / "run")
    elif command == "demo":
        status = call("demo", "--out", blocked / "demo")
    else:
        status = call(command, *(test_ids[:1] if command == "explain" else []), *given)
    assert status == 2
    refused(capsys, "cannot write to folder", str(blocked))
    assert blocked.read_text() == "mine"


@pytest.mark.parametrize("command", ["fit", "weights", "test", "predict", "explain", "export"])
@pytest.mark.parametrize("how", ["missing", "cut", "text"])
def test_a_checkpoint_that_cannot_be_read(
    run: Run, tmp_path: Path, command: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.ckpt"
    if how != "missing":
        path.write_bytes(run.checkpoint.read_bytes()[:5000] if how == "cut" else b"not a checkpoint")
    if command == "fit":
        status = fit(run.data, tmp_path / "run", "--ckpt_path", path)
    elif command == "weights":
        status = fit(run.data, tmp_path / "run", "--curriculum.weights", path)
    else:
        status = call(command, *(["x"] if command == "explain" else []), "--ckpt_path", path)
    assert status == 2
    refused(capsys, str(path), "no such file" if how == "missing" else "cut or corrupt")
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_checkpoint_of_another_label_set_or_size(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = archive(tmp_path / "mine", 8)
    for option in ("--ckpt_path", "--curriculum.weights"):
        assert fit_archive(root, tmp_path / "run", option, run.checkpoint) == 2
        refused(capsys, "another label set", "AMYLOID")
        assert fit(run.data, tmp_path / "run", option, run.checkpoint, "--model.rhythm.proto_dim", "4") == 2
        refused(capsys, str(run.checkpoint), "do not fit this model", "rhythm")
    assert call("test", "--ckpt_path", run.checkpoint, "--data.labels", "rhythm", *QUIET) == 2
    refused(capsys, "label")
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_full_disk_keeps_the_previous_checkpoints(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run.root / "checkpoints", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert fit(run.data, tmp_path, "--curriculum.only", "[fusion]") == 2
    refused(capsys, "No space left on device")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
