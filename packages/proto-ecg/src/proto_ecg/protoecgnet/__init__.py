"""ProtoECGNet (arXiv 2504.08713): multi-label ECG classification that explains itself by real cases."""

from proto_core.data.multilabel import class_pos_weight, label_cooccurrence
from proto_core.metrics import macro_auroc
from proto_core.prototypes import (
    global_cosine_similarity,
    init_classifier_weight,
    log_similarity,
    pool_windows,
    prototype_class_matrix,
    window_l2_distance,
    window_similarity,
)
from proto_ecg.data.labels import PTBXL_ALL, PTBXL_DIFFUSE, PTBXL_MORPHOLOGY, PTBXL_RHYTHM
from proto_ecg.data.records import remove_baseline_wander
from proto_ecg.protoecgnet.branches import Branch1d, Branch2d, BranchOutput, ProtoECGBranch1d, ProtoECGBranch2d
from proto_ecg.protoecgnet.curriculum import Schedule, protoecgnet_stages
from proto_ecg.protoecgnet.evaluation import evaluate
from proto_ecg.protoecgnet.loss import ProtoECGLoss
from proto_ecg.protoecgnet.projection import project_global, project_windows
from proto_ecg.protoecgnet.system import BRANCHES, LossWeights, ProtoECGNet

__all__ = [
    "BRANCHES",
    "PTBXL_ALL",
    "PTBXL_DIFFUSE",
    "PTBXL_MORPHOLOGY",
    "PTBXL_RHYTHM",
    "Branch1d",
    "Branch2d",
    "BranchOutput",
    "LossWeights",
    "ProtoECGBranch1d",
    "ProtoECGBranch2d",
    "ProtoECGLoss",
    "ProtoECGNet",
    "Schedule",
    "class_pos_weight",
    "evaluate",
    "global_cosine_similarity",
    "init_classifier_weight",
    "label_cooccurrence",
    "log_similarity",
    "macro_auroc",
    "pool_windows",
    "project_global",
    "project_windows",
    "protoecgnet_stages",
    "prototype_class_matrix",
    "remove_baseline_wander",
    "window_l2_distance",
    "window_similarity",
]
