"""``proto-ecg export``: weights for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proto_core.cli.export import export
from proto_core.cli.export import export_onnx as export_module
from proto_ecg import ProtoECGNet
from proto_ecg.data.leads import STANDARD_LEADS

__all__ = ["export_onnx", "run"]


class _Logits(nn.Module):
    """The network with a plain tuple as its answer."""

    def __init__(self, network: ProtoECGNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        logits, similarities = self.network(signal)
        return logits, similarities


def export_onnx(network: ProtoECGNet, path: Path) -> None:
    """Write the network as one ONNX file, any batch size: ``signal [N, 1, 12, L]`` -> ``logits``, ``similarities``."""
    example = torch.zeros(2, 1, len(STANDARD_LEADS), network.num_samples)
    export_module(_Logits(network), example, path, input_name="signal", output_names=["logits", "similarities"])


def run(arguments: Any) -> int:
    """Run the command."""
    return export(arguments, ProtoECGNet.from_checkpoint, export_onnx)
