"""Test settings of the whole workspace: real data by environment variable, run-time shape checks, quiet trainers."""

import inspect
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch is imported; the cores are shared out
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

if os.environ.get("PROTO_SHAPE_CHECKS") == "1":
    import tools.shape_checks

    tools.shape_checks.switch_on()

ROOT = Path(__file__).resolve().parent
MOST_WORKERS = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core; none where time is measured, where a GPU is shared or where few tests are asked for."""
    options = config.option
    measured = options.benchmark_only or re.search(r"(?<!not )\b(claim|gpu)\b", options.markexpr)
    few = options.keyword or options.collectonly or any("::" in argument for argument in config.args)
    return 0 if measured or few else min(os.cpu_count() or 1, MOST_WORKERS)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden arrays; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PROTO_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"golden arrays are not at {folder} (set PROTO_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of the real data excerpts; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PROTO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data excerpts are not at {folder} (set PROTO_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def ptbxl_500(test_data: Path) -> Path:
    """The PTB-XL excerpt of 500 records."""
    folder = test_data / "ptbxl-500"
    if not folder.is_dir():
        pytest.skip(f"no PTB-XL excerpt at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _shape_checks(request: pytest.FixtureRequest):
    """With PROTO_SHAPE_CHECKS=1 annotations are checked in every test but those that feed wrong input.

    A test that looks for an error (``pytest.raises`` in its source, or the marker ``bad_input``) wants the library's
    own message, not the checker's. Tests marked ``unchecked`` are left to a run without the check.
    """
    if os.environ.get("PROTO_SHAPE_CHECKS") != "1":
        yield
        return
    from jaxtyping import config

    if request.node.get_closest_marker("unchecked"):
        pytest.skip("measures time or compiles: `pytest -m unchecked` runs it without the check of annotations")
    function = getattr(request, "function", None)
    source = inspect.getsource(function) if inspect.isfunction(function) else ""
    if "pytest.raises" not in source and not request.node.get_closest_marker("bad_input"):
        yield
        return
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def claim_record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it as ``claim_record(key, metric=, method=, baseline=, margin=, holds=)``, once per figure of a claim.

    ``method`` and ``baseline`` are one number per seed; ``margin`` says in words what was asked. The record is one JSON
    line in the file that ``PROTO_CLAIMS_FILE`` names (``tools/claims.py`` sets it); without it nothing is written.
    ``seconds`` counts from the start of the test.
    """
    start = time.perf_counter()

    def record(
        key: str, *, metric: str, method: Sequence[float], baseline: Sequence[float], margin: str, holds: bool
    ) -> None:
        file = os.environ.get("PROTO_CLAIMS_FILE")
        if not file:
            return
        line = {
            "key": key,
            "metric": metric,
            "method": [float(value) for value in method],
            "baseline": [float(value) for value in baseline],
            "margin": margin,
            "holds": bool(holds),
            "test": request.node.nodeid,
            "seconds": round(time.perf_counter() - start, 1),
        }
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    return record
