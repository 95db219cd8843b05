"""The settings of a ProtoECGNet: what rebuilds it, and when a checkpoint belongs to another one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from proto_core.training import StoredSystem, check_label_names

if TYPE_CHECKING:
    from proto_ecg.protoecgnet.system import ProtoECGNet

__all__ = ["StoresECGNet"]

_FORMAT = 1

Net = TypeVar("Net", bound="StoresECGNet")


class StoresECGNet(StoredSystem):
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

    def check_settings(self, found: dict[str, Any]) -> None:
        """Refuse a checkpoint of another label set or record length.

        Raises:
            ValueError: names what differs.
        """
        own = self.settings()
        check_label_names(found["label_names"], own["label_names"])
        for key in ("sampling_rate", "num_samples"):
            if found[key] != own[key]:
                raise ValueError(f"checkpoint: trained with {key} {found[key]}, this model has {own[key]}")
