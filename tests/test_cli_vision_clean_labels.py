"""``proto-vision clean-labels``: training on a folder, with and without trusted images, and judging by a checkpoint."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from proto_core.cli import main
from proto_vision_app.main import APP
from tests.cli_runs import refused

AWKWARD = "<b>&\"quote'.png"
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "a<b": (30, 220, 30)}


def call(*arguments: str | Path) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, ["clean-labels", *(str(argument) for argument in arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def paint(folder: Path, count: int, wrong: int, seed: int) -> Path:
    """Noisy squares, a class for each colour; some images of each class have the next class's colour."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            shown = names[(place + 1) % len(names)] if n < wrong else name
            pixels = rng.integers(0, 60, (12, 12, 3), np.uint8)
            pixels[2:10, 2:10] = np.array(COLOURS[shown]) + rng.integers(-25, 26, (8, 8, 3))
            Image.fromarray(pixels).save(folder / name / f"{'wrong' if n < wrong else 'right'}-{n}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = paint(tmp_path_factory.mktemp("images"), 24, 5, 0)
    shutil.move(folder / "red" / "right-9.png", folder / "red" / AWKWARD)
    return folder


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("trusted"), 3, 0, 1)


def smaller(folder: Path, name: str, schedule: dict[str, object], model: dict[str, object]) -> Path:
    """A shipped config with a small network and few epochs."""
    config = yaml.safe_load((APP.configs / name).read_text(encoding="utf-8"))
    config["model"]["init_args"] |= {"backbone": "mlp", **model}
    config["model"]["init_args"]["schedule"] |= schedule
    config["data"]["init_args"] |= {"image_size": 8, "batch_size": 16}
    path = folder / name.replace("/", "-")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cpc(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which CPC has judged the images."""
    root = tmp_path_factory.mktemp("cpc")
    config = smaller(root, "cpc/clean.yaml", {"warmup_epochs": 4, "epochs": 8, "milestones": []}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["proto-vision"])
        patch.chdir(root)
        assert call(images, "--config", config, "--run", root / "run") == 0
        yield root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_labels_come_first(cpc: Path, images: Path) -> None:
    rows = table(cpc / "suspicions.csv")
    assert list(rows[0]) == ["image", "fold", "given", "suggested", "suspicion", "trusted"]
    assert len(rows) == 72
    assert {row["image"] for row in rows} == {path.relative_to(images).as_posix() for path in images.rglob("*.png")}
    suspicions = [float(row["suspicion"]) for row in rows]
    assert suspicions == sorted(suspicions, reverse=True)
    assert all(0 <= value <= 1 for value in suspicions)
    assert {row["fold"] for row in rows} == {"train"}
    wrong = [row for row in rows[:15] if "/wrong-" in row["image"]]
    assert len(wrong) >= 13
    names = list(COLOURS)
    assert sum(names.index(row["suggested"]) == (names.index(row["given"]) + 1) % 3 for row in wrong) >= 12


def test_the_page_shows_the_most_suspicious_and_escapes_names(cpc: Path) -> None:
    html = (cpc / "suspicions.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert html.count("<figure") == 72
    assert "<b>&" not in html
    assert "Labelled a&lt;b" in html
    assert re.search(r"rather (red|blue)", html)


def test_a_checkpoint_judges_alike_and_elsewhere(cpc: Path, images: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    checkpoint = cpc / "run" / "checkpoints" / "final.ckpt"
    places = ["--out", tmp_path / "s.csv", "--sheet", tmp_path / "deep" / "s.html"]
    assert call("--ckpt_path", checkpoint, "--data.root", moved, *places, "--shown", "7") == 0
    assert "72 images" in capsys.readouterr().out
    assert table(tmp_path / "s.csv") == table(cpc / "suspicions.csv")
    assert (tmp_path / "deep" / "s.html").read_text(encoding="utf-8").count("<figure") == 7


def test_a_checkpoint_leaves_out_images_that_cannot_be_read(cpc: Path, images: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    (moved / "red" / "torn.png").write_bytes(b"no image")
    checkpoint = cpc / "run" / "checkpoints" / "final.ckpt"
    places = ["--out", tmp_path / "out" / "s.csv", "--sheet", tmp_path / "out" / "s.html"]
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        assert call("--ckpt_path", checkpoint, "--data.root", moved, *places) == 0
    assert "72 images" in capsys.readouterr().out
    assert table(tmp_path / "out" / "s.csv") == table(cpc / "suspicions.csv")
    assert [row["image"] for row in table(tmp_path / "out" / "skipped_images.csv")] == ["red/torn.png"]


def test_trusted_images_are_never_suspicious(images: Path, trusted: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["proto-vision"])
    schedule = {"pretrain_epochs": 3, "init_epoch": 1, "relation_epochs": 1, "epochs": 6}
    config = smaller(tmp_path, "fopro/clean.yaml", schedule, {"low_dim": 8, "projection_hidden": 16, "queue_size": 64})
    places = ["--out", tmp_path / "s.csv", "--sheet", tmp_path / "s.html", "--run", tmp_path / "run"]
    assert call(images, "--trusted", trusted, "--config", config, *places) == 0
    rows = table(tmp_path / "s.csv")
    known = [row for row in rows if row["trusted"] == "1"]
    assert (len(rows), len(known)) == (81, 9)
    assert all(float(row["suspicion"]) == 0 and row["suggested"] == row["given"] for row in known)
    assert sum("/wrong-" in row["image"] for row in rows[:15]) >= 11
    assert (tmp_path / "s.html").read_text(encoding="utf-8").count("<figure") == 72
    assert call("--ckpt_path", tmp_path / "run" / "checkpoints" / "final.ckpt", *places[:4]) == 0
    assert table(tmp_path / "s.csv") == rows
    capsys.readouterr()


def test_a_noise_that_is_known_is_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["proto-vision"])
    config = yaml.safe_load((APP.configs / "cpc/demo.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["schedule"] |= {"warmup_epochs": 3, "epochs": 4}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    fit = ["fit", "--config", str(tmp_path / "c.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    assert main(APP, [*fit, *quiet]) == 0
    places = ["--out", tmp_path / "s.csv", "--sheet", tmp_path / "s.html"]
    assert call("--ckpt_path", tmp_path / "run" / "checkpoints" / "final.ckpt", *places) == 0
    found = re.search(r"AUROC of wrong labels among training images: (0\.\d+) \((\d+) wrong\)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) > 0.75
    rows = table(tmp_path / "s.csv")
    assert sum(row["true"] != row["given"] for row in rows) == int(found[2]) == 290
    assert {row["fold"] for row in rows} == {"train", "val", "test"}


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(cpc: Path, images: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["proto-vision"])
    monkeypatch.chdir(tmp_path)
    checkpoint = cpc / "run" / "checkpoints" / "final.ckpt"
    assert call() == 2
    refused(capsys, "needed one of them")
    assert call(images, "--ckpt_path", checkpoint) == 2
    refused(capsys, "needed one of them")
    assert call("--ckpt_path", checkpoint, "--trusted", images) == 2
    refused(capsys, "a checkpoint has settings of its own")
    assert call("--ckpt_path", checkpoint, "--shown", "0") == 2
    refused(capsys, "--shown: found 0")
    assert call(images, "--config", "evalprotopnet/demo.yaml", "--run", tmp_path / "r") == 2
    refused(capsys, "'evalprotopnet' judges no labels")
    assert call(images, "--config", "cpc/demo.yaml", "--run", tmp_path / "r") == 2
    refused(capsys, "proto_vision.Digits has no root")
    assert call(images, "--config", "cpc/clean.yaml", "--trusted", images, "--run", tmp_path / "r") == 2
    refused(capsys, "proto_vision.ImageFolder has no trusted")
    assert call(tmp_path / "none") == 2
    refused(capsys, "none")
    more = tmp_path / "more"
    shutil.copytree(images, more)
    shutil.move(more / "red", more / "violet")
    assert call("--ckpt_path", checkpoint, "--data.root", more) == 2
    refused(capsys, "violet", "needed those that the network was trained on")
    other = tmp_path / "other"
    shutil.copytree(images / "red", other / "red")
    shutil.copytree(images / "red", other / "new")
    assert call(images, "--trusted", other, "--run", tmp_path / "r") == 2
    refused(capsys, "trusted", "new")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    assert "proto-vision clean-labels" in re.sub(r" \[options\]", "", capsys.readouterr().out)
