"""Start a backbone from what another system of this package has learned with the same one."""

from __future__ import annotations

import os

from torch import nn

from proto_core.training import read_checkpoint

__all__ = ["load_backbone"]


def load_backbone(backbone: nn.Module, path: str | os.PathLike[str], prefix: str = "backbone.") -> None:
    """Fill a backbone with those weights of a checkpoint that stand under a name.

    Args:
        backbone: of :func:`~proto_vision.backbones.create_backbone`.
        path: a checkpoint of a system that keeps its backbone under this name (``opl``, ``multi_similarity``).
        prefix: first letters of the names of its weights.

    Raises:
        ValueError: no such file, no weight of this name, or weights of another backbone.
    """
    state = read_checkpoint(path)["state_dict"]
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"checkpoint {str(path)!r}: found no weights named {prefix}*, needed those of a backbone")
    try:
        backbone.load_state_dict(found)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {str(path)!r}: holds another backbone ({reason})") from error
