"""FoPro: prototypes from a few trusted images that clean labels from the web (arXiv 2212.00465)."""

from proto_vision.fopro.bilinear import BilinearPool
from proto_vision.fopro.network import FoPro, FoProStep, RelationModule
from proto_vision.fopro.prototypes import initial_prototypes, polish_prototypes, prototype_density
from proto_vision.fopro.schedule import FoProSchedule
from proto_vision.fopro.system import FoProModule, FoProOutput

__all__ = [
    "BilinearPool",
    "FoPro",
    "FoProModule",
    "FoProOutput",
    "FoProSchedule",
    "FoProStep",
    "RelationModule",
    "initial_prototypes",
    "polish_prototypes",
    "prototype_density",
]
