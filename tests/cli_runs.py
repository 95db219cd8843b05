"""How the tests of the command line call it, and what they read from its files."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb

from proto_core.cli import main
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg_app.main import APP

DEMO = ["--config", "protoecgnet/demo.yaml"]
TINY = [
    *("--model.rhythm.prototypes_per_class", "1", "--model.rhythm.proto_dim", "8"),
    *("--model.morphology.prototypes_per_class", "1", "--model.morphology.proto_dim", "8"),
    *("--model.diffuse.prototypes_per_class", "1", "--model.diffuse.proto_dim", "8"),
    *("--model.schedule.joint_epochs", "1", "--model.schedule.classifier_epochs", "1"),
    *("--model.schedule.fusion_epochs", "1"),
]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]


@dataclass(frozen=True)
class Run:
    """The shared run: its data in PTB-XL's layout, its folder and its last checkpoint."""

    data: Path
    root: Path
    checkpoint: Path


class Killed(BaseException):
    """Ends a run as a kill does: nothing is tidied up."""


def call(*arguments: str | Path) -> int:
    """The exit status of a command line."""
    try:
        return main(APP, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def fit(data: Path, root: Path, *more: str | Path) -> int:
    source = ["--data", "proto_ecg.PTBXL", "--data.root", data, "--data.decode_workers", "1", "--data.quiet", "true"]
    return call("fit", *DEMO, *source, *TINY, *QUIET, "--trainer.default_root_dir", root, *more)


def refused(capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """What the command said on stderr: one short error with these parts in it."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    message = text[text.index("error: ") :]
    assert len(message.splitlines()) <= 3
    for part in parts:
        assert part in message, message
    return message


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def sums(html: str) -> list[tuple[list[float], float]]:
    """For each label the printed terms (bias, prototypes, others) and the printed sum."""
    found = []
    for table in re.findall(r'<table class="sum">.*?</table>', html, flags=re.DOTALL):
        lines = re.findall(r'<tr>\s*<th scope="row">(.*?)</th>.*?class="n strong">(.*?)</td>', table, flags=re.DOTALL)
        values = [(name, float(value.replace("−", "-"))) for name, value in lines]
        assert values[0][0] == "Bias"
        assert values[-1][0] == "Sum = logit"
        found.append(([value for _, value in values[:-1]], values[-1][1]))
    return found


def self_contained(html: str) -> None:
    bare = html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.search(r"https?://|<script|<link|@import|javascript:", bare) is None
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', html))


def archive(root: Path, count: int = 24, *, leads: Sequence[str] = STANDARD_LEADS[::-1]) -> Path:
    """Records of 11 s at 250 Hz, leads backwards, three labels; every third record is in each fold's turn."""
    generator = np.random.default_rng(0)
    time = np.arange(2750) / 250
    lines = ["record,fold,AMYLOID,<b>ODD</b>,RARE"]
    for k in range(count):
        signal = np.sin(2 * np.pi * time[:, None] * (1 + np.arange(12) + k % 2)) + generator.normal(0, 0.1, (2750, 12))
        (root / "ecg").mkdir(parents=True, exist_ok=True)
        signal = signal[:, : len(leads)]
        options = {"fmt": ["16"] * len(leads), "adc_gain": [1000] * len(leads), "baseline": [0] * len(leads)}
        wfdb.wrsamp(f"r{k}", 250, ["mV"] * len(leads), list(leads), signal, write_dir=str(root / "ecg"), **options)
        fold = ("train", "train", "val", "test")[k // 2 % 4]
        lines.append(f"ecg/r{k},{fold},{k % 2},{1 - k % 2},0")
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def fit_archive(root: Path, out: Path, *more: str | Path) -> int:
    source = ["--data", "proto_ecg.ECGArchive", "--data.root", root, "--data.csv", "labels.csv"]
    quiet = ["--data.decode_workers", "1", "--data.quiet", "true"]
    stages = ["--curriculum.only", "[rhythm,fusion]"]
    return call("fit", *DEMO, *source, *quiet, *TINY, *QUIET, *stages, "--trainer.default_root_dir", out, *more)
