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
    row_of = {name: row for row, name in enumerate(data.record_ids)}
    places = [data.find_record(name) for name in records]
    raw = [data.read(place) for place in places]
    signals = torch.stack([data.model_input(place) for place in places])
    explained = network.explain(signals, list(records), labels)
    samples = [
        ReportSample(
            sample_id=name,
            signal=record.signal,
            sampling_rate=record.sampling_rate,
            explanations=explanations,
            targets=_targets(data, row_of.get(_id(data, place))),
            requested=labels is not None,
            metadata={"comment": " ".join(record.comments)} if record.comments else {},
        )
        for name, place, record, explanations in zip(records, places, raw, explained, strict=True)
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


def _id(data: ECGDataModule, place: Path) -> str:
    """The record id that a path would have in the data set; empty outside its folder."""
    place, root = place.resolve(), data.root.resolve()
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else ""


def _targets(data: ECGDataModule, row: int | None) -> tuple[str, ...] | None:
    """The labels of a row of the data set; of other records nothing is known."""
    return None if row is None else tuple(data.describe(row)[1])
