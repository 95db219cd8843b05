"""``proto-ecg export``: weights for other programs."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proto_core.files import writable_folder
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
    """Write the network as one ONNX file, any batch size: ``signal [N, 1, 12, L]`` -> ``logits``, ``similarities``.

    The file is written under a temporary name and renamed.
    """
    network = network.cpu().eval()
    example = torch.zeros(2, 1, len(STANDARD_LEADS), network.num_samples)
    writable_folder(path.parent, "--out")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        torch.onnx.export(
            _Logits(network).eval(),
            (example,),
            str(temporary),
            input_names=["signal"],
            output_names=["logits", "similarities"],
            dynamic_shapes={"signal": {0: torch.export.Dim("batch", min=1, max=4096)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        os.replace(temporary, path)


def run(arguments: Any) -> int:
    """Run the command."""
    checkpoint = Path(arguments.ckpt_path)
    network = ProtoECGNet.from_checkpoint(checkpoint)
    if arguments.format == "onnx":
        out = Path(arguments.out) if arguments.out else checkpoint.with_suffix(".onnx")
        export_onnx(network, out)
    else:
        out = Path(arguments.out) if arguments.out else checkpoint.with_suffix("")
        writable_folder(out, "--out")
        network.save_pretrained(out)
    sys.stdout.write(f"exported: {out}\n")
    return 0
