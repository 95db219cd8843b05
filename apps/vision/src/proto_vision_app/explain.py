"""``proto-vision explain``: a report of some images, drawn from a checkpoint and the data folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from proto_core.cli.training import data_from_checkpoint
from proto_core.files import atomic_write, writable_folder
from proto_core.training import load_system
from proto_vision.explanation import ExplainsImages

__all__ = ["run"]


def run(arguments: Any) -> int:
    """Run the command."""
    out = Path(arguments.out)
    writable_folder(out.parent, "--out")
    network = load_system(arguments.ckpt_path, "proto-vision")
    if not isinstance(network, ExplainsImages):
        raise ValueError(f"checkpoint {arguments.ckpt_path!r}: system {network.system!r} has no prototypes to show")
    data = data_from_checkpoint(arguments.ckpt_path, {"root": arguments.root})
    options: dict[str, Any] = {"labels": arguments.labels, "top": arguments.top}
    options["source"] = Path(arguments.ckpt_path).name
    html = network.explain_images(data, arguments.images, **options)
    with atomic_write(out) as file:
        file.write(html)
    sys.stdout.write(f"report: {out}\n")
    return 0
