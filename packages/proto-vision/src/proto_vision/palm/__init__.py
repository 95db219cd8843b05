"""PALM: embeddings around several prototypes per class, and a distance that finds images of unknown classes.

Source: "Learning with Mixture of Prototypes for Out-of-Distribution Detection", ICLR 2024, arXiv 2402.02653.
"""

from proto_core.losses import PALMLoss
from proto_core.metrics import auroc, fpr_at_tpr
from proto_core.ood import MahalanobisOOD
from proto_core.prototypes import MixturePrototypes
from proto_vision.palm.system import PALM, PALMOutput, PALMSchedule

__all__ = [
    "PALM",
    "MahalanobisOOD",
    "MixturePrototypes",
    "PALMLoss",
    "PALMOutput",
    "PALMSchedule",
    "auroc",
    "fpr_at_tpr",
]
