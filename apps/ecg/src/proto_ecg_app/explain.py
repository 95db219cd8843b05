"""``proto-ecg explain``: a report of some records, drawn from a checkpoint and the data folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proto_core.cli.training import data_from_checkpoint
from proto_core.files import atomic_write, writable_folder
from proto_ecg import ProtoECGNet
from proto_ecg.data.module import ECGDataModule
from proto_ecg.data.records import Record, read_record
from proto_ecg.report import ReportSample, ecg_report

__all__ = ["explain_records", "run"]


def run(arguments: Any) -> int:
    """Run the command."""
    out = Path(arguments.out)
    writable_folder(out.parent, "--out")
    network = ProtoECGNet.from_checkpoint(arguments.ckpt_path)
    data = data_from_checkpoint(arguments.ckpt_path, {"root": arguments.root})
    html = explain_records(
        network,
        data,
        arguments.records,
        labels=arguments.labels,
        top=arguments.top,
        source=Path(arguments.ckpt_path).name,
    )
    with atomic_write(out) as file:
        file.write(html)
    sys.stdout.write(f"report: {out}\n")
    return 0


def explain_records(
    network: ProtoECGNet,
    data: ECGDataModule,
    records: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    top: int = 3,
    source: str = "",
) -> str:
    """The report of some records as HTML.

    Args:
        network: with projected prototypes.
        data: the data set of the cases.
        records: paths of WFDB records without extension, or ids of the data set.
        labels: labels to explain; by default those predicted.
        top: prototypes shown for and against.
        source: name of the checkpoint, for the report's head.
    """
    raw = [_read(network, data, name) for name in records]
    signals = torch.stack([data.model_input(name if _is_id(data, name) else Path(name)) for name in records])
    explained = network.explain(signals, list(records), labels)
    samples = [
        ReportSample(
            sample_id=name,
            signal=record.signal,
            sampling_rate=record.sampling_rate,
            explanations=explanations,
            targets=_targets(data, name),
            requested=labels is not None,
            metadata={"comment": " ".join(record.comments)} if record.comments else {},
        )
        for name, record, explanations in zip(records, raw, explained)
    ]

    def read_case(sample_id: str) -> tuple[np.ndarray, int]:
        record = data.read(sample_id)
        return record.signal, record.sampling_rate

    info = {
        "model": f"ProtoECGNet, {sum(network.branch(n).layer.num_prototypes for n in network.branch_names)} prototypes",
        "labels": str(len(network.label_names)),
        "checkpoint": source,
    }
    return ecg_report(samples, title="Why the model says so", model_info=info, read_case=read_case, top=top)


def _is_id(data: ECGDataModule, name: str) -> bool:
    return name in data.record_ids


def _read(network: ProtoECGNet, data: ECGDataModule, name: str) -> Record:
    if _is_id(data, name):
        return data.read(name)
    path = Path(name)
    if not path.with_name(path.name + ".hea").is_file():
        raise ValueError(f"record {name!r}: no file {name}.hea, and no record of the data set has that id")
    return read_record(path, sampling_rate=network.sampling_rate, num_samples=network.num_samples)


def _targets(data: ECGDataModule, name: str) -> tuple[str, ...] | None:
    if not _is_id(data, name):
        return None
    row = data.targets[data.record_ids.index(name)]
    return tuple(label for label, flag in zip(data.label_names, row) if flag)
