"""Data that every domain shares: multi-label utilities, samplers, built-in sets."""

from proto_core.data.multilabel import choose_thresholds, class_pos_weight, label_cooccurrence
from proto_core.data.rotated import rotated_classes

__all__ = ["choose_thresholds", "class_pos_weight", "label_cooccurrence", "rotated_classes"]
