"""``proto-vision discover``: a folder of few labels becomes clusters, an estimate, a contact sheet, a checkpoint."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proto_core.cli import main
from proto_vision import ProtoGCDModule
from proto_vision_app.main import APP
from tests.cli_runs import QUIET, refused

COLOURS = {"red": (220, 30, 30), "a<b": (30, 200, 30), "blue": (30, 30, 220), "grey": (120, 120, 120)}
AWKWARD = "<i>&\"odd'.png"
QUICK = ["--backbone", "mlp", "--image_size", "4", "--epochs", "8", "--augment", "none", "--shown", "5"]


def call(*arguments: str | Path) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colours have labels; all four lie without a label in ``unlabelled`` (its own folders say nothing)."""
    folder = tmp_path_factory.mktemp("partly")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for n in range(18):
            labelled = name in ("red", "a<b") and n < 6
            place = folder / (name if labelled else f"unlabelled/{n % 2}")
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(colour, 20, (10, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{name.replace('<', '')}-{n}.png")
    Image.open(folder / "red" / "red-0.png").save(folder / AWKWARD)
    (folder / "unlabelled" / "broken.png").write_bytes(b"\x89PNG cut")
    return folder


@pytest.fixture(scope="module")
def discovered(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("discovered")
    assert call("discover", images, *QUICK, "--candidates", "3", "4", "--out", out) == 0
    return out


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_readable_image_has_a_cluster(discovered: Path, images: Path) -> None:
    rows = table(discovered / "clusters.csv")
    assert len(rows) == 73
    assert all((images / row["image"]).is_file() for row in rows)
    assert {row["label"] for row in rows} == {"red", "a<b", ""}
    assert sum(row["label"] == "red" for row in rows) == 6
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    assert all(row["cluster"] == row["label"] for row in rows if row["label"])
    awkward = next(row for row in rows if row["image"] == AWKWARD)
    assert (awkward["label"], awkward["cluster"]) == ("", "red")
    skipped = table(discovered / "skipped_images.csv")
    assert [row["image"] for row in skipped] == ["unlabelled/broken.png"]


def chosen(folder: Path) -> int:
    return next(int(row["classes"]) for row in table(folder / "candidates.csv") if row["chosen"] == "1")


def test_the_number_of_classes_is_the_best_candidate(discovered: Path) -> None:
    rows = table(discovered / "candidates.csv")
    assert [row["classes"] for row in rows] == ["3", "4"]
    best = max(rows, key=lambda row: float(row["score"]))
    assert [row["chosen"] for row in rows] == [str(int(row is best)) for row in rows]
    used = {row["cluster"] for row in table(discovered / "clusters.csv")}
    assert {"red", "a<b"} <= used <= {"red", "a<b", "new 1", "new 2"}
    assert len(used) <= chosen(discovered)


def test_the_contact_sheet_shows_unlabelled_images_and_escapes_names(discovered: Path) -> None:
    html = (discovered / "contact_sheet.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<i>&" not in html
    assert "a&lt;b" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    rows = [row for row in table(discovered / "clusters.csv") if not row["label"]]
    sizes = Counter(row["cluster"] for row in rows)
    assert html.count('<section class="group"') == chosen(discovered)
    assert html.count("<figure") == sum(min(size, 5) for size in sizes.values())
    assert f"2 known, {chosen(discovered) - 2} new" in html
    names = {Path(row["image"]).name for row in table(discovered / "clusters.csv") if row["label"]}
    assert not names & set(re.findall(r"<bdi>([^<]*png)</bdi>", html))


def test_the_checkpoint_says_the_same_again(discovered: Path, tmp_path: Path) -> None:
    path = discovered / "checkpoints" / str(chosen(discovered)) / "final.ckpt"
    net = ProtoGCDModule.from_checkpoint(path)
    assert net.label_names == ["a<b", "red", "new 1", "new 2"][: chosen(discovered)]
    out = tmp_path / "p.csv"
    root = ["--trainer.default_root_dir", tmp_path]
    assert call("predict", *QUIET, *root, "--ckpt_path", path, "--out", out) == 0
    told = {row["image"]: row["cluster"] for row in table(discovered / "clusters.csv")}
    assert {row["record"]: row["predicted"] for row in table(out)} == told


def test_a_table_of_labels_and_a_known_number(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.relative_to(images).as_posix() for path in sorted(images.rglob("*-1?.png"))]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        rows = [[name, "crimson" if "red-1" in name and n % 2 else ""] for n, name in enumerate(names)]
        csv.writer(file).writerows([["image", "label"], *rows])
    labels = ["--labels", tmp_path / "labels.csv", "--classes", "30"]
    assert call("discover", images, *QUICK, *labels, "--epochs", "2", "--out", tmp_path / "o") == 0
    found = {row["cluster"] for row in table(tmp_path / "o" / "clusters.csv")}
    assert f"{30 - len(found)} classes have no image: train longer" in capsys.readouterr().out
    assert {row["label"] for row in table(tmp_path / "o" / "clusters.csv")} == {"crimson", ""}
    assert [row["classes"] for row in table(tmp_path / "o" / "candidates.csv")] == ["30"]


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str | Path, parts: tuple[str, ...]) -> None:
        assert call("discover", *QUICK, *arguments, "--out", tmp_path / "o") == 2
        refused(capsys, *parts)

    fails(tmp_path / "none", parts=("none", "no folder"))
    fails(images, "--classes", "1", parts=("--classes, --candidates: found [1]", "at least 2"))
    fails(images, "--classes", "3", "--candidates", "4", parts=("needed one of them",))
    fails(images, "--unlabelled", tmp_path / "nowhere", parts=("unlabelled", "nowhere"))
    fails(images, "--labels", tmp_path / "none.csv", parts=("labels", "none.csv"))
    fails(images, "--config", "palm/demo.yaml", parts=("palm/demo.yaml", "ProtoGCDModule"))
    fails(images, "--backbone", "resnet1000", parts=("resnet1000",))
    fails(images / "red", parts=("labelled", "at least one of each"))
    assert call("discover", images, "--shown", "0", "--out", tmp_path / "o") == 2
    refused(capsys, "--shown: found 0")
