"""Robust prototype-based networks: classes by components that must or must not be there, with a certified radius.

Source: "A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations", AAAI 2025, arXiv 2412.15499.
"""

from proto_core.losses import GLVQLoss, ProbabilityMarginLoss, RobustnessMarginLoss, TemplateMarginLoss
from proto_core.prototypes import (
    ClassificationByComponents,
    cbc_margin_root,
    rbf_detection,
    robustness_certificate,
)
from proto_vision.robust_pbn.deep import (
    DeepPBN,
    alignment_loss,
    component_map,
    pool_detections,
    rbf_head_output,
    tanh_uniformity_loss,
)
from proto_vision.robust_pbn.shallow import ShallowPBN
from proto_vision.robust_pbn.system import RobustPBNModule, RobustPBNSchedule

__all__ = [
    "ClassificationByComponents",
    "DeepPBN",
    "GLVQLoss",
    "ProbabilityMarginLoss",
    "RobustPBNModule",
    "RobustPBNSchedule",
    "RobustnessMarginLoss",
    "ShallowPBN",
    "TemplateMarginLoss",
    "alignment_loss",
    "cbc_margin_root",
    "component_map",
    "pool_detections",
    "rbf_detection",
    "rbf_head_output",
    "robustness_certificate",
    "tanh_uniformity_loss",
]
