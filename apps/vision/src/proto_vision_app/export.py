"""``proto-vision export``: weights for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proto_core.cli.export import export
from proto_core.cli.export import export_onnx as export_module
from proto_core.training import load_system

__all__ = ["export_onnx", "run"]


class _Logits(nn.Module):
    """The network with its deciding logits as its only answer."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.class_logits(images)


def export_onnx(network: Any, path: Path) -> None:
    """Write the network as one ONNX file, any batch size: ``images [N, channels, S, S]`` -> ``logits [N, C]``."""
    example = torch.zeros(2, network.in_channels, network.image_size, network.image_size)
    export_module(_Logits(network), example, path, input_name="images", output_names=["logits"])


def run(arguments: Any) -> int:
    """Run the command."""
    return export(arguments, lambda path: load_system(path, "proto-vision"), export_onnx)
