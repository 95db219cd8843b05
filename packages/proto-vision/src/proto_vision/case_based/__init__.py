"""Case-based reasoning through prototypes: an autoencoder whose latent space holds prototypes that can be drawn.

Source: "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its Predictions",
AAAI 2018, arXiv 1710.04806.
"""

from proto_core.distances import sq_euclidean as squared_distances
from proto_vision.case_based.deformation import ElasticDeformation, elastic_deform
from proto_vision.case_based.network import CaseBasedLoss, PrototypeAutoencoder, PrototypeAutoencoderOutput
from proto_vision.case_based.system import CaseBasedModule

__all__ = [
    "CaseBasedLoss",
    "CaseBasedModule",
    "ElasticDeformation",
    "PrototypeAutoencoder",
    "PrototypeAutoencoderOutput",
    "elastic_deform",
    "squared_distances",
]
