"""How a system is kept: settings beside the weights in checkpoints, and as safetensors with a config.json.

A checkpoint alone rebuilds the network, and so does a folder; neither runs code when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import load_file, save
from torch import Tensor, nn

from proto_core.files import atomic_write
from proto_core.systems import catalogue
from proto_core.training.checkpoints import read_checkpoint

__all__ = ["StoredSystem", "check_label_names", "load_system"]

Net = TypeVar("Net", bound="StoredSystem")


class StoredSystem:
    """Saving and rebuilding, mixed into a system that trains.

    The system has ``system`` (its key) and ``settings()``, plain values from which ``from_settings`` builds it again.
    """

    system: str

    def settings(self) -> dict[str, Any]:
        """Plain values that rebuild the network."""
        raise TypeError(f"{type(self).__name__} does not say what rebuilds it")

    @classmethod
    def from_settings(cls: type[Net], settings: dict[str, Any]) -> Net:
        """Build an untrained network from :meth:`settings`."""
        return cls(**settings)

    def check_settings(self, found: dict[str, Any]) -> None:
        """Refuse the settings of a checkpoint whose weights mean something else here.

        Raises:
            ValueError: names what differs.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the system's key and settings beside the weights."""
        checkpoint["proto"] = {"system": self.system, "settings": self.settings()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the settings of a checkpoint with this network's.

        Raises:
            ValueError: names what differs.
        """
        found = checkpoint.get("proto", {}).get("settings")
        if found is not None:
            self.check_settings(found)

    @classmethod
    def from_checkpoint(cls: type[Net], path: str | os.PathLike[str]) -> Net:
        """Rebuild a network, with its cases, from a checkpoint alone (in evaluation mode).

        Raises:
            ValueError: a missing or corrupt file, or one of another system.
        """
        checkpoint = read_checkpoint(path, system=cls.system)
        return _filled(cls.from_settings(checkpoint["proto"]["settings"]), checkpoint["state_dict"], str(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``model.safetensors`` and ``config.json`` (settings and cases); each is written whole.

        Returns:
            The folder.
        """
        state = cast(nn.Module, self).state_dict()
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in state.items() if isinstance(value, Tensor)
        }
        cases = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        folder = Path(folder)
        with atomic_write(folder / "model.safetensors", "wb") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        with atomic_write(folder / "config.json") as file:
            json.dump({"system": self.system, "settings": self.settings(), "cases": cases}, file, indent=1)
        return folder

    @classmethod
    def from_pretrained(cls: type[Net], folder: str | os.PathLike[str]) -> Net:
        """Read back what :meth:`save_pretrained` wrote; the same logits to the bit.

        Raises:
            ValueError: a missing or corrupt file, or one of another system.
        """
        config_path, weights_path = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise ValueError(f"{str(path)!r}: no such file, needed a folder written by save_pretrained")
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            tensors: dict[str, Any] = dict(load_file(weights_path))
        except Exception as error:
            raise ValueError(f"folder {str(folder)!r}: cannot be read, a file is cut or corrupt ({error})") from error
        if config.get("system") != cls.system:
            raise ValueError(f"{str(config_path)!r}: holds system {config.get('system')!r}, needed {cls.system!r}")
        return _filled(cls.from_settings(config["settings"]), tensors | config["cases"], str(folder))


def load_system(path: str | os.PathLike[str], package: str | None = None) -> Any:
    """The network of a checkpoint, whichever installed system it is of (in evaluation mode).

    Args:
        path: the checkpoint.
        package: distribution that the system must be of, or ``None`` for any.

    Raises:
        ValueError: a missing or corrupt file, a system that is not installed or cannot be rebuilt.
    """
    key = read_checkpoint(path).get("proto", {}).get("system")
    known = catalogue(package)
    if key not in known:
        raise ValueError(f"checkpoint {str(path)!r}: holds system {key!r}, needed one of {sorted(known)}")
    target = known[key].load()
    if not hasattr(target, "from_checkpoint"):
        raise ValueError(f"checkpoint {str(path)!r}: system {key!r} cannot be rebuilt from a checkpoint")
    return target.from_checkpoint(path)


def check_label_names(found: Sequence[str], own: Sequence[str]) -> None:
    """Refuse a checkpoint that was trained on other labels, or on the same in another order.

    Args:
        found: the checkpoint's labels.
        own: this model's.

    Raises:
        ValueError: how many labels there are, and the first few that differ.
    """
    if list(found) == list(own):
        return
    missing, extra = ([name for name in a if name not in set(b)] for a, b in ((own, found), (found, own)))
    raise ValueError(
        f"checkpoint: trained on another label set ({len(found)} labels, this model has {len(own)}); it lacks "
        f"{missing[:5]}, it adds {extra[:5]}" + ("" if missing or extra else "; the order differs")
    )


def _filled(network: Net, state: dict[str, Any], source: str) -> Net:
    module = cast(nn.Module, network)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source!r}: the weights do not fit their own settings ({error})") from error
    module.eval()
    return network
