"""``proto-vision linear-eval`` from end to end: on a backbone, a checkpoint and a file of features."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from proto_core.cli import main
from proto_core.training import read_checkpoint, save_checkpoint
from proto_vision import EvalProtoPNetModule, LinearEvaluation, OPLClassifier, episode_accuracy
from proto_vision.disc_vs_gen import FrozenFeatures, read_features, write_features
from proto_vision_app.main import APP
from tests.cli_runs import refused


def call(*arguments: str | Path) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def paint(folder: Path) -> Path:
    """Three classes of coloured noise."""
    rng = np.random.default_rng(0)
    for name, colour in {"red": (90, 0, 0), "green": (0, 90, 0), "blue": (0, 0, 90)}.items():
        for n in range(10):
            path = folder / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 160, (8, 9, 3)) + np.array(colour)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("images"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 5, generator=g) + 2 * torch.eye(3, 5)[y]
    write_features(tmp_path / "features.npz", FrozenFeatures(x[:60], y[:60], x[60:], y[60:], ["a", "b", "c"]))
    return tmp_path / "features.npz"


def test_help_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("linear-eval", "--help") == 0
    assert "--samples_per_class" in capsys.readouterr().out


def test_a_file_of_features(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "deep" / "curves.csv", tmp_path / "deep" / "curves.png"
    given = ("--samples_per_class", "1", "4", "20", "--repeats", "3", "--seed", "5", "--eps", "0.01", "--C", "2")
    assert call("linear-eval", "--features", file, *given, "--out", out, "--plot", plot) == 0
    expected = LinearEvaluation([1, 4, 20], repeats=3, seed=5, eps=0.01, C=2.0)(*read_features(file)[:4])
    rows = table(out)
    assert len(rows) == 2 * 3 * 3
    for row, known in zip(rows, expected.rows()):
        assert float(row.pop("accuracy")) == pytest.approx(known.pop("accuracy"))
        assert row == {name: str(value) for name, value in known.items()}
    assert Image.open(plot).format == "PNG"
    text = capsys.readouterr().out
    assert "features.npz: 60 training and 60 test samples, 3 classes, 5 features" in text
    mean, deviation = (f(expected.accuracy["naive_bayes"][:, 1]).item() for f in (torch.mean, torch.std))
    del deviation
    assert f"{mean:.4f} ±" in text
    assert f"written: {plot}" in text


def test_heads_are_fitted_where_there_is_float64(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    given = ("--samples_per_class", "4", "--repeats", "1", "--out", tmp_path / "curves.csv")
    assert call("linear-eval", "--features", file, *given) == 0
    assert len(table(tmp_path / "curves.csv")) == 2


def test_a_backbone_on_a_folder_and_its_features_again(images: Path, tmp_path: Path) -> None:
    source = ("--backbone", "pixels", "--data.root", images, "--data.image_size", "4", "--data.val_fraction", "0.0")
    given = ("--samples_per_class", "1", "5", "--repeats", "2", "--eps", "0.01")
    kept = tmp_path / "kept.npz"
    first, again = tmp_path / "a.csv", tmp_path / "b.csv"
    assert call("linear-eval", *source, *given, "--out", first, "--save_features", kept) == 0
    assert call("linear-eval", "--features", kept, *given, "--out", again) == 0
    assert first.read_text() == again.read_text()
    found = read_features(kept)
    assert found.x_train.shape[1] == 48
    assert found.class_names == ["blue", "green", "red"]
    assert len(found.y_train) + len(found.y_test) == 30
    largest = [float(row["accuracy"]) for row in table(first) if row["samples_per_class"] == "5"]
    assert min(largest) > 0.6


def test_images_that_cannot_be_read_are_listed_beside_the_figures(images: Path, tmp_path: Path) -> None:
    root = shutil.copytree(images, tmp_path / "torn")
    kind = sorted(path for path in root.iterdir() if path.is_dir())[0]
    (kind / "last.png").write_bytes(b"no image")
    source = ("--backbone", "pixels", "--data.root", root, "--data.image_size", "8", "--data.skip_corrupt", "true")
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        assert call("linear-eval", *source, "--repeats", "1", "--out", tmp_path / "out" / "curves.csv") == 0
    assert f"{kind.name}/last.png" in (tmp_path / "out" / "skipped_images.csv").read_text(encoding="utf-8")


def test_the_demo_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ("--backbone", "pixels", "--data.class_path", "proto_vision.Digits", "--data.image_size", "8")
    out = tmp_path / "digits.csv"
    options = ("--samples_per_class", "2", "40", "--repeats", "2")
    assert call("linear-eval", "--config", "disc_vs_gen/demo.yaml", *source, *options, "--out", out) == 0
    ends = {
        (row["head"], row["samples_per_class"]): float(row["accuracy"]) for row in table(out) if row["repeat"] == "0"
    }
    assert ends["logistic_regression", "40"] > ends["naive_bayes", "40"]
    assert "logistic regression is ahead from" in capsys.readouterr().out


def test_a_random_backbone_of_one_seed_is_one_backbone(images: Path, tmp_path: Path) -> None:
    source = ("--backbone", "conv2", "--data.root", images, "--data.image_size", "8", "--data.val_fraction", "0.0")
    out = [tmp_path / f"{n}.csv" for n in range(2)]
    for path in out:
        assert call("linear-eval", *source, "--samples_per_class", "2", "--seed", "3", "--out", path) == 0
    assert out[0].read_text() == out[1].read_text()


def test_a_checkpoint_on_its_data_and_on_another(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = EvalProtoPNetModule("conv3", class_names=["blue", "green", "red"], image_size=8, prototype_channels=6)
    path = tmp_path / "net.ckpt"
    save_checkpoint(net, path)
    kept = read_checkpoint(path)
    data = {"class_path": "proto_vision.ImageFolder", "init_args": {"root": "gone", "image_size": 8}}
    torch.save(kept | {"proto_run": yaml.safe_dump({"data": data})}, path)
    moved = ("--data.root", images)
    assert call("linear-eval", "--ckpt_path", path, *moved, "--repeats", "1", "--out", tmp_path / "a.csv") == 0
    text = capsys.readouterr().out
    assert "evalprotopnet (net.ckpt), ImageFolder" in text
    assert "6 features" in text
    other = ("--data.class_path", "proto_vision.Digits")
    out = tmp_path / "b.csv"
    assert call("linear-eval", "--ckpt_path", path, *other, "--samples_per_class", "1", "--out", out) == 0
    assert "724 training and 896 test samples, 10 classes, 6 features" in capsys.readouterr().out


# -- few-shot episodes


def test_episodes_on_a_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "few.csv"
    given = ("--episodes", "20", "--ways", "3", "--shots", "1", "5", "--queries", "8", "--seed", "2")
    assert call("linear-eval", "--features", file, *given, "--C", "0.5", "--out", out) == 0
    found, text = read_features(file), capsys.readouterr().out
    rows = table(out)
    for row, shots in zip(rows, (1, 5), strict=True):
        options = {"ways": 3, "queries": 8, "episodes": 20, "seed": 2}
        known = episode_accuracy(found.x_test, found.y_test, shots=shots, C=0.5, **options)
        assert (float(row.pop("accuracy")), float(row.pop("half_width"))) == pytest.approx(known[:2])
        options = {"ways": "3", "queries": "8", "classifier": "logistic", "episodes": "20", "shots": str(shots)}
        assert row == options
        assert f"{known.mean:.4f}" in text
        assert f"± {known.half_width:.4f}" in text
    assert "features.npz: 60 test samples, 3 classes, 5 features" in text
    assert f"written: {out}" in text


def test_episodes_of_classes_that_never_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = OPLClassifier("conv3", 6, image_size=8, in_channels=1)
    path = tmp_path / "net.ckpt"
    save_checkpoint(net, path)
    kept = tmp_path / "kept.npz"
    data = ("--data.class_path", "proto_vision.Digits", "--data.image_size", "8", "--data.protocol")
    protocol = '{"class_path": "proto_vision.data.protocols.UnseenClasses", "init_args": {"count": 4}}'
    given = ("--episodes", "10", "--ways", "4", "--classifier", "nearest_mean")
    first, again = tmp_path / "a.csv", tmp_path / "b.csv"
    source = ("--ckpt_path", path, *data, protocol)
    assert call("linear-eval", *source, *given, "--save_features", kept, "--out", first) == 0
    text = capsys.readouterr().out
    assert "opl (net.ckpt), Digits: " in text
    assert "4 classes, 128 features" in text
    assert "10 episodes, nearest mean" in text
    assert call("linear-eval", "--features", kept, *given, "--out", again) == 0
    assert first.read_text() == again.read_text()
    (row,) = table(first)
    assert (row["shots"], row["queries"]) == ("1", "15")
    assert float(row["accuracy"]) > 0.4
    source = ("--backbone", "pixels", *data, protocol)
    assert call("linear-eval", *source, *given, "--shots", "5", "--out", first) == 0
    assert float(table(first)[0]["accuracy"]) > 0.7


@pytest.mark.bad_input
def test_bad_episodes_are_one_short_message(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str | Path) -> None:
        assert call("linear-eval", "--features", file, *arguments, "--out", tmp_path / "c.csv") == 2

    fails("--shots", "5", "--classifier", "logistic")
    refused(capsys, "--shots, --classifier: for episodes, needed --episodes")
    fails("--episodes", "5", "--plot", tmp_path / "x.png", "--repeats", "2")
    refused(capsys, "--plot, --repeats: for learning curves, not --episodes")
    fails("--episodes", "0")
    refused(capsys, "episodes: found 0")
    fails("--episodes", "5", "--shots", "1", "0")
    refused(capsys, "shots: found 0")
    fails("--episodes", "5")
    refused(capsys, "found 3 classes, needed at least n_way = 5")
    fails("--episodes", "5", "--ways", "2", "--shots", "1", "10")
    refused(capsys, "found 20 samples of class 0, needed 25")
    assert not (tmp_path / "c.csv").exists()


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(
    images: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "c.csv")

    def fails(*arguments: str | Path) -> None:
        assert call("linear-eval", *arguments, *out) == 2

    fails()
    refused(capsys, "found none", "--features, --ckpt_path and --backbone")
    fails("--features", file, "--backbone", "pixels")
    refused(capsys, "found --features and --backbone")
    fails("--features", tmp_path / "none.npz")
    refused(capsys, "none.npz")
    fails("--features", file, "--samples_per_class", "50")
    refused(capsys, "samples_per_class", "50", "needed 20 at most")
    fails("--features", file, "--repeats", "0")
    refused(capsys, "repeats: found 0")
    fails("--features", file, "--plot", "x.jpg")
    refused(capsys, "--plot", ".png or .svg")
    fails("--features", file, "--config", "unpg/demo.yaml")
    refused(capsys, "unpg/demo.yaml", "no LinearEvaluation")
    fails("--backbone", "pixels")
    refused(capsys, "--data", "--data.root")
    fails("--backbone", "resnet1000", "--data.root", images, "--data.image_size", "8")
    refused(capsys, "resnet1000")
    fails("--backbone", "pixels", "--data.root", images, "--data.size", "8")
    refused(capsys, "--data", "size")
    fails("--backbone", "pixels", "--data.root", tmp_path / "nowhere")
    refused(capsys, "nowhere")
    fails("--ckpt_path", tmp_path / "none.ckpt")
    refused(capsys, "none.ckpt")
    assert not (tmp_path / "c.csv").exists()
