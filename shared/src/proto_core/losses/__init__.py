"""Losses, one family per file; all are ``nn.Module`` and return a scalar to minimise."""

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
    "MultiLabelClusterLoss",
    "MultiLabelSeparationLoss",
    "OPLDistillationLoss",
    "OrthogonalProjectionLoss",
    "PerpetualOrthogonalProjectionLoss",
    "PrototypeContrastiveLoss",
    "SeparationLoss",
    "contrastive_of_gram",
    "diversity_of_gram",
    "prototype_gram",
]
