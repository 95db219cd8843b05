"""Checkpoints: written whole, read without running code, and enough to rebuild the system they hold.

A checkpoint of a Proto system is a Lightning checkpoint with one more entry, ``"proto"``: the system's key and the
plain settings that rebuild it. Labels, thresholds and the cases of the prototypes are in it, data is not.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from proto_core.files import atomic_write

__all__ = ["WholeFileCheckpointIO", "read_checkpoint", "save_checkpoint"]


class _Rebuildable(Protocol):
    system: str

    def settings(self) -> dict[str, Any]: ...


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written under a temporary name and renamed; read with ``weights_only``.

    A kill or a full disk while writing leaves the previous checkpoint whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint to a local path."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(Path(path), "wb") as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; never runs code from the file."""
        return read_checkpoint(path, map_location=map_location or "cpu")


def read_checkpoint(path: str | os.PathLike[str], *, system: str | None = None, map_location: Any = "cpu") -> dict:
    """Read a checkpoint with ``weights_only``.

    Args:
        path: the file.
        system: key that the checkpoint must be of, or ``None`` for any.
        map_location: where tensors go.

    Raises:
        ValueError: the file is missing, cut, corrupt, no checkpoint, or of another system; names the file.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r}: no such file")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, BadZipFile, KeyError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {str(path)!r}: cannot be read, the file is cut or corrupt ({reason})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"checkpoint {str(path)!r}: found no 'state_dict', needed a checkpoint of a Proto system")
    if system is not None:
        found = checkpoint.get("proto", {}).get("system")
        if found != system:
            raise ValueError(f"checkpoint {str(path)!r}: holds system {found!r}, needed {system!r}")
    return checkpoint


def save_checkpoint(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a module's weights and settings, without a trainer.

    Args:
        module: a Proto system (has ``system`` and ``settings()``).
        path: the file; written whole.
    """
    source: _Rebuildable = module  # type: ignore[assignment]
    entry = {"system": source.system, "settings": source.settings()}
    with atomic_write(Path(path), "wb") as file:
        torch.save({"state_dict": module.state_dict(), "proto": entry}, file)
