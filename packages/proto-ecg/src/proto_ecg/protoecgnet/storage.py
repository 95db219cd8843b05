"""How a ProtoECGNet is kept: in checkpoints, and as safetensors with a config.json."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from safetensors.torch import load_file, save
from torch import Tensor, nn

from proto_core.files import atomic_write
from proto_core.training import read_checkpoint

if TYPE_CHECKING:
    from proto_ecg.protoecgnet.system import ProtoECGNet

__all__ = ["StoresECGNet"]

_FORMAT = 1

Net = TypeVar("Net", bound="StoresECGNet")


class StoresECGNet:
    """Saving and rebuilding; mixed into :class:`ProtoECGNet`."""

    def settings(self) -> dict[str, Any]:
        """Plain settings that rebuild the network: branches, labels, record length, loss, schedule."""
        net = cast("ProtoECGNet", self)
        return {
            "format": _FORMAT,
            "branches": {name: net.branch(name).settings() for name in net.branch_names},
            "label_names": list(net.label_names),
            "branch_labels": {name: list(labels) for name, labels in net.branch_labels.items()},
            "num_samples": net.num_samples,
            "sampling_rate": net.sampling_rate,
            "loss": asdict(net.weights),
            "schedule": asdict(net.schedule),
        }

    @classmethod
    def from_settings(cls: type[Net], settings: dict[str, Any]) -> Net:
        """Build an untrained network from :meth:`settings`.

        Raises:
            ValueError: settings of another format.
        """
        from proto_ecg.protoecgnet.branches import Branch1d, Branch2d, ProtoECGBranch1d, ProtoECGBranch2d
        from proto_ecg.protoecgnet.curriculum import Schedule
        from proto_ecg.protoecgnet.system import LossWeights

        if settings.get("format") != _FORMAT:
            raise ValueError(f"settings: found format {settings.get('format')!r}, needed {_FORMAT}")
        built: dict[str, nn.Module | None] = {"rhythm": None, "morphology": None, "diffuse": None}
        labels = settings["branch_labels"]
        for name, values in settings["branches"].items():
            if name == "rhythm":
                built[name] = ProtoECGBranch1d(len(labels[name]), **asdict(Branch1d(**values)))
            else:
                plain = asdict(Branch2d(**values)) | {"pretrained": False}
                built[name] = ProtoECGBranch2d(len(labels[name]), **plain)
        return cls(  # type: ignore[call-arg]
            **built,
            label_names=settings["label_names"],
            branch_labels=labels,
            num_samples=settings["num_samples"],
            sampling_rate=settings["sampling_rate"],
            loss=LossWeights(**settings["loss"]),
            schedule=Schedule(**settings["schedule"]),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the system's key and settings beside the weights."""
        checkpoint["proto"] = {"system": cast("ProtoECGNet", self).system, "settings": self.settings()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another label set or record length.

        Raises:
            ValueError: names what differs.
        """
        found, own = checkpoint.get("proto", {}).get("settings"), self.settings()
        if found is None:
            return
        if found["label_names"] != own["label_names"]:
            missing = [name for name in own["label_names"] if name not in found["label_names"]]
            extra = [name for name in found["label_names"] if name not in own["label_names"]]
            raise ValueError(
                f"checkpoint: trained on another label set ({len(found['label_names'])} labels, this model has "
                f"{len(own['label_names'])}); it lacks {missing[:5]}, it adds {extra[:5]}"
                + ("" if missing or extra else "; the order differs")
            )
        for key in ("sampling_rate", "num_samples"):
            if found[key] != own[key]:
                raise ValueError(f"checkpoint: trained with {key} {found[key]}, this model has {own[key]}")

    @classmethod
    def from_checkpoint(cls: type[Net], path: str | os.PathLike[str]) -> Net:
        """Rebuild a network, with its cases and thresholds, from a checkpoint alone (in evaluation mode).

        Raises:
            ValueError: a missing or corrupt file, or one of another system.
        """
        checkpoint = read_checkpoint(path, system=cast("type[ProtoECGNet]", cls).system)
        network = cls.from_settings(checkpoint["proto"]["settings"])
        _load(cast(nn.Module, network), checkpoint["state_dict"], str(path))
        cast(nn.Module, network).eval()
        return network

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``model.safetensors`` and ``config.json`` (settings and cases); each is written whole.

        Returns:
            The folder.
        """
        net = cast("ProtoECGNet", self)
        tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items() if isinstance(v, Tensor)}
        cases = {name: net.branch(name).layer.get_extra_state() for name in net.branch_names}
        folder = Path(folder)
        with atomic_write(folder / "model.safetensors", "wb") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        with atomic_write(folder / "config.json") as file:
            json.dump({"system": net.system, "settings": self.settings(), "cases": cases}, file, indent=1)
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
        if config.get("system") != cast("type[ProtoECGNet]", cls).system:
            raise ValueError(f"{str(config_path)!r}: holds system {config.get('system')!r}")
        network = cls.from_settings(config["settings"])
        extra = {f"{name}.layer._extra_state": state for name, state in config["cases"].items()}
        _load(cast(nn.Module, network), tensors | extra, str(folder))
        cast(nn.Module, network).eval()
        return network


def _load(network: nn.Module, state: dict[str, Any], source: str) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source!r}: the weights do not fit their own settings ({error})") from error
