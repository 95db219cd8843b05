"""``export``: the weights of a checkpoint for other programs, as safetensors or ONNX."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proto_core.files import writable_folder

__all__ = ["export", "export_onnx"]


def export_onnx(
    module: nn.Module, example: Tensor, path: Path, *, input_name: str, output_names: Sequence[str]
) -> None:
    """Write a module of one input as one ONNX file, for any batch size.

    The file is written under a temporary name and renamed.

    Args:
        module: tensor -> tensor or tuple of tensors.
        example: an input, two samples at least.
        path: the file.
        input_name: of the input.
        output_names: of the outputs.

    Raises:
        ValueError: the folder cannot be written to.
        RuntimeError: the module's forward fixes the number of samples.
    """
    writable_folder(path.parent, "--out")
    argument = next(iter(inspect.signature(module.forward).parameters))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        program = torch.onnx.export(
            module.cpu().eval(),
            (example,),
            str(temporary),
            input_names=[input_name],
            output_names=list(output_names),
            dynamic_shapes={argument: {0: torch.export.Dim("batch", min=1, max=4096)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        shape = program.model.graph.inputs[0].shape if program is not None else None
        if shape is not None and isinstance(shape[0], int):
            raise RuntimeError(
                f"{type(module).__name__}: the graph takes {shape[0]} samples only, since forward fixes their number"
            )
        os.replace(temporary, path)


def export(arguments: Any, load: Callable[[Path], Any], to_onnx: Callable[[Any, Path], None]) -> int:
    """Run the command.

    Args:
        arguments: ``ckpt_path``, ``format`` (safetensors or onnx) and ``out``.
        load: checkpoint -> network with ``save_pretrained``.
        to_onnx: writes a network to a path.
    """
    checkpoint = Path(arguments.ckpt_path)
    network = load(checkpoint)
    onnx = arguments.format == "onnx"
    out = Path(arguments.out) if arguments.out else checkpoint.with_suffix(".onnx" if onnx else "")
    if onnx:
        to_onnx(network, out)
    else:
        writable_folder(out, "--out")
        network.save_pretrained(out)
    sys.stdout.write(f"exported: {out}\n")
    return 0
