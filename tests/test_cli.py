"""``proto-ecg`` from end to end, in process: one small run on records in PTB-XL's layout serves most tests."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from proto_core.cli.export import export_onnx
from proto_core.training import Curriculum
from proto_ecg import GeneratedECG, ProtoECGNet
from tests.cli_runs import (
    QUIET,
    Killed,
    Run,
    archive,
    call,
    fit,
    fit_archive,
    rows,
    self_contained,
    sums,
    weights,
)

pytestmark = pytest.mark.usefixtures("command_line")


def test_help_version_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("demo", "fit", "validate", "test", "predict", "explain", "phenotypes", "export", "list"):
        assert re.search(rf"^  {command} ", text, flags=re.MULTILINE)
    assert "protoecgnet/paper.yaml" in text
    assert call("--version") == 0
    assert re.fullmatch(r"proto-ecg \d+\.\d+\S*\n", capsys.readouterr().out)
    assert call("list", "--names") == 0
    assert "protoecgnet\n" in capsys.readouterr().out
    assert call("list") == 0
    text = capsys.readouterr().out
    assert "2504.08713" in text
    assert "2025" in text


@pytest.mark.parametrize("command", ["demo", "explain", "phenotypes", "export", "list", "fit", "test", "predict"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"proto-ecg {command}" in re.sub(r" \[options\]", "", capsys.readouterr().out)


def test_fit_leaves_one_set_of_checkpoints_and_tells_its_stages(run: Run) -> None:
    stages = {f"{branch}.{part}" for branch in ("rhythm", "morphology", "diffuse") for part in ("joint", "classifier")}
    names = {path.name for path in run.root.rglob("*.ckpt")}
    assert names == {f"{name}.ckpt" for name in stages | {"fusion", "last", "final"}}
    net = ProtoECGNet.from_checkpoint(run.checkpoint)
    table = pd.read_csv(run.data / "ptbxl_database.csv")
    training = set(table.loc[table.strat_fold <= 8, "filename_lr"])
    for name in net.branch_names:
        assert set(net.branch(name).layer.case_ids) - {""} <= training
        assert net.branch(name).layer.projected
    assert not torch.equal(net.thresholds, torch.full_like(net.thresholds, 0.5))


def test_a_killed_run_resumes_to_the_same_weights(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--curriculum.only", "[rhythm,fusion]", "--model.schedule.joint_epochs", "2")
    assert fit(run.data, tmp_path / "whole", *settings) == 0
    begin = Curriculum.on_train_epoch_start

    def killing(self: Curriculum, trainer, module) -> None:
        if trainer.current_epoch == 1:
            raise Killed
        begin(self, trainer, module)

    monkeypatch.setattr(Curriculum, "on_train_epoch_start", killing)
    with pytest.raises(Killed):
        fit(run.data, tmp_path / "cut", *settings)
    assert not (tmp_path / "cut/checkpoints/final.ckpt").exists()
    seen: list[tuple[str, int]] = []

    def looking(self: Curriculum, trainer, module) -> None:
        seen.append((self.stage.name, self.epoch))
        begin(self, trainer, module)

    monkeypatch.setattr(Curriculum, "on_train_epoch_start", looking)
    assert fit(run.data, tmp_path / "cut", *settings, "--ckpt_path", "last") == 0
    assert seen == [("rhythm.joint", 1), ("rhythm.classifier", 0), ("fusion", 0)]
    first, second = (weights(tmp_path / name / "checkpoints/final.ckpt") for name in ("whole", "cut"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


def test_a_later_stage_alone_from_earlier_weights(run: Run, tmp_path: Path) -> None:
    settings = ("--curriculum.only", "[fusion]", "--curriculum.weights", run.checkpoint)
    assert fit(run.data, tmp_path, *settings) == 0
    before, after = weights(run.checkpoint), weights(tmp_path / "checkpoints/final.ckpt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"classifier.weight", "classifier.bias"} <= changed <= {"classifier.weight", "classifier.bias", "thresholds"}


def test_messages_are_few_and_short(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(run.data, tmp_path, "--curriculum.only", "[fusion]", "--trainer.logger", "true") == 0
    text = capsys.readouterr().err
    assert "stage fusion (1 of 1), epoch 1" in text
    for chatter in ("Tip", "tensorboard", "site-packages", "Warning:"):
        assert chatter not in text


def test_test_prints_and_writes_the_figures(run: Run, test_ids: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out, config = run.root / "figures/test.csv", (run.root / "config.yaml").read_text()
    assert call("test", "--ckpt_path", run.checkpoint, "--out", out, *QUIET) == 0
    text = capsys.readouterr().out
    assert "DataLoader 0" not in text
    found = rows(out)
    net = ProtoECGNet.from_checkpoint(run.checkpoint)
    assert [row["label"] for row in found] == net.label_names
    assert all(row["label"] in text for row in found)
    for row, threshold in zip(found, net.thresholds.tolist(), strict=True):
        assert float(row["threshold"]) == pytest.approx(threshold)
        both = 0 < int(row["positives"]) < len(test_ids)
        assert (float(row["auroc"]) >= 0) == both, row
        assert "f1" in row
    summary = {row["metric"]: float(row["value"]) for row in rows(out.with_name("test_summary.csv"))}
    assert {"auroc", "fmax", "calibration_error"} <= set(summary)
    assert all(f"{name}  {value:.4f}" in text for name, value in summary.items())
    defined = [float(row["auroc"]) for row in found if float(row["auroc"]) >= 0]
    assert summary["auroc"] == pytest.approx(np.mean(defined), abs=1e-5)
    assert (run.root / "config.yaml").read_text() == config


def test_predict_writes_the_same_numbers_as_csv_and_parquet(
    run: Run, test_ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.csv", "x.parquet"):
        assert call("predict", "--ckpt_path", run.checkpoint, "--out", tmp_path / "new" / name, *QUIET) == 0
        assert capsys.readouterr().out.endswith(f"{len(test_ids)} predictions: {tmp_path / 'new' / name}\n")
    table, again = pd.read_csv(tmp_path / "new/x.csv"), pd.read_parquet(tmp_path / "new/x.parquet")
    table["predicted"] = table["predicted"].fillna("")
    pd.testing.assert_frame_equal(table, again, check_dtype=False)
    assert table["record"].tolist() == test_ids
    net = ProtoECGNet.from_checkpoint(run.checkpoint)
    probabilities = table[net.label_names].to_numpy()
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    data = GeneratedECG(60, seed=5, root=run.data, quiet=True)
    with torch.no_grad():
        logits = net(torch.stack([data.model_input(record) for record in test_ids])[:, None]).logits
    np.testing.assert_allclose(probabilities, logits.sigmoid().numpy(), atol=1e-5)
    decided = probabilities >= net.thresholds.numpy()
    for row, flags in zip(table["predicted"], decided, strict=True):
        assert row == ";".join(np.array(net.label_names)[flags])


def test_predict_goes_through_all_records_of_a_moved_folder(run: Run, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run.data, moved)
    more = ("--data.root", moved, "--data.predict_fold", "all")
    assert call("predict", "--ckpt_path", run.checkpoint, "--out", tmp_path / "x.csv", *more, *QUIET) == 0
    assert len(rows(tmp_path / "x.csv")) == 60


def test_explain_by_id_by_number_and_by_path(run: Run, test_ids: list[str], tmp_path: Path) -> None:
    number = re.findall(r"(\d+)_lr", test_ids[0])[0].lstrip("0")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for ending in (".hea", ".dat"):
        shutil.copy(f"{run.data / test_ids[0]}{ending}", f"{elsewhere / Path(test_ids[0]).name}{ending}")
    records = [test_ids[0], number, elsewhere / Path(test_ids[0]).name, f"{elsewhere / Path(test_ids[0]).name}.hea"]
    out = tmp_path / "new/report.html"
    assert call("explain", "--ckpt_path", run.checkpoint, *records, "--out", out, "--top", "2") == 0
    html = out.read_text(encoding="utf-8")
    self_contained(html)
    assert "could not be read" not in html
    found = sums(html)
    for terms, total in found:
        assert len(terms) == 6  # the bias, two for, two against, the others
        assert sum(terms) == pytest.approx(total, abs=0.0005 * 7)
    quarter = len(found) // 4
    assert found == found[:quarter] * 4  # the same record by whatever name has the same explanation
    net = ProtoECGNet.from_checkpoint(run.checkpoint)
    data = GeneratedECG(60, seed=5, root=run.data, quiet=True)
    told = net.explain(data.model_input(test_ids[0])[None], ["x"])[0]
    assert [round(item.logit, 3) for item in told] == [total for _, total in found[:quarter]]


def test_explain_chosen_labels_from_a_moved_folder(run: Run, test_ids: list[str], tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "report.html"
    shutil.copytree(run.data, moved)
    more = ("--data.root", moved, "--out", out, "--labels", "AFIB", "NORM")
    assert call("explain", test_ids[0], "--ckpt_path", run.checkpoint, *more) == 0
    html = out.read_text(encoding="utf-8")
    assert len(sums(html)) == 2
    assert {"AFIB", "NORM"} == set(re.findall(r"How the logit of <bdi>(\w+)</bdi>", html))
    shutil.rmtree(moved / "records100")
    assert call("explain", run.data / test_ids[0], "--ckpt_path", run.checkpoint, *more) == 2


def test_explain_from_a_checkpoint_of_generated_data(tmp_path: Path, run: Run, test_ids: list[str]) -> None:
    """The data of ``demo``: ``--data.root`` is where ``--keep-data`` went."""
    settings = torch.load(run.checkpoint, weights_only=True)
    settings["proto_run"] = (
        "data: {class_path: proto_ecg.GeneratedECG, init_args: {num_records: 60, seed: 5, keep_data: gone}}"
    )
    torch.save(settings, tmp_path / "demo.ckpt")
    out = tmp_path / "report.html"
    assert (
        call("explain", test_ids[0], "--ckpt_path", tmp_path / "demo.ckpt", "--data.root", run.data, "--out", out) == 0
    )
    assert sums(out.read_text(encoding="utf-8"))


def test_html_in_a_records_comment_and_name_is_escaped(run: Run, test_ids: list[str], tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    for ending in (".hea", ".dat"):
        shutil.copy(f"{run.data / test_ids[0]}{ending}", f"{tmp_path / Path(test_ids[0]).name}{ending}")
    record = tmp_path / Path(test_ids[0]).name
    with Path(f"{record}.hea").open("a", encoding="utf-8") as file:
        file.write(f"# {attack}\n")
    out = tmp_path / "report.html"
    assert call("explain", record, "--ckpt_path", run.checkpoint, "--out", out) == 0
    html = out.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html
    assert "<img" not in html
    self_contained(html)


def test_export_to_safetensors_and_onnx(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net = ProtoECGNet.from_checkpoint(run.checkpoint)
    signal = torch.randn(3, 1, 12, 1000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(signal)
    assert call("export", "--ckpt_path", run.checkpoint, "--out", tmp_path / "st") == 0
    assert {path.name for path in (tmp_path / "st").iterdir()} == {"model.safetensors", "config.json"}
    again = ProtoECGNet.from_pretrained(tmp_path / "st")
    with torch.no_grad():
        assert torch.equal(again(signal).logits, expected.logits)
    assert again.rhythm.layer.case_ids == net.rhythm.layer.case_ids
    out = tmp_path / "new/net.onnx"
    capsys.readouterr()
    assert call("export", "--ckpt_path", run.checkpoint, "--format", "onnx", "--out", out) == 0
    assert capsys.readouterr().out == f"exported: {out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(str(out))
    for count in (3, 1):
        logits, similarities = session.run(None, {"signal": signal[:count].numpy()})
        np.testing.assert_allclose(logits, expected.logits[:count], atol=1e-4)
        np.testing.assert_allclose(similarities, expected.similarities[:count], atol=1e-4)


class _FixesTheBatch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(x)


def test_onnx_of_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(RuntimeError, match="takes 2 samples only"):
        export_onnx(_FixesTheBatch(), torch.ones(2, 3), tmp_path / "x.onnx", input_name="x", output_names=["y"])
    assert not list(tmp_path.iterdir())


def test_an_archive_of_ones_own(tmp_path: Path) -> None:
    root = archive(tmp_path / "mine")
    before = sorted(root.rglob("*"))
    told = "1 of 3 labels have no positive in training (kept, weight 1): RARE"
    with pytest.warns(UserWarning, match=re.escape(told)):
        assert fit_archive(root, tmp_path / "run") == 0
    checkpoint = tmp_path / "run/checkpoints/final.ckpt"
    assert call("test", "--ckpt_path", checkpoint, *QUIET) == 0
    found = rows(tmp_path / "run/test_metrics.csv")
    assert [row["label"] for row in found] == ["AMYLOID", "<b>ODD</b>", "RARE"]
    assert call("predict", "--ckpt_path", checkpoint, "--out", tmp_path / "x.csv", *QUIET) == 0
    assert [row["record"] for row in rows(tmp_path / "x.csv")] == [f"ecg/r{k}" for k in (6, 7, 14, 15, 22, 23)]
    net = ProtoECGNet.from_checkpoint(checkpoint)
    assert net.pos_weight[2] == 1
    out = tmp_path / "report.html"
    assert call("explain", "ecg/r6", "--ckpt_path", checkpoint, "--out", out, "--labels", "<b>ODD</b>") == 0
    html = out.read_text(encoding="utf-8")
    assert "&lt;b&gt;ODD&lt;/b&gt;" in html
    assert "<b>ODD" not in html
    self_contained(html)
    assert sorted(root.rglob("*")) == before


def test_demo_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import proto_ecg_app.demo as demo

    short = demo.CONFIG.read_text().replace("joint_epochs: 8", "joint_epochs: 1")
    short = short.replace("fusion_epochs: 6", "fusion_epochs: 1").replace(
        "classifier_epochs: 2", "classifier_epochs: 1"
    )
    (tmp_path / "short.yaml").write_text(short)
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "short.yaml")
    out = tmp_path / "demo"
    assert call("demo", "--out", out, "--records", "50", "--explain", "2", "--keep-data", tmp_path / "data") == 0
    text = capsys.readouterr().out
    assert re.search(r"test macro-AUROC: ProtoECGNet [\d.]+, plain ResNet of the same size [\d.]+", text)
    assert f"report: {out / 'report.html'}" in text
    html = (out / "report.html").read_text(encoding="utf-8")
    self_contained(html)
    for terms, total in sums(html):
        assert sum(terms) == pytest.approx(total, abs=0.0005 * (len(terms) + 1))
    assert (tmp_path / "data/ptbxl_database.csv").is_file()
    assert rows(out / "test_metrics.csv")
    ids = pd.read_csv(tmp_path / "data/ptbxl_database.csv")["ecg_id"].astype(str).tolist()
    again = ("--ckpt_path", out / "checkpoints/final.ckpt", "--out", tmp_path / "again.html")
    assert call("explain", ids[0], *again) == 0
