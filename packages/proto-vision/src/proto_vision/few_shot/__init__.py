"""Few-shot classification by prototypes (key ``susana``): SuSana Distancia, with or without its two losses.

Source: "SuSana Distancia is all you need", 2023, arXiv 2305.09062; Prototypical Networks, arXiv 1703.05175.
"""

from proto_core.data import EpisodeSampler
from proto_vision.data.batches import Episode, Episodes, as_episode
from proto_vision.few_shot.frozen import FewShotAccuracy, episode_accuracy
from proto_vision.few_shot.network import PrototypicalNetwork, confidence_interval
from proto_vision.few_shot.system import FewShotModule, FewShotSchedule

__all__ = [
    "Episode",
    "EpisodeSampler",
    "Episodes",
    "FewShotAccuracy",
    "FewShotModule",
    "FewShotSchedule",
    "PrototypicalNetwork",
    "as_episode",
    "confidence_interval",
    "episode_accuracy",
]
