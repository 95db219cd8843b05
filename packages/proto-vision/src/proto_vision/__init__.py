"""Vision systems of Proto: image classifiers that explain themselves by parts of real images, and what goes with them.

Names are loaded on first use, so that processes which only read files do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proto_vision.data.cifar import CIFAR
    from proto_vision.data.digits import Digits
    from proto_vision.data.finegrained import CUB200, StanfordCars, StanfordDogs
    from proto_vision.data.folder import ImageFolder
    from proto_vision.disc_vs_gen import LinearEvaluation
    from proto_vision.evalprotopnet import EvalProtoPNet, EvalProtoPNetModule
    from proto_vision.st_protopnet import STProtoPNet, STProtoPNetModule
    from proto_vision.unpg import UNPGModule

__all__ = [
    "CIFAR",
    "CUB200",
    "Digits",
    "EvalProtoPNet",
    "EvalProtoPNetModule",
    "ImageFolder",
    "LinearEvaluation",
    "STProtoPNet",
    "STProtoPNetModule",
    "StanfordCars",
    "StanfordDogs",
    "UNPGModule",
]

_HOMES = {
    "CIFAR": "proto_vision.data.cifar",
    "CUB200": "proto_vision.data.finegrained",
    "Digits": "proto_vision.data.digits",
    "EvalProtoPNet": "proto_vision.evalprotopnet",
    "EvalProtoPNetModule": "proto_vision.evalprotopnet",
    "ImageFolder": "proto_vision.data.folder",
    "LinearEvaluation": "proto_vision.disc_vs_gen",
    "STProtoPNet": "proto_vision.st_protopnet",
    "STProtoPNetModule": "proto_vision.st_protopnet",
    "StanfordCars": "proto_vision.data.finegrained",
    "StanfordDogs": "proto_vision.data.finegrained",
    "UNPGModule": "proto_vision.unpg",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
