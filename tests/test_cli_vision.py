"""``proto-vision`` from end to end, in process: one small run on a folder of images serves most tests."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proto_core.cli import main
from proto_core.training import Curriculum
from proto_vision import STProtoPNetModule
from proto_vision_app.main import APP
from tests.cli_runs import QUIET, Killed, refused, weights

TINY = [
    *("--config", "st_protopnet/demo.yaml", "--data", "proto_vision.ImageFolder", "--data.image_size", "16"),
    *("--data.in_channels", "3", "--model.prototypes_per_class", "1", "--model.prototype_channels", "8"),
    *("--model.schedule.joint_epochs", "2", "--model.schedule.head_epochs", "1", "--data.val_fraction", "0.2"),
]
AWKWARD = "<b>&\"quote'.png"


def call(*arguments: str | Path) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def fit(data: Path, root: Path, *more: str | Path) -> int:
    return call("fit", *TINY, *QUIET, "--data.root", data, "--trainer.default_root_dir", root, *more)


def paint(folder: Path, classes: dict[str, tuple[int, int, int]], count: int = 12) -> Path:
    """Coloured squares on noise, a class for each colour."""
    rng = np.random.default_rng(0)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for n in range(count):
            pixels = rng.integers(0, 60, (20, 24, 3), np.uint8)
            top, left = rng.integers(2, 10, 2)
            pixels[top : top + 8, left : left + 8] = colour
            Image.fromarray(pixels).save(folder / name / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = paint(
        tmp_path_factory.mktemp("images"), {"red": (220, 30, 30), "blue": (30, 30, 220), "a<b": (30, 220, 30)}
    )
    shutil.copy(folder / "red" / "0.png", folder / "red" / AWKWARD)
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["proto-vision"])
        assert fit(images, root) == 0
        yield root / "checkpoints" / "final.ckpt"


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("demo", "fit", "validate", "test", "predict", "explain", "export", "list"):
        assert re.search(rf"^  {command} ", text, flags=re.MULTILINE)
    assert "st_protopnet/paper.yaml" in text
    assert call("list", "--names") == 0
    assert "st_protopnet\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "explain", "export", "fit", "test"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"proto-vision {command}" in re.sub(r" \[options\]", "", capsys.readouterr().out)


def test_fit_leaves_stages_and_cases_from_the_training_fold(trained: Path, images: Path) -> None:
    assert {path.name for path in trained.parent.glob("*.ckpt")} == {
        f"{name}.ckpt" for name in ("joint", "heads", "last", "final")
    }
    net = STProtoPNetModule.from_checkpoint(trained)
    assert net.class_names == ["a<b", "blue", "red"]
    assert (net.image_size, net.in_channels) == (16, 3)
    for layer in net.prototype_layers().values():
        for name, labels in zip(layer.case_ids, layer.case_labels):
            assert (images / name).is_file()
            assert labels == [name.partition("/")[0]]


def test_a_killed_run_resumes_to_the_same_weights(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(images, tmp_path / "whole") == 0
    begin = Curriculum.on_train_epoch_start

    def killing(self: Curriculum, trainer, module) -> None:
        if trainer.current_epoch == 1:
            raise Killed
        begin(self, trainer, module)

    monkeypatch.setattr(Curriculum, "on_train_epoch_start", killing)
    with pytest.raises(Killed):
        fit(images, tmp_path / "cut")
    monkeypatch.setattr(Curriculum, "on_train_epoch_start", begin)
    assert fit(images, tmp_path / "cut", "--ckpt_path", "last") == 0
    first, second = (weights(tmp_path / name / "checkpoints/final.ckpt") for name in ("whole", "cut"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


def test_test_and_predict_write_tables(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("test", *QUIET, "--ckpt_path", trained, "--out", tmp_path / "figures.csv") == 0
    assert "accuracy_support" in capsys.readouterr().out
    with (tmp_path / "figures.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["a<b", "blue", "red"]
    assert call("predict", *QUIET, "--ckpt_path", trained, "--out", tmp_path / "p.csv") == 0
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        probabilities = {name: float(row[name]) for name in ("a<b", "blue", "red")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(probabilities, key=probabilities.get)


def test_explain_shows_files_and_ids_and_escapes_their_names(trained: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    files = ["red/0.png", images / "red" / AWKWARD]
    assert call("explain", "--ckpt_path", trained, *files, "--out", out) == 0
    html = out.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;&#34;quote&#39;.png" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert html.count("<article") == 2
    assert html.count('src="data:image/png;base64,') >= 10
    assert "Best other class" in html


def test_explain_of_a_moved_data_folder(trained: Path, images: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(images, moved)
    assert (
        call("explain", "--ckpt_path", trained, "blue/1.png", "--data.root", moved, "--out", tmp_path / "r.html") == 0
    )
    assert "could not be read" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_export_gives_the_same_logits(trained: Path, tmp_path: Path) -> None:
    import onnxruntime

    net = STProtoPNetModule.from_checkpoint(trained)
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        expected = net.class_logits(x)
    assert call("export", "--ckpt_path", trained, "--out", tmp_path / "folder") == 0
    with torch.no_grad():
        assert torch.equal(STProtoPNetModule.from_pretrained(tmp_path / "folder").class_logits(x), expected)
    assert call("export", "--ckpt_path", trained, "--format", "onnx", "--out", tmp_path / "m.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = session.run(["logits"], {"images": x.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more"
    shutil.copytree(images, more)
    shutil.copytree(more / "red", more / "violet")
    assert call("test", *QUIET, "--ckpt_path", trained, "--data.root", more) == 2
    refused(capsys, "another label set", "violet")
    assert fit(tmp_path / "none", tmp_path / "r") == 2
    refused(capsys, "none", "no folder")
    bad = tmp_path / "bad"
    shutil.copytree(images, bad)
    (bad / "red" / "2.png").write_bytes(b"\x89PNG cut")
    assert fit(bad, tmp_path / "r") == 2
    refused(capsys, "2.png")
    assert call("explain", "--ckpt_path", trained, "none.png", "--out", tmp_path / "r.html") == 2
    refused(capsys, "none.png", "neither a file")
    assert call("explain", "--ckpt_path", tmp_path / "none.ckpt", "x.png") == 2
    refused(capsys, "no such file")
    assert fit(images, tmp_path / "r", "--model.backbone", "resnet1000") == 2
    refused(capsys, "resnet1000")
    assert fit(images, tmp_path / "r", "--data.labels", tmp_path / "none.csv") == 2
    refused(capsys, "none.csv")


def test_skipping_corrupt_images_lists_them_beside_the_run(images: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(images, bad)
    (bad / "red" / "2.png").write_bytes(b"\x89PNG cut")
    assert fit(bad, tmp_path / "r", "--data.skip_corrupt", "true") == 0
    assert "red/2.png" in (tmp_path / "r" / "skipped_images.csv").read_text()
