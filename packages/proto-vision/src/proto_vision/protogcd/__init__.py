"""ProtoGCD: find the classes of unlabelled images beside those that have labels, by one set of prototypes for both."""

from proto_vision.protogcd.contrast import supervised_contrastive_loss, view_contrastive_loss
from proto_vision.protogcd.losses import EntropyRegularizationLoss, ProtoGCDLoss, PrototypeSeparationLoss
from proto_vision.protogcd.network import HeadOutput, ProtoGCD, ProtoGCDHead
from proto_vision.protogcd.pseudo_labels import DAPLLoss
from proto_vision.protogcd.selection import estimate_num_classes, outlier_score, prototype_score
from proto_vision.protogcd.system import ProtoGCDModule, ProtoGCDSchedule

__all__ = [
    "DAPLLoss",
    "EntropyRegularizationLoss",
    "HeadOutput",
    "ProtoGCD",
    "ProtoGCDHead",
    "ProtoGCDLoss",
    "ProtoGCDModule",
    "ProtoGCDSchedule",
    "PrototypeSeparationLoss",
    "estimate_num_classes",
    "outlier_score",
    "prototype_score",
    "supervised_contrastive_loss",
    "view_contrastive_loss",
]
