"""Losses, one family per file; all are ``nn.Module`` and return a scalar to minimise."""

from proto_core.losses.infonce import HardContrastiveLoss, InfoNCELoss, SimpleContrastiveLoss
from proto_core.losses.margin import UNPGLoss, box_whisker_filter
from proto_core.losses.multi_similarity import (
    MultiSimilarityLoss,
    gpw_surrogate,
    multi_similarity_mining,
    pair_weights,
)
from proto_core.losses.orthogonal import (
    OPLDistillationLoss,
    OrthogonalProjectionLoss,
    PerpetualOrthogonalProjectionLoss,
)
from proto_core.losses.prototype import (
    ClusterLoss,
    DiversityLoss,
    MultiLabelClusterLoss,
    MultiLabelSeparationLoss,
    PrototypeContrastiveLoss,
    SeparationLoss,
    contrastive_of_gram,
    diversity_of_gram,
    prototype_gram,
)

__all__ = [
    "ClusterLoss",
    "DiversityLoss",
    "HardContrastiveLoss",
    "InfoNCELoss",
    "MultiLabelClusterLoss",
    "MultiLabelSeparationLoss",
    "MultiSimilarityLoss",
    "OPLDistillationLoss",
    "OrthogonalProjectionLoss",
    "PerpetualOrthogonalProjectionLoss",
    "PrototypeContrastiveLoss",
    "SeparationLoss",
    "SimpleContrastiveLoss",
    "UNPGLoss",
    "box_whisker_filter",
    "contrastive_of_gram",
    "diversity_of_gram",
    "gpw_surrogate",
    "multi_similarity_mining",
    "pair_weights",
    "prototype_gram",
]
