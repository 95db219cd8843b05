"""Explaining prototypes: which visible property makes an image patch look like a prototype.

Source: "This Looks Like That, Because ... Explaining Prototypes for Interpretable Image Recognition", arXiv 2011.02863.
"""

from proto_vision.explaining.explainer import CheckpointInput, CheckpointMaps, PrototypeExplainer
from proto_vision.explaining.perturbations import CHARACTERISTICS, perturb, perturb_all
from proto_vision.explaining.scores import (
    Generalisation,
    LocalScores,
    explain,
    generalisation_test,
    global_scores,
    local_scores,
    redundancy,
)

__all__ = [
    "CHARACTERISTICS",
    "CheckpointInput",
    "CheckpointMaps",
    "Generalisation",
    "LocalScores",
    "PrototypeExplainer",
    "explain",
    "generalisation_test",
    "global_scores",
    "local_scores",
    "perturb",
    "perturb_all",
    "redundancy",
]
