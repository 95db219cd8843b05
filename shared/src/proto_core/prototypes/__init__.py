"""Layers that hold prototypes, and their projection onto real cases."""

from proto_core.prototypes.classes import check_class_identity, init_classifier_weight, prototype_class_matrix
from proto_core.prototypes.components import (
    ClassificationByComponents,
    cbc_margin_root,
    rbf_detection,
    robustness_certificate,
)
from proto_core.prototypes.gaussian import (
    GaussianPrototypes,
    gaussian_log_prob,
    sample_gaussian,
    sampled_distances,
)
from proto_core.prototypes.layers import PointPrototypes, PrototypeLayer, global_cosine_similarity
from proto_core.prototypes.mixture import MixturePrototypes
from proto_core.prototypes.parts import PartPrototypes, PushResult, push_part_prototypes
from proto_core.prototypes.projection import CaseSearch, Projection, project_layer, project_prototypes
from proto_core.prototypes.quantizer import Quantized, VectorQuantizerEMAReset
from proto_core.prototypes.windows import (
    WindowPrototypes,
    log_similarity,
    mean_window_similarity,
    pool_windows,
    window_l2_distance,
    window_similarity,
)

__all__ = [
    "CaseSearch",
    "ClassificationByComponents",
    "GaussianPrototypes",
    "MixturePrototypes",
    "PartPrototypes",
    "PointPrototypes",
    "Projection",
    "PrototypeLayer",
    "PushResult",
    "Quantized",
    "VectorQuantizerEMAReset",
    "WindowPrototypes",
    "cbc_margin_root",
    "check_class_identity",
    "gaussian_log_prob",
    "global_cosine_similarity",
    "init_classifier_weight",
    "log_similarity",
    "mean_window_similarity",
    "pool_windows",
    "project_layer",
    "project_prototypes",
    "prototype_class_matrix",
    "push_part_prototypes",
    "rbf_detection",
    "robustness_certificate",
    "sample_gaussian",
    "sampled_distances",
    "window_l2_distance",
    "window_similarity",
]
