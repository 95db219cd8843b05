"""One small run of ``proto-ecg fit`` for all tests of the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from proto_ecg import GeneratedECG
from tests.cli_runs import Run, fit


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command_line(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the tests' own, and a process without arguments that LightningCLI would warn about."""
    monkeypatch.setenv("PROTO_CACHE", str(_cache))
    monkeypatch.setattr(sys, "argv", ["proto-ecg"])


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, _cache: Path) -> Run:
    """A finished run on 60 generated records in PTB-XL's layout."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTO_CACHE", str(_cache))
        patch.setattr(sys, "argv", ["proto-ecg"])
        data = GeneratedECG(60, seed=5, keep_data=folder / "data", quiet=True).write_files()
        assert fit(data, folder / "run") == 0
    return Run(data, folder / "run", folder / "run/checkpoints/final.ckpt")


@pytest.fixture(scope="session")
def test_ids(run: Run) -> list[str]:
    """Record ids of the test fold of the run's data."""
    table = pd.read_csv(run.data / "ptbxl_database.csv")
    return table.loc[table.strat_fold == 10, "filename_lr"].tolist()
