"""ECG systems of Proto: train, explain and study classifiers whose every decision is a sum over real cases.

Names are loaded on first use, so that worker processes which only decode records do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proto_ecg.baseline import ECGResNet
    from proto_ecg.data.archive import ECGArchive
    from proto_ecg.data.generated import GeneratedECG
    from proto_ecg.data.ptbxl import PTBXL
    from proto_ecg.protoecgnet import ProtoECGBranch1d, ProtoECGBranch2d, ProtoECGNet

__all__ = ["PTBXL", "ECGArchive", "ECGResNet", "GeneratedECG", "ProtoECGBranch1d", "ProtoECGBranch2d", "ProtoECGNet"]

_HOMES = {
    "ECGArchive": "proto_ecg.data.archive",
    "ECGResNet": "proto_ecg.baseline",
    "GeneratedECG": "proto_ecg.data.generated",
    "PTBXL": "proto_ecg.data.ptbxl",
    "ProtoECGBranch1d": "proto_ecg.protoecgnet",
    "ProtoECGBranch2d": "proto_ecg.protoecgnet",
    "ProtoECGNet": "proto_ecg.protoecgnet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
