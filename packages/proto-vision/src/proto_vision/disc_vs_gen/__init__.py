"""Naive Bayes against logistic regression on frozen features: how many samples each needs (arXiv 2302.02334)."""

from proto_vision.disc_vs_gen.curves import LearningCurves, draw_learning_curves
from proto_vision.disc_vs_gen.evaluation import LinearEvaluation
from proto_vision.disc_vs_gen.features import (
    FrozenFeatures,
    fold_features,
    frozen_features,
    image_set_features,
    read_features,
    read_test_features,
    write_features,
)

__all__ = [
    "FrozenFeatures",
    "LearningCurves",
    "LinearEvaluation",
    "draw_learning_curves",
    "fold_features",
    "frozen_features",
    "image_set_features",
    "read_features",
    "read_test_features",
    "write_features",
]
