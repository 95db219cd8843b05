"""``proto-vision demo``: the whole way on built-in digits, from data to a report that one can look at."""

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

__all__ = ["run"]

CONFIG = Path(__file__).parent / "configs" / "st_protopnet" / "demo.yaml"


def run(arguments: Any) -> int:
    """Run the command."""
    with quiet_lightning():
        return _run(arguments)


def _run(arguments: Any) -> int:
    started = time.monotonic()
    out = writable_folder(arguments.out, "--out")
    pl.seed_everything(arguments.seed, workers=True, verbose=False)
    network, data = instantiate(CONFIG, [])
    settings = yaml.safe_dump({"data": yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]}, sort_keys=False)
    trainer = staged_trainer(out, "checkpoints", settings)
    trainer.fit(network, datamodule=data)
    trainer.test(network, datamodule=data, verbose=False)
    write_results(network.test_results, out / "test_metrics.csv")
    report = out / "report.html"
    with atomic_write(report) as file:
        file.write(network.explain_images(data, _chosen(network, data, arguments.explain), source="final.ckpt"))
    figures = network.test_results["summary"]
    alone = ", ".join(f"{name} prototypes alone {figures[f'accuracy_{name}']:.3f}" for name in ("trivial", "support"))
    sys.stdout.write(
        f"\ntest accuracy: {figures['accuracy']:.3f} ({alone}; {len(data.test_set)} images)\n"
        f"report: {report}\ncheckpoint: {out / 'checkpoints' / 'final.ckpt'}\n"
        f"time: {time.monotonic() - started:.0f} s\n"
    )
    return 0


def _chosen(network: Any, data: Any, count: int) -> list[str]:
    """Test images of different classes, one of them an error of the network where it makes any."""
    rows = torch.as_tensor(data.test_set.rows)
    with torch.no_grad():
        said = torch.cat([network.class_logits(batch.image).argmax(1) for batch in data.test_dataloader()])
    targets = data.targets[rows]
    wrong = (said != targets).nonzero().flatten().tolist()[:1]
    first = [int((targets == c).nonzero()[0]) for c in targets.unique()]
    return [data.record_ids[int(rows[n])] for n in dict.fromkeys([*wrong, *first])][:count]
