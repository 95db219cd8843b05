"""``proto-vision verify`` from end to end: one small run on folders of people serves all tests."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proto_core.cli import main
from proto_core.metrics import equal_error_rate, rank1_accuracy, tar_at_far, template_features
from proto_core.training import save_checkpoint
from proto_vision import EvalProtoPNetModule, ImageFolder, UNPGModule
from proto_vision.verification import all_pairs, pair_scores
from proto_vision_app.main import APP
from tests.cli_runs import QUIET, refused

SMALL = [
    *("--config", "unpg/demo.yaml", "--data", "proto_vision.ImageFolder", "--data.image_size", "8"),
    *("--data.in_channels", "3", "--data.batch_size", "6", "--data.protocol.init_args.count", "3"),
    *("--model.embedding_dim", "8", "--model.flip", "true", "--model.schedule.epochs", "1"),
    *("--model.schedule.warmup_epochs", "0"),
]


def call(*arguments: str | Path) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def verify(trained: Path, out: Path, *more: str | Path) -> dict[str, float]:
    """Figures and counts that the command wrote."""
    assert call("verify", "--ckpt_path", trained, "--out", out, *more) == 0
    with out.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["figure", "value"]
    return {name: float(value) for name, value in rows}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven people of five images, each a colour on noise, one folder below another."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for person in range(7):
        colour = rng.integers(60, 250, 3)
        for n in range(5):
            path = folder / f"p{person}" / f"S{n % 2}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (10, 12, 3)) + (colour * rng.uniform(0.5, 0.7)).astype(int)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["proto-vision"])
        run = ("--data.root", people, "--trainer.default_root_dir", root)
        assert call("fit", *SMALL, *QUIET, *run) == 0
        yield root / "checkpoints" / "final.ckpt"


def embedded(trained: Path, people: Path, names: list[str], *, flip: bool = True) -> torch.Tensor:
    """Embeddings by the network alone."""
    net = UNPGModule.from_checkpoint(trained)
    net.flip = flip
    data = ImageFolder(people, image_size=8)
    with torch.no_grad():
        return net.embed(torch.stack([data.model_input(people / name) for name in names]))


def names_of(people: Path, *persons: int) -> list[str]:
    return [
        str(path.relative_to(people)) for person in persons for path in sorted((people / f"p{person}").rglob("*.png"))
    ]


def test_help_asks_for_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", "--help") == 0
    assert "--templates" in capsys.readouterr().out
    assert call("verify") == 2
    refused(capsys, "ckpt_path")


def test_people_that_training_has_not_seen(
    trained: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = verify(trained, tmp_path / "v.csv", "--far", "0.05", "0.5", "--plot", tmp_path / "curves" / "v.png")
    x, y = embedded(trained, people, names_of(people, 4, 5, 6)), torch.arange(15) // 5
    scores, labels = all_pairs(x, y)
    assert (figures["images"], figures["pairs"], figures["of one identity"]) == (15, 105, 30)
    assert figures["eer"] == pytest.approx(equal_error_rate(scores, labels), abs=1e-4)
    tars = tar_at_far(scores, labels, [0.05, 0.5], mode="upper")
    assert [figures["tar@0.05"], figures["tar@0.5"]] == pytest.approx(tars.tolist(), abs=1e-4)
    first = torch.tensor([0, 5, 10])
    rest = torch.tensor([row for row in range(15) if row % 5])
    assert figures["rank1"] == pytest.approx(rank1_accuracy(x[rest], y[rest], x[first], y[first]))
    assert Image.open(tmp_path / "curves" / "v.png").format == "PNG"
    text = capsys.readouterr().out
    assert "15 images, 105 pairs, 30 of one identity" in text
    assert f"written: {tmp_path / 'v.csv'}" in text


def test_a_folder_of_any_people_and_data_that_moved(trained: Path, people: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(people, moved)
    shutil.rmtree(moved / "p6")
    figures = verify(trained, tmp_path / "v.csv", "--faces", moved, "--plot", tmp_path / "v.svg")
    assert (figures["images"], figures["pairs"]) == (30, 435)
    assert "<svg" in (tmp_path / "v.svg").read_text(encoding="utf-8")
    shutil.copytree(people, tmp_path / "again")
    assert verify(trained, tmp_path / "w.csv", "--data.root", tmp_path / "again")["pairs"] == 105


def test_images_that_cannot_be_read_are_left_out_where_training_left_them_out(people: Path, tmp_path: Path) -> None:
    root = shutil.copytree(people, tmp_path / "torn")
    (root / "p6" / "S1" / "3.png").write_bytes(b"no image")
    run = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "run", "--data.skip_corrupt", "true")
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        assert call("fit", *SMALL, *QUIET, *run) == 0
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        figures = verify(tmp_path / "run" / "checkpoints" / "final.ckpt", tmp_path / "out" / "v.csv")
    assert (figures["images"], figures["pairs"]) == (14, 91)
    assert "p6/S1/3.png" in (tmp_path / "out" / "skipped_images.csv").read_text(encoding="utf-8")


def test_lists_and_packed_pairs_agree(
    trained: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = names_of(people, 0, 4, 5)
    pairs = [(names[a], names[b], int(a // 5 == b // 5)) for a in range(15) for b in range(a + 1, 15) if (a + b) % 3]
    lines = "".join(f"{one}\t{two}\t{same}\n" for one, two, same in pairs)
    (tmp_path / "pairs.txt").write_text(lines, encoding="utf-8")
    listed = verify(trained, tmp_path / "v.csv", "--pairs", tmp_path / "pairs.txt", "--mode", "nearest")
    place = {name: row for row, name in enumerate(names)}
    first, second = (torch.tensor([place[pair[side]] for pair in pairs]) for side in (0, 1))
    scores, labels = (
        pair_scores(embedded(trained, people, names), first, second),
        torch.tensor([pair[2] for pair in pairs]),
    )
    assert listed["eer"] == pytest.approx(equal_error_rate(scores, labels), abs=1e-4)
    assert listed["rank1"] == listed["rank1"]
    capsys.readouterr()
    images = [(people / name).read_bytes() for pair in pairs for name in pair[:2]]
    (tmp_path / "own.bin").write_bytes(pickle.dumps((images, [bool(pair[2]) for pair in pairs])))
    packed = verify(trained, tmp_path / "w.csv", "--pairs", tmp_path / "own.bin", "--mode", "nearest")
    for name in ("eer", "tar@0.01", "accuracy", "threshold", "pairs"):
        assert packed[name] == pytest.approx(listed[name], abs=1e-5)
    assert np.isnan(packed["rank1"])
    assert "no rank1" in capsys.readouterr().out


def test_templates_pool_images_without_their_mirror_images(trained: Path, people: Path, tmp_path: Path) -> None:
    names = names_of(people, 4, 5)
    templates, medias = [7, 7, 7, 2, 2, 30, 30, 30, 41, 41], [1, 1, 2, 3, 4, 1, 2, 2, 5, 5]
    rows = zip(names, templates, medias)
    (tmp_path / "tid.txt").write_text("".join(f"{n} {t} {m}\n" for n, t, m in rows), encoding="utf-8")
    (tmp_path / "label.txt").write_text("7 2 1\n30 41 1\n7 30 0\n2 41 0\n41 7 0\n", encoding="utf-8")
    lists = ("--templates", tmp_path / "tid.txt", "--pairs", tmp_path / "label.txt", "--faces", people)
    figures = verify(trained, tmp_path / "v.csv", *lists, "--far", "0.4")
    x = embedded(trained, people, names, flip=False)
    pooled, ids = template_features(x, torch.tensor(templates), torch.tensor(medias))
    assert ids.tolist() == [2, 7, 30, 41]
    scores = pair_scores(pooled, torch.tensor([1, 2, 1, 0, 3]), torch.tensor([0, 3, 2, 3, 1]))
    labels = torch.tensor([1, 1, 0, 0, 0])
    assert figures["eer"] == pytest.approx(equal_error_rate(scores, labels), abs=1e-4)
    assert figures["tar@0.4"] == pytest.approx(tar_at_far(scores, labels, [0.4], mode="upper").item(), abs=1e-4)
    assert (figures["images"], figures["pairs"]) == (10, 5)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(
    trained: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def fails(*arguments: str | Path) -> None:
        assert call("verify", "--ckpt_path", trained, *arguments) == 2

    fails("--far", "2")
    refused(capsys, "--far", "[0, 1]")
    fails("--plot", "curves.jpg")
    refused(capsys, "--plot", ".png or .svg")
    fails("--batch_size", "0")
    refused(capsys, "--batch_size")
    fails("--templates", "x.txt")
    refused(capsys, "--templates", "--pairs", "--faces")
    fails("--pairs", "none.txt")
    refused(capsys, "none.txt", "cannot be read")
    shutil.copytree(people / "p0", tmp_path / "alone" / "p0")
    fails("--faces", tmp_path / "alone")
    refused(capsys, "alone", "5 images of 1 identities")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(([Evil(), b""], [True, False])))
    fails("--pairs", "evil.bin")
    refused(capsys, "evil.bin", "not read from a file")
    assert not (tmp_path / "owned").exists()
    bad = tmp_path / "bad"
    shutil.copytree(people, bad)
    (bad / "p1" / "S0" / "0.png").write_bytes(b"\x89PNG cut")
    fails("--faces", bad)
    refused(capsys, "p1/S0/0.png")
    assert not (tmp_path / "verification.csv").exists()
    other = EvalProtoPNetModule("conv3", 3, image_size=8)
    save_checkpoint(other, tmp_path / "other.ckpt")
    assert call("verify", "--ckpt_path", tmp_path / "other.ckpt") == 2
    refused(capsys, "other.ckpt", "evalprotopnet", "no embeddings")
