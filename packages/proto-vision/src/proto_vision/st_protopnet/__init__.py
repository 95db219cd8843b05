"""ST-ProtoPNet: image classes explained by trivial and support prototypes, which are parts of training images.

Source: "Learning Support and Trivial Prototypes for Interpretable Image Classification", ICCV 2023, arXiv 2301.04011.
"""

from proto_core.losses import (
    ClosenessLoss,
    ClusterLoss,
    DiscriminationLoss,
    IncorrectConnectionL1Loss,
    SeparationLoss,
    SubspaceOrthogonalityLoss,
)
from proto_core.prototypes import PartPrototypes, PushResult, push_part_prototypes
from proto_vision.st_protopnet.network import STProtoPNet, STProtoPNetOutput
from proto_vision.st_protopnet.system import STLossWeights, STProtoPNetModule, STSchedule

__all__ = [
    "ClosenessLoss",
    "ClusterLoss",
    "DiscriminationLoss",
    "IncorrectConnectionL1Loss",
    "PartPrototypes",
    "PushResult",
    "STLossWeights",
    "STProtoPNet",
    "STProtoPNetModule",
    "STProtoPNetOutput",
    "STSchedule",
    "SeparationLoss",
    "SubspaceOrthogonalityLoss",
    "push_part_prototypes",
]
