"""The programs for the people who work on Proto: a skeleton, the table of claims, the table of benchmarks."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from proto_core.systems import Paper
from tools import bench, claims, new_system

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = {"alpha": "Alpha is better.", "beta": "Beta is better."}


# -- new_system


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What the scaffold reads and changes, without the code."""
    files = ["pyproject.toml", "README.md", "shared/pyproject.toml", "shared/README.md", "tools/shape_checks.py"]
    files += ["packages/proto-ecg/pyproject.toml", "packages/proto-ecg/README.md", "apps/ecg/pyproject.toml"]
    files += ["packages/proto-ecg/src/proto_ecg/__init__.py", "shared/src/proto_core/__init__.py"]
    files += [f"shared/src/proto_core/{name}" for name in ("losses/__init__.py", "systems.py", "cli/__init__.py")]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def tree(root: Path) -> dict[str, str]:
    """Every file and its text."""
    return {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for path in root.rglob("*")
        if path.is_file() and ".ruff_cache" not in path.parts
    }


def scaffold(root: Path, *arguments: str) -> int:
    return new_system.main([*arguments, "--root", str(root)])


def entry_points(root: Path, member: str) -> dict[str, str]:
    project = tomllib.loads((root / member / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["entry-points"]["proto.systems"]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"skeleton_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lint(root: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", str(root)],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "method", "inputs"),
    [("module", "forward", (None,)), ("loss", "forward", (None, None)), ("analysis", "fit", (None, None))],
)
@pytest.mark.bad_input
def test_a_skeleton_passes_lint_and_says_what_to_fill_in(workspace, kind, method, inputs):
    before = tree(workspace)
    assert scaffold(workspace, "gamma_net", "--package", "proto-ecg", "--kind", kind, "--class-name", "GammaNET") == 0
    made = set(tree(workspace)) - set(before)
    assert made == {
        "packages/proto-ecg/src/proto_ecg/gamma_net.py",
        "packages/proto-ecg/tests/test_gamma_net.py",
        "packages/proto-ecg/claims/test_gamma_net.py",
        "apps/ecg/src/proto_ecg_app/configs/gamma_net/demo.yaml",
        "apps/ecg/src/proto_ecg_app/configs/gamma_net/paper.yaml",
    }
    assert all("FILL IN" in tree(workspace)[name] for name in made)
    assert entry_points(workspace, "packages/proto-ecg") == {
        **entry_points(ROOT, "packages/proto-ecg"),
        "gamma_net": "proto_ecg.gamma_net:GammaNET",
    }
    assert list(keys := entry_points(workspace, "packages/proto-ecg")) == sorted(keys)
    for readme in ("README.md", "packages/proto-ecg/README.md"):
        rows = [line for line in tree(workspace)[readme].splitlines() if line not in before[readme].splitlines()]
        assert len(rows) == 1
        assert rows[0].startswith("| `gamma_net` | FILL IN")
    lint(workspace)
    system = load(workspace / "packages/proto-ecg/src/proto_ecg/gamma_net.py").GammaNET
    assert isinstance(system.paper, Paper)
    assert "FILL IN" in system.paper.title
    built = system(3) if kind == "module" else system()
    with pytest.raises(RuntimeError, match="FILL IN: GammaNET"):
        getattr(built, method)(*inputs)
    claim = load(workspace / "packages/proto-ecg/claims/test_gamma_net.py")
    with pytest.raises(pytest.fail.Exception, match="FILL IN"):
        claim.test_gamma_net(lambda *figures: None)


def test_types_of_the_skeletons_are_complete(workspace):
    for kind in new_system.KINDS:
        assert scaffold(workspace, f"a_{kind}", "--package", "proto-ecg", "--kind", kind) == 0
    files = [f"packages/proto-ecg/src/proto_ecg/a_{kind}.py" for kind in new_system.KINDS]
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--ignore-missing-imports", "--cache-dir="]
    command += ["--disable-error-code=name-defined"]  # shapes such as " N", where jaxtyping is not looked into
    done = subprocess.run([*command, *files], cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_loss_goes_into_a_room_of_the_core(workspace):
    assert scaffold(workspace, "omega", "--package", "proto-core", "--room", "losses", "--kind", "loss") == 0
    assert entry_points(workspace, "shared")["omega"] == "proto_core.losses.omega:Omega"
    found = tree(workspace)
    assert {
        "shared/src/proto_core/losses/omega.py",
        "shared/tests/test_omega.py",
        "shared/claims/test_omega.py",
    } <= set(found)
    assert "from proto_core.losses.omega import Omega" in found["shared/tests/test_omega.py"]
    assert found["shared/README.md"].count("| `omega` |") == 1
    assert not [name for name in found if "configs" in name]
    lint(workspace)


def test_a_new_package_is_known_everywhere(workspace, capsys):
    before = tree(workspace)
    assert scaffold(workspace, "delta", "--package", "proto-quux") == 2
    assert "--new-package" in capsys.readouterr().err
    assert tree(workspace) == before
    assert scaffold(workspace, "delta", "--package", "proto-quux", "--new-package") == 0
    root = tomllib.loads((workspace / "pyproject.toml").read_text(encoding="utf-8"))
    old = tomllib.loads(before["pyproject.toml"])
    assert root["project"]["dependencies"] == [*old["project"]["dependencies"], "proto-quux", "proto-quux-app"]
    assert {"proto-quux", "proto-quux-app"} <= set(root["tool"]["uv"]["sources"])
    for key in ("files", "mypy_path"):
        assert root["tool"]["mypy"][key][-2:] == ["packages/proto-quux/src", "apps/quux/src"]
    linter = root["tool"]["importlinter"]
    assert linter["root_packages"][-2:] == ["proto_quux", "proto_quux_app"]
    layers = next(contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers")
    assert [layer.split(" | ")[-1] for layer in layers] == ["proto_quux_app", "proto_quux", "proto_core"]
    app = tomllib.loads((workspace / "apps/quux/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert app["scripts"] == {"proto-quux": "proto_quux_app.main:main"}
    assert entry_points(workspace, "packages/proto-quux") == {"delta": "proto_quux.delta:Delta"}
    assert load(workspace / "apps/quux/src/proto_quux_app/main.py").APP.package == "proto-quux"
    assert load(workspace / "tools/shape_checks.py").CHECKED[-1] == "proto_quux"
    assert tree(workspace)["README.md"].count("(packages/proto-quux/README.md)") == 1
    lint(workspace)
    assert scaffold(workspace, "epsilon_of_quux", "--package", "proto-quux") == 0
    lint(workspace)
    kept = tree(workspace)
    assert scaffold(workspace, "zeta", "--package", "proto-quux", "--new-package") == 2
    assert tree(workspace) == kept


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["Upper", "--package", "proto-ecg"], "NAME: found 'Upper'"),
        (["3d", "--package", "proto-ecg"], "NAME: found '3d'"),
        (["lambda", "--package", "proto-ecg"], "NAME: found 'lambda'"),
        (["utils", "--package", "proto-ecg"], "NAME: found 'utils'"),
        (["../x", "--package", "proto-ecg"], "NAME: found '../x'"),
        (["protoecgnet", "--package", "proto-core"], "already declared by proto-ecg"),
        (["fine", "--package", "proto-ecg", "--class-name", "not a class"], "--class-name: found 'not a class'"),
        (["fine", "--package", "vision"], "--package: found 'vision'"),
        (["fine", "--package", "proto-ecg", "--room", "losses"], "--room: found 'losses', but only proto-core"),
        (["fine", "--package", "proto-core", "--room", "attic"], "there are cli, losses"),
    ],
)
def test_bad_names_are_refused(workspace, capsys, arguments, reason):
    before = tree(workspace)
    assert scaffold(workspace, *arguments) == 2
    assert reason in capsys.readouterr().err
    assert tree(workspace) == before


def test_nothing_is_overwritten(workspace, capsys):
    assert scaffold(workspace, "eta", "--package", "proto-ecg") == 0
    before = tree(workspace)
    assert scaffold(workspace, "eta", "--package", "proto-ecg") == 2
    assert "already declared" in capsys.readouterr().err
    (workspace / "packages/proto-ecg/src/proto_ecg/theta").mkdir()
    assert scaffold(workspace, "theta", "--package", "proto-ecg") == 2
    assert "is there already" in capsys.readouterr().err
    own = workspace / "packages/proto-ecg/README.md"
    own.write_text(own.read_text(encoding="utf-8").replace("| system |", "| method |"), encoding="utf-8")
    (workspace / "README.md").write_text("# Proto\n", encoding="utf-8")
    before |= {name: tree(workspace)[name] for name in ("README.md", "packages/proto-ecg/README.md")}
    assert scaffold(workspace, "iota", "--package", "proto-ecg") == 2
    assert "found no table" in capsys.readouterr().err
    assert tree(workspace) == before


def test_an_error_while_writing_takes_everything_back(workspace, monkeypatch, capsys):
    before = tree(workspace)
    real, count = new_system.atomic_write, iter(range(100))

    def full(path: Path) -> Any:
        if next(count) == 6:
            raise OSError("no space left on device")
        return real(path)

    monkeypatch.setattr(new_system, "atomic_write", full)
    assert scaffold(workspace, "kappa", "--package", "proto-quux", "--new-package") == 2
    assert "no space left" in capsys.readouterr().err
    assert tree(workspace) == before
    assert not (workspace / "packages/proto-quux").exists()


def test_arrays_keep_their_form():
    pattern = r"^a\s*=\s*"
    assert new_system.append_to_array('a = ["x[y]"] # z\n', pattern, ["b"]) == 'a = ["x[y]", "b"] # z\n'
    assert new_system.append_to_array("a = []\n", pattern, ["b", "c"]) == 'a = ["b", "c"]\n'
    long = f'a = ["{"x" * 100}"]\n'
    assert new_system.append_to_array(long, pattern, ["b" * 20]) == f'a = [\n    "{"x" * 100}",\n    "{"b" * 20}",\n]\n'
    many = 'a = [\n    "x", # ]\n    "y"\n]\n'
    assert new_system.append_to_array(many, pattern, ["b"]) == 'a = [\n    "x", # ]\n    "y",\n    "b",\n]\n'
    with pytest.raises(ValueError, match="found no array"):
        new_system.append_to_array("b = []\n", pattern, ["c"])


# -- claims


def figure(key: str, metric: str, holds: bool, test: str, **more: Any) -> dict[str, Any]:
    record = {"method": [0.70, 0.72, 0.74], "baseline": [0.5], "margin": "larger", "seconds": 12.3}
    return record | {"key": key, "metric": metric, "holds": holds, "test": test} | more


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.70, 0.72, 0.74], "0.720 ± 0.020 (n = 3)"),
        ([1.0, 2.0], "1.50 ± 0.71 (n = 2)"),
        ([100.0, 300.0, 500.0], "300 ± 200 (n = 3)"),
        ([0.25], "0.25 (n = 1)"),
        ([0.1, 0.1, 0.1], "0.1 ± 0 (n = 3)"),
        ([1e-9, 3e-9], "2e-09 ± 1.4e-09 (n = 2)"),
        ([float("nan"), 1.0], "nan (n = 2)"),
        ([], "–"),
    ],
)
def test_mean_and_spread(values, text):
    assert claims.mean_and_spread(values) == text


def test_verdicts_come_from_figures_and_from_tests_that_crashed():
    folder = "packages/proto-x/claims"
    records = [
        figure("alpha", "auc | f1", True, f"{folder}/test_alpha.py::test_one"),
        figure("alpha", "gap", False, f"{folder}/test_alpha.py::test_two[3]"),
    ]
    tests = [
        claims.Outcome(f"{folder}/test_alpha.py", "test_one", "passed", 1.0, ""),
        claims.Outcome(f"{folder}/test_alpha.py", "test_two[3]", "failed", 1.0, "AssertionError"),
        claims.Outcome(f"{folder}/test_beta.py", "test_three", "failed", 4.4, "RuntimeError: a|b"),
    ]
    rows = claims.rows_of(records, tests, SENTENCES, "abc1234")
    assert [(row.key, row.verdict, row.seconds) for row in rows] == [
        ("alpha", "holds", "12"),
        ("alpha", "does not hold", "12"),
        ("beta", "error", "4"),
    ]
    assert rows[0].method == "0.720 ± 0.020 (n = 3)"
    assert rows[2].metric == "test_three: RuntimeError: a|b"
    text = claims.page(rows, "abc1234", date(2026, 1, 2))
    assert "Last run: 2026-01-02, commit abc1234. holds: 1, does not hold: 1, error: 1, not run: 0." in text
    assert "| auc \\| f1 | 0.720 ± 0.020 (n = 3) | 0.5 (n = 1) | larger | holds | 12 | abc1234 |" in text
    assert claims.read_page(text) == rows
    after = claims.rows_of(records[:1], [claims.Outcome(tests[0].file, "test_one", "failed", 1.0, "x")], SENTENCES, "a")
    assert [row.verdict for row in after] == ["holds", "error"]


def test_the_page_reads_back_what_it_wrote():
    row = claims.Row("alpha", "a \\ b\n c", "x|y\\|z", "1", "2", "[3](4)", "holds", "5", "abc + changes")
    assert claims.read_page(claims.page([row], "abc", date(2026, 1, 2))) == [row]
    assert (row.claim, row.margin) == ("a \\ b c", "[3] (4)")
    with pytest.raises(ValueError, match=r"CLAIMS.md:2: found 2 cells"):
        claims.read_page("# Claims\n| `alpha` | b |\n")


def test_a_partial_run_keeps_the_rows_of_the_others():
    def row(key: str, metric: str, commit: str, verdict: str = "holds") -> claims.Row:
        return claims.Row(key, SENTENCES[key], metric, "1", "2", "3", verdict, "4", commit)

    old = [row("alpha", "auc", "old"), row("alpha", "gap", "old"), row("beta", "f1", "old")]
    new = [row("alpha", "auc", "new")]

    def merged(unfinished: set[str], whole: bool) -> list[tuple[str, str, str]]:
        rows = claims.merge(new, old, SENTENCES, unfinished=unfinished, whole=whole)
        return [(one.key, one.metric, one.commit) for one in rows]

    assert merged(set(), False) == [("alpha", "auc", "new"), ("beta", "f1", "old")]
    assert merged({"alpha"}, False) == [("alpha", "auc", "new"), ("alpha", "gap", "old"), ("beta", "f1", "old")]
    assert merged(set(), True) == [("alpha", "auc", "new"), ("beta", "–", "–")]
    missing = claims.merge(new, [], SENTENCES, unfinished=set(), whole=True)[1]
    assert (missing.key, missing.claim, missing.verdict) == ("beta", "Beta is better.", "not run")
    crashed = [row("alpha", "test_a: x", "old", "error")]
    assert len(claims.merge(new, crashed, SENTENCES, unfinished={"alpha"}, whole=False)) == 2  # and beta, not run


CLAIM = """
import pytest

pytestmark = pytest.mark.claim

def test_figure(claim_record):
    claim_record("alpha", metric="auc", method=[0.7, 0.72, 0.74], baseline=[0.5], margin="larger", holds=True)

def test_data_that_is_not_here(claim_record):
    pytest.skip("no data")
"""


def test_claims_from_end_to_end(tmp_path, monkeypatch, capfd):
    for name in ("alpha", "beta"):
        file = tmp_path / "packages/proto-x/claims" / f"test_{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        crash = "import pytest\n@pytest.mark.claim\ndef test_crash():\n    raise RuntimeError('out of memory')\n"
        file.write_text(CLAIM if name == "alpha" else crash, encoding="utf-8")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(claims, "sentences", lambda: SENTENCES | {"gamma": "Gamma is better."})
    monkeypatch.delenv("PROTO_SHAPE_CHECKS", raising=False)
    assert claims.main(["--root", str(tmp_path), "alpha"]) == 0
    shown = capfd.readouterr().out
    assert "test_alpha.py::test_figure PASSED" in shown
    assert "alpha: auc: 0.720 ± 0.020 (n = 3) against 0.5 (n = 1): holds" in shown
    page = tmp_path / "CLAIMS.md"
    assert [row.verdict for row in claims.read_page(page.read_text("utf-8"))] == ["holds", "not run", "not run"]
    assert claims.main(["--root", str(tmp_path), "beta"]) == 1
    rows = claims.read_page(page.read_text("utf-8"))
    assert [(row.key, row.verdict) for row in rows] == [("alpha", "holds"), ("beta", "error"), ("gamma", "not run")]
    assert rows[1].metric == "test_crash: RuntimeError: out of memory"
    with pytest.raises(SystemExit):
        claims.main(["--root", str(tmp_path), "delta"])
    assert "those are alpha, beta" in capfd.readouterr().err


def test_all_files_of_a_system_run_and_one_of_them_leaves_the_rows_of_the_others(tmp_path, monkeypatch, capfd):
    places = (
        "shared/claims/test_alpha",
        "packages/proto-x/claims/test_alpha",
        "packages/proto-x/claims/test_alpha_far",
    )
    for number, place in enumerate(places):
        file = tmp_path / f"{place}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CLAIM.replace("auc", f"auc {number}").partition("def test_data")[0], encoding="utf-8")
    (tmp_path / "packages/proto-x/claims/test_alpha_beta.py").write_text("", encoding="utf-8")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(claims, "sentences", lambda: SENTENCES)
    monkeypatch.setattr(claims, "catalogue", lambda: {"alpha": None, "alpha_beta": None})
    monkeypatch.delenv("PROTO_SHAPE_CHECKS", raising=False)
    assert [str(file.relative_to(tmp_path)) for file in claims.files_of(tmp_path, "alpha")] == [
        f"{place}.py" for place in places
    ]
    for asked in ("alpha", str(tmp_path / f"{places[2]}.py")):
        assert claims.main(["--root", str(tmp_path), asked]) == 0
        rows = claims.read_page((tmp_path / "CLAIMS.md").read_text("utf-8"))
        assert sorted(row.metric for row in rows if row.key == "alpha") == ["auc 0", "auc 1", "auc 2"]
    assert "1 of 4 rows are new" in capfd.readouterr().out
    far = tmp_path / f"{places[2]}.py"
    for more, expected in (
        ("pytest.skip('no data')", "auc 2"),
        ("raise RuntimeError('x')", "test_figure: RuntimeError: x"),
    ):
        far.write_text(f"import pytest\n@pytest.mark.claim\ndef test_figure():\n    {more}\n", encoding="utf-8")
        claims.main(["--root", str(tmp_path), "alpha"])
        rows = claims.read_page((tmp_path / "CLAIMS.md").read_text("utf-8"))
        assert [row.metric for row in rows if row.key == "alpha"] == ["auc 0", "auc 1", expected]


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path):
    file = tmp_path / "claims.jsonl"
    file.write_text(json.dumps({"key": "alpha"}) + '\n{"key": "be', encoding="utf-8")
    assert claims.read_records(file) == [{"key": "alpha"}]
    assert claims.read_outcomes(tmp_path / "none.xml") == []


def test_the_commit_says_whether_the_tree_has_changes(tmp_path):
    assert claims.commit_of(tmp_path / "nowhere") == "unknown"
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "CLAIMS.md").write_text("x", encoding="utf-8")
    clean = claims.commit_of(tmp_path)
    assert len(clean) >= 7
    assert "+" not in clean
    (tmp_path / "a.py").write_text("x", encoding="utf-8")
    assert claims.commit_of(tmp_path) == f"{clean} + changes"


# -- bench


def timed(name: str, median: float, group: str | None = "loss", **extra: Any) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "fullname": f"tools/benchmarks/x/test_x.py::{name}",
        "stats": {"median": median, "min": median / 2},
        "extra_info": extra,
    }


RESULT = {
    "machine_info": {"cpu": {"brand_raw": "Chip 9"}, "python_version": "3.11.7"},
    "commit_info": {"id": "0123456789", "dirty": True},
    "datetime": "2026-01-02T03:04:05",
    "benchmarks": [
        timed("test_cluster_reference", 0.050),
        timed("test_cluster_proto", 0.010, rate=7),
        timed("test_cluster_dense", 0.005),
        timed("test_step_proto[a_b]", 2.0, "step"),
        timed("test_step_reference[a_b]", 3.0, "step"),
        timed("test_step_proto[c]", 1.0, "step"),
        timed("test_network_proto", 1e-6, "peer"),
        timed("test_torchmetrics", 4e-6, "peer"),
        timed("test_explain_proto", 0.25, None),
        timed("test_alone", 2e-8, "one|two"),
    ],
}


def test_ratios_of_partners():
    found = {(line.name, line.against): line for line in bench.compare(RESULT["benchmarks"])}
    assert {key: line.ratio for key, line in found.items()} == {
        ("cluster", "reference"): pytest.approx(5.0),
        ("cluster", "dense"): pytest.approx(0.5),
        ("step[a_b]", "reference"): pytest.approx(1.5),
        ("network", "torchmetrics"): pytest.approx(4.0),
        ("step[c]", ""): None,
        ("explain", ""): None,
        ("alone", ""): None,
    }
    assert found["explain", ""].cells()[2:6] == ("–", "250 ms", "–", "–")
    assert found["explain", ""].group == "tools/benchmarks/x/test_x.py"
    assert found["cluster", "dense"].notes == "rate 7 (ours)"


def test_the_table_of_benchmarks_is_printed_and_written(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(RESULT), encoding="utf-8")
    page = tmp_path / "table.md"
    assert bench.main(["--json", str(tmp_path / "run.json"), "--markdown", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "step[a_b]" in shown
    assert "Chip 9, Python 3.11.7, commit 0123456 + changes, 2026-01-02" in shown
    text = page.read_text(encoding="utf-8")
    assert "| loss | cluster | reference | 10 ms | 50 ms | 5.00 | rate 7 (ours) |" in text
    assert "| one\\|two | alone | – | – | 20 ns | – | – |" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (12.345, "12.3 s"), (1234.5, "1234 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs")]
)
def test_durations(seconds, text):
    assert bench.duration(seconds) == text
