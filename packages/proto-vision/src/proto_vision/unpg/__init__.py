"""UNPG: face recognition whose margin softmax also sees the batch's hard negative pairs (arXiv 2203.11593)."""

from proto_vision.unpg.iresnet import IResNet
from proto_vision.unpg.system import UNPGModule, UNPGSchedule

__all__ = ["IResNet", "UNPGModule", "UNPGSchedule"]
