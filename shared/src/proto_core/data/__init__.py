"""Data that every domain shares: multi-label utilities, samplers, built-in sets."""

from proto_core.data.episodes import EpisodeSampler
from proto_core.data.multilabel import choose_thresholds, class_pos_weight, label_cooccurrence
from proto_core.data.rotated import rotated_classes

__all__ = ["EpisodeSampler", "choose_thresholds", "class_pos_weight", "label_cooccurrence", "rotated_classes"]
