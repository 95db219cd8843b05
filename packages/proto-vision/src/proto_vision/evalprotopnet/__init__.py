"""EvalProtoPNet: part prototypes whose activations follow shallow features, and measures of what prototypes mean.

Source: "Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype Networks", ICCV 2023,
arXiv 2212.05946.
"""

from proto_core.metrics import (
    PartPrototypeScores,
    assign_parts,
    consistency_score,
    perturb_images,
    rescale_part_locations,
    stability_score,
)
from proto_vision.evalprotopnet.network import EvalProtoPNet, EvalProtoPNetOutput, ScoreAggregation, SDFALoss
from proto_vision.evalprotopnet.system import EvalProtoPNetModule, EvalSchedule

__all__ = [
    "EvalProtoPNet",
    "EvalProtoPNetModule",
    "EvalProtoPNetOutput",
    "EvalSchedule",
    "PartPrototypeScores",
    "SDFALoss",
    "ScoreAggregation",
    "assign_parts",
    "consistency_score",
    "perturb_images",
    "rescale_part_locations",
    "stability_score",
]
