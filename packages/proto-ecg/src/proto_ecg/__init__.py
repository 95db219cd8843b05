"""ECG systems of Proto: train, explain and study classifiers whose every decision is a sum over real cases."""

from proto_ecg.baseline import ECGResNet
from proto_ecg.data import PTBXL, ECGArchive, GeneratedECG
from proto_ecg.protoecgnet import ProtoECGBranch1d, ProtoECGBranch2d, ProtoECGNet

__all__ = ["PTBXL", "ECGArchive", "ECGResNet", "GeneratedECG", "ProtoECGBranch1d", "ProtoECGBranch2d", "ProtoECGNet"]
