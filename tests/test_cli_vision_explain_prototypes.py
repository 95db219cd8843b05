"""``proto-vision explain-prototypes``: tables, the report, configs, without OpenCV, and bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from proto_core.training import save_checkpoint
from proto_vision import CaseBasedModule
from proto_vision.data.dataset import evenly_spaced
from proto_vision.explaining import CHARACTERISTICS, CheckpointInput, CheckpointMaps, PrototypeExplainer
from proto_vision.explaining.study import pixels_of_image
from tests.cli_runs import refused, rows
from tests.test_cli_vision import AWKWARD, call, fit, paint

OPENCV = importlib.util.find_spec("cv2") is not None
QUICK = ("contrast", "hue", "shape", "brightness")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = paint(tmp_path_factory.mktemp("images"), {"red": (220, 30, 30), "a<b": (30, 220, 30)}, count=8)
    (folder / "red" / "0.png").rename(folder / "red" / AWKWARD)
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["proto-vision"])
        assert fit(images, root, "--model.prototypes_per_class", "2", "--data.val_fraction", "0") == 0
        yield root / "checkpoints" / "final.ckpt"


def test_tables_and_report(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    shown = ["red/1.png", images / "red" / AWKWARD]
    options = ["--characteristics", *QUICK, "--limit", "4", "--shown", "5", "--out", out]
    assert call("explain-prototypes", *shown, "--ckpt_path", trained, *options) == 0
    assert "8 prototypes, 4 train images, " in capsys.readouterr().out
    maps, inputs = CheckpointMaps(str(trained)), CheckpointInput(str(trained))
    explainer, data = PrototypeExplainer(maps, inputs, characteristics=QUICK), inputs.data
    table = rows(out / "prototypes.csv")
    assert [row["set"] for row in table] == ["trivial"] * 4 + ["support"] * 4
    assert {row["case"].partition("/")[0] for row in table if row["classes"] == "a<b"} == {"a<b"}
    for fold in ("train", "test"):
        explainer.reset()
        chosen = evenly_spaced(data.rows(fold), 4)
        scores = explainer.run(pixels_of_image(data.reader()(int(row))) for row in chosen).global_scores()
        found = [[float(row[f"{fold}_{name}"]) for name in QUICK] for row in table]
        np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-6)
    first = [row["first"] for row in table]
    assert first == [max(QUICK, key=lambda name, row=row: float(row[f"train_{name}"])) for row in table]
    pairs = rows(out / "redundancy.csv")
    assert len(pairs) == 2 * 6  # four prototypes of each class, two sets together
    distances = [float(pair["distance"]) for pair in pairs]
    assert distances == sorted(distances)
    local = rows(out / "local.csv")
    assert len(local) == 2 * 8
    expected = explainer.local(pixels_of_image(data.reader()(data.find_row("red/1.png"))))
    np.testing.assert_allclose(
        [[float(row[name]) for name in QUICK] for row in local[:8]], expected.delta[0].T, rtol=1e-4, atol=1e-6
    )
    assert [row["characteristic"] for row in rows(out / "characteristics.csv")] == list(QUICK)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;&#34;quote&#39;.png" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert html.count("<article") == 2
    assert len(re.findall(r'<div class="card" id="p', html)) == 5


def test_shipped_config_with_another_checkpoint(trained: Path, tmp_path: Path) -> None:
    texture = [] if OPENCV else ["--characteristics", *QUICK]
    options = ["--limit", "2", "--test", "false", "--shown", "0", "--out", tmp_path, *texture]
    config = "explaining_prototypes/paper.yaml"
    assert call("explain-prototypes", "--config", config, "--ckpt_path", trained, *options) == 0
    columns = set(rows(tmp_path / "prototypes.csv")[0])
    named = {column.removeprefix("train_") for column in columns if column.startswith("train_")}
    assert named == (set(CHARACTERISTICS) - {"brightness"} if OPENCV else set(QUICK))
    assert not any(column.startswith("test_") for column in columns)
    assert not (tmp_path / "local.csv").exists()


def test_images_that_cannot_be_read_are_left_out_where_training_left_them_out(images: Path, tmp_path: Path) -> None:
    root = shutil.copytree(images, tmp_path / "torn")
    (root / "red" / "last.png").write_bytes(b"no image")
    more = ("--model.prototypes_per_class", "1", "--data.val_fraction", "0", "--data.test_fraction", "0")
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        assert fit(root, tmp_path / "run", *more, "--data.skip_corrupt", "true") == 0
    checkpoint, out = tmp_path / "run" / "checkpoints" / "final.ckpt", tmp_path / "out"
    options = ["--characteristics", "hue", "--shown", "0", "--test", "false", "--out", out]
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        assert call("explain-prototypes", "--ckpt_path", checkpoint, *options) == 0
    assert [row["image"] for row in rows(out / "skipped_images.csv")] == ["red/last.png"]
    assert len(rows(out / "prototypes.csv")) == 4


def test_without_opencv_texture_is_left_out_or_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    command = ["explain-prototypes", "--ckpt_path", trained, "--limit", "2", "--out", tmp_path]
    assert call(*command, "--test", "false") == 0
    assert "texture is left out: it needs the extra proto-vision[texture]" in capsys.readouterr().out
    with (tmp_path / "characteristics.csv").open() as file:
        assert [row["characteristic"] for row in csv.DictReader(file)] == [n for n in CHARACTERISTICS if n != "texture"]
    assert call(*command, "--characteristics", "texture", "hue") == 2
    refused(capsys, "texture needs OpenCV", "extra 'texture' of proto-vision", "leave texture out")


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain-prototypes", "--ckpt_path", trained, "--characteristics", "hue", "--out", tmp_path]
    for more, says in [
        (["none.png"], "neither a file"),
        (["--limit", "0"], "limit: found 0"),
        (["--batch_size", "-1"], "batch_size: found -1"),
        (["--characteristics", "size"], "'size'"),
        (["--config", "st_protopnet/demo.yaml"], "no explainer"),
    ]:
        assert call(*command, *more) == 2
        refused(capsys, says)
    assert call("explain-prototypes", "--out", tmp_path) == 2
    refused(capsys, "--ckpt_path: found none")
    assert call("explain-prototypes", "--ckpt_path", tmp_path / "none.ckpt", "--out", tmp_path) == 2
    refused(capsys, "no such file")
    save_checkpoint(CaseBasedModule(image_size=16, in_channels=1), tmp_path / "case.ckpt")
    assert call("explain-prototypes", "--ckpt_path", tmp_path / "case.ckpt", "--out", tmp_path) == 2
    refused(capsys, "'case_based'", "no part prototypes")
    plain = {"model": {"class_path": "torch.nn.Identity"}, "preprocess": {"class_path": "torch.nn.Identity"}}
    config = {"model": {"class_path": "proto_vision.explaining.PrototypeExplainer", "init_args": plain}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    assert call("explain-prototypes", "--config", tmp_path / "own.yaml", "--out", tmp_path) == 2
    refused(capsys, "no CheckpointMaps")
