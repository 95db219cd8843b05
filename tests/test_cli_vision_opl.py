"""OPL's other experiments: their configs are accepted; RFS's way from pickles to few-shot accuracy, by commands."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml

from proto_core.cli import instantiate, main
from proto_core.cli.training import ProtoCLI
from proto_core.training import enter_stage
from proto_vision import CIFAR, FewShotImages, OPLClassifier
from proto_vision_app.main import APP


class Parse(ProtoCLI):
    def instantiate_classes(self) -> None:
        """Only parse."""


@pytest.mark.parametrize(
    ("name", "source", "width", "classification", "says"),
    [
        ("few_shot", FewShotImages, 640, "cross_entropy", (100, 0.05, (60, 80), 0.1)),
        ("label_noise", CIFAR, 512, "truncated", (120, 0.01, (40, 80), 0.1)),
    ],
)
def test_configs_are_accepted(name, source, width, classification, says, tmp_path):
    path = APP.configs / "opl" / f"{name}.yaml"
    Parse(args=["--config", str(path)], run=False, save_config_callback=None)
    settings, demo = (yaml.safe_load(file.read_text("utf-8")) for file in (path, path.with_name("demo.yaml")))
    assert settings["data"]["class_path"].rpartition(".")[2] == source.__name__
    merged = tmp_path / "on-demo-data.yaml"
    merged.write_text(yaml.safe_dump({"model": settings["model"], "data": demo["data"]}), encoding="utf-8")
    net, _ = instantiate(merged, [])
    assert (type(net), net.head.in_features, net.classification) == (OPLClassifier, width, classification)
    (stage,) = net.stages
    assert (stage.max_epochs, stage.lr, tuple(stage.milestones), stage.gamma) == says
    enter_stage(net, stage)


def pickled(root: Path) -> Path:
    """Base classes 0 to 2 and new classes 7 to 9, each a grey value with noise."""
    rng = np.random.default_rng(0)
    for name, classes in {"train_phase_train": (0, 1, 2), "test": (7, 8, 9)}.items():
        labels = np.repeat(classes, 12)
        pixels = rng.integers(0, 40, (len(labels), 12, 12, 3)) + 20 * labels[:, None, None, None]
        part = {"data": pixels.astype(np.uint8), "labels": labels.tolist()}
        (root / f"miniImageNet_category_split_{name}.pickle").write_bytes(pickle.dumps(part, protocol=2))
    return root


def test_from_pickles_to_few_shot_accuracy(tmp_path, capsys):
    root = pickled(tmp_path)
    schedule = ("--model.schedule.epochs", "2", "--model.schedule.milestones", "[1]")
    smaller = (
        "--model.backbone",
        "conv3",
        "--data.image_size",
        "8",
        "--data.batch_size",
        "8",
        "--data.num_workers",
        "0",
    )
    place = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "run", "--trainer.accelerator", "cpu")
    given = ("fit", "--config", "opl/few_shot.yaml", *schedule, *smaller, *place, "--data.augment", "flip")
    main(APP, [str(part) for part in given])
    capsys.readouterr()
    checkpoint, out = tmp_path / "run" / "checkpoints" / "final.ckpt", tmp_path / "few.csv"
    asked = ("--episodes", "20", "--ways", "3", "--shots", "1", "5", "--queries", "6")
    main(APP, ["linear-eval", "--ckpt_path", str(checkpoint), *asked, "--out", str(out)])
    assert "opl (final.ckpt), FewShotImages: 36 test samples, 3 classes, 128 features" in capsys.readouterr().out
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["shots"] for row in rows] == ["1", "5"]
    assert all(0.34 < float(row["accuracy"]) <= 1 for row in rows)
