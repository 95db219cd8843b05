"""``proto-ecg demo``: the whole way on generated ECGs, from data to a report that one can look at."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from proto_core.cli.demo import quiet_lightning, staged_trainer
from proto_core.cli.training import instantiate, write_results
from proto_core.files import atomic_write, writable_folder
from proto_ecg.baseline import ECGResNet
from proto_ecg_app.explain import explain_records

__all__ = ["run"]

CONFIG = Path(__file__).parent / "configs" / "protoecgnet" / "demo.yaml"


def run(arguments: Any) -> int:
    """Run the command."""
    with quiet_lightning():
        return _run(arguments)


def _run(arguments: Any) -> int:
    started = time.monotonic()
    out = writable_folder(arguments.out, "--out")
    pl.seed_everything(arguments.seed, workers=True, verbose=False)
    overrides = ["--data.num_records", str(arguments.records), "--data.seed", str(arguments.seed)]
    if arguments.keep_data:
        overrides += ["--data.keep_data", arguments.keep_data]
    network, data = instantiate(CONFIG, overrides)
    stored = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]
    stored["init_args"] |= {"num_records": arguments.records, "seed": arguments.seed}
    if arguments.keep_data:
        stored["init_args"]["keep_data"] = str(Path(arguments.keep_data).resolve())
    settings = yaml.safe_dump({"data": stored}, sort_keys=False)

    trainer = staged_trainer(out, "checkpoints", settings)
    trainer.fit(network, datamodule=data)
    trainer.test(network, datamodule=data, verbose=False)

    epochs = network.schedule.joint_epochs
    pl.seed_everything(arguments.seed, workers=True, verbose=False)
    baseline = ECGResNet(network, lr=network.schedule.lr, max_epochs=epochs)
    rival = staged_trainer(out, "baseline", settings)
    rival.fit(baseline, datamodule=data)
    rival.test(baseline, datamodule=data, verbose=False)

    write_results(network.test_results, out / "test_metrics.csv")
    chosen = _interesting(data, arguments.explain)
    report = out / "report.html"
    with atomic_write(report) as file:
        file.write(explain_records(network, data, chosen, source="checkpoints/final.ckpt"))
    ours, theirs = (model.test_results["summary"]["auroc"] for model in (network, baseline))
    sys.stdout.write(
        f"\ntest macro-AUROC: ProtoECGNet {ours:.3f}, plain ResNet of the same size {theirs:.3f} "
        f"({len(data.test_set)} records)\n"
        f"report: {report}\ncheckpoint: {out / 'checkpoints' / 'final.ckpt'}\n"
        f"time: {time.monotonic() - started:.0f} s\n"
    )
    return 0


def _interesting(data: Any, count: int) -> list[str]:
    """Test records with the most labels, each with another set of labels."""
    rows = torch.as_tensor(data.test_set.rows)
    targets = torch.as_tensor(data.targets)[rows]
    order = targets.sum(1).argsort(descending=True, stable=True).tolist()
    seen: set[tuple[float, ...]] = set()
    chosen: list[str] = []
    for row in order:
        labels = tuple(targets[row].tolist())
        if labels not in seen and len(chosen) < count:
            seen.add(labels)
            chosen.append(data.record_ids[int(rows[row])])
    return chosen
