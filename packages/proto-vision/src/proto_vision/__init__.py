"""Vision systems of Proto: image classifiers that explain themselves by parts of real images, and what goes with them.

Names are loaded on first use, so that processes which only read files do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proto_vision.amcl import AMCL
    from proto_vision.case_based import CaseBasedModule, PrototypeAutoencoder
    from proto_vision.cpc import CPCModule
    from proto_vision.data.cifar import CIFAR
    from proto_vision.data.digits import Digits
    from proto_vision.data.discovery import PartlyLabelled
    from proto_vision.data.domains import DomainFolder
    from proto_vision.data.few_shot_images import FewShotImages
    from proto_vision.data.finegrained import CUB200, StanfordCars, StanfordDogs
    from proto_vision.data.folder import ImageFolder
    from proto_vision.data.glyphs import Glyphs
    from proto_vision.data.idx import MNIST
    from proto_vision.data.lists import ImageList
    from proto_vision.data.mini_imagenet import MiniImageNet
    from proto_vision.data.omniglot import Omniglot
    from proto_vision.data.web import WebFolder
    from proto_vision.disc_vs_gen import LinearEvaluation
    from proto_vision.evalprotopnet import EvalProtoPNet, EvalProtoPNetModule
    from proto_vision.few_shot import FewShotModule, PrototypicalNetwork, episode_accuracy
    from proto_vision.fopro import FoPro, FoProModule
    from proto_vision.multi_similarity import MultiSimilarityModule
    from proto_vision.opl import OPLClassifier
    from proto_vision.palm import PALM
    from proto_vision.prob_psenn import ProbPSENN, ProbPSENNModule
    from proto_vision.protogcd import ProtoGCDModule
    from proto_vision.robust_pbn import RobustPBNModule
    from proto_vision.st_protopnet import STProtoPNet, STProtoPNetModule
    from proto_vision.unpg import UNPGModule

__all__ = [
    "AMCL",
    "CIFAR",
    "CUB200",
    "MNIST",
    "PALM",
    "CPCModule",
    "CaseBasedModule",
    "Digits",
    "DomainFolder",
    "EvalProtoPNet",
    "EvalProtoPNetModule",
    "FewShotImages",
    "FewShotModule",
    "FoPro",
    "FoProModule",
    "Glyphs",
    "ImageFolder",
    "ImageList",
    "LinearEvaluation",
    "MiniImageNet",
    "MultiSimilarityModule",
    "OPLClassifier",
    "Omniglot",
    "PartlyLabelled",
    "ProbPSENN",
    "ProbPSENNModule",
    "ProtoGCDModule",
    "PrototypeAutoencoder",
    "PrototypicalNetwork",
    "RobustPBNModule",
    "STProtoPNet",
    "STProtoPNetModule",
    "StanfordCars",
    "StanfordDogs",
    "UNPGModule",
    "WebFolder",
    "episode_accuracy",
]

_HOMES = {
    "AMCL": "proto_vision.amcl",
    "CIFAR": "proto_vision.data.cifar",
    "CPCModule": "proto_vision.cpc",
    "CUB200": "proto_vision.data.finegrained",
    "CaseBasedModule": "proto_vision.case_based",
    "Digits": "proto_vision.data.digits",
    "DomainFolder": "proto_vision.data.domains",
    "EvalProtoPNet": "proto_vision.evalprotopnet",
    "EvalProtoPNetModule": "proto_vision.evalprotopnet",
    "FewShotImages": "proto_vision.data.few_shot_images",
    "FewShotModule": "proto_vision.few_shot",
    "FoPro": "proto_vision.fopro",
    "FoProModule": "proto_vision.fopro",
    "Glyphs": "proto_vision.data.glyphs",
    "ImageFolder": "proto_vision.data.folder",
    "ImageList": "proto_vision.data.lists",
    "LinearEvaluation": "proto_vision.disc_vs_gen",
    "MNIST": "proto_vision.data.idx",
    "MiniImageNet": "proto_vision.data.mini_imagenet",
    "MultiSimilarityModule": "proto_vision.multi_similarity",
    "OPLClassifier": "proto_vision.opl",
    "Omniglot": "proto_vision.data.omniglot",
    "PALM": "proto_vision.palm",
    "PartlyLabelled": "proto_vision.data.discovery",
    "ProbPSENN": "proto_vision.prob_psenn",
    "ProbPSENNModule": "proto_vision.prob_psenn",
    "ProtoGCDModule": "proto_vision.protogcd",
    "PrototypeAutoencoder": "proto_vision.case_based",
    "PrototypicalNetwork": "proto_vision.few_shot",
    "RobustPBNModule": "proto_vision.robust_pbn",
    "STProtoPNet": "proto_vision.st_protopnet",
    "STProtoPNetModule": "proto_vision.st_protopnet",
    "StanfordCars": "proto_vision.data.finegrained",
    "StanfordDogs": "proto_vision.data.finegrained",
    "UNPGModule": "proto_vision.unpg",
    "WebFolder": "proto_vision.data.web",
    "episode_accuracy": "proto_vision.few_shot",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
