"""Data that every domain shares: multi-label utilities."""

from proto_core.data.multilabel import choose_thresholds, class_pos_weight, label_cooccurrence

__all__ = ["choose_thresholds", "class_pos_weight", "label_cooccurrence"]
