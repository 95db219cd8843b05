"""``proto-vision ood`` from end to end: one small PALM on digits 0 to 5 scores digits that it knows and others."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proto_core.cli import main
from proto_core.metrics import auroc
from proto_vision import Digits
from proto_vision_app.main import APP
from tests.cli_runs import QUIET, refused

SMALL = [
    *("--config", "palm/demo.yaml", "--data.image_size", "8", "--model.backbone", "conv2"),
    *("--model.schedule.epochs", "2", "--model.schedule.warmup_epochs", "1"),
]


def call(*arguments: str) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short training."""
    folder = tmp_path_factory.mktemp("palm")
    assert main(APP, ["fit", *SMALL, *QUIET, "--trainer.default_root_dir", str(folder)]) == 0
    return folder / "checkpoints" / "final.ckpt"


@pytest.fixture(scope="module")
def digits() -> tuple[list[str], list[str]]:
    """Test digits of known classes and of others."""
    data = Digits(image_size=8)
    rows = data.rows("test")
    known = data.targets[rows].numpy() < 6
    names = [[data.record_ids[row] for row in part] for part in (rows[known], rows[~known])]
    return names[0][:60], names[1][:40]


def scores(path: Path) -> dict[str, list[tuple[str, float]]]:
    """What the table says of each set."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == sorted(float(row["score"]) for row in rows)
    found: dict[str, list[tuple[str, float]]] = {"asked": [], "known": []}
    for row in rows:
        found[row["set"]].append((row["image"], float(row["score"])))
    return found


@pytest.mark.parametrize("score", ["mahalanobis", "probability", "energy"])
def test_known_and_unknown_images_are_compared(
    trained: Path, digits: tuple[list[str], list[str]], score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "ood.csv", tmp_path / "scores.png"
    options = ["--ckpt_path", str(trained), "--score", score, "--known", "test"]
    assert main(APP, ["ood", *digits[1], *options, "--out", str(out), "--histogram", str(picture)]) == 0
    found = scores(out)
    assert {name for name, _ in found["asked"]} == set(digits[1])
    inside, outside = ([value for _, value in found[kind]] for kind in ("known", "asked"))
    assert (
        f"AUROC: {auroc(inside, outside):.4f} ({len(inside)} known images, 40 in question)" in capsys.readouterr().out
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_known_images_there_is_a_ranked_table(
    trained: Path, digits: tuple[list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ood.csv"
    asked = [*digits[0][:5], *digits[1][:5]]
    assert main(APP, ["ood", *asked, "--ckpt_path", str(trained), "--score", "knn", "--out", str(out)]) == 0
    assert len(scores(out)["asked"]) == 10
    assert "10 images scored" in capsys.readouterr().out


def test_folders_are_scored_and_files_that_cannot_be_read_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Digits(image_size=8)
    rng = np.random.default_rng(0)
    for folder in ("strange/deep", "known"):
        (tmp_path / folder).mkdir(parents=True)
    for n in range(5):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "strange/deep" / f"{n}.png")
        data.view(f"digit-000{n}").save(tmp_path / "known" / f"{n}.png")
    (tmp_path / "strange" / "torn.png").write_bytes(b"\x89PNG\r\n")
    out = tmp_path / "o" / "ood.csv"
    options = ["--ckpt_path", str(trained), "--known", str(tmp_path / "known"), "--out", str(out), "--batch_size", "2"]
    assert main(APP, ["ood", str(tmp_path / "strange"), *options]) == 0
    said = capsys.readouterr()
    assert "1 images cannot be read and are left out; the first: image" in said.err
    assert "torn.png" in said.err
    assert "(5 known images, 5 in question)" in said.out
    assert "FPR95: " in said.out
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows if row["problem"]] == ["torn.png"]
    assert rows[-1]["score"] == rows[-1]["unknown"] == ""
    values = {kind: [float(r["score"]) for r in rows if r["set"] == kind and r["score"]] for kind in ("asked", "known")}
    least = np.percentile(values["known"], 5)
    assert [row["unknown"] for row in rows[:-1]] == [str(int(float(row["score"]) < least)) for row in rows[:-1]]
    assert f"{sum(value < least for value in values['asked'])} images" in said.out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["digit-0000", "--known", "nowhere"], ["--known", "nowhere"]),
        (["digit-0000", "--data.root", "x", "--score", "odd"], ["--score", "odd"]),
        (["digit-0000", "--score", "knn", "--neighbours", "0"], ["k: found 0"]),
        (["EMPTY"], ["holds no image"]),
        (["TEXT"], ["none of 1 images can be read"]),
    ],
)
def test_what_is_refused(
    options: list[str], parts: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    places = {"EMPTY": str(tmp_path / "empty"), "TEXT": str(tmp_path / "text.png")}
    asked = [places.get(option, option) for option in options]
    out = tmp_path / "o.csv"
    assert call("ood", *asked, "--ckpt_path", str(trained), "--out", str(out)) == 2
    refused(capsys, *parts)
    assert not out.exists()


@pytest.mark.bad_input
def test_a_name_of_nothing_is_one_short_message(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("ood", "no-such-image", "--ckpt_path", str(trained), "--out", str(tmp_path / "o.csv")) == 2
    refused(capsys, "no-such-image")
