"""Classifiers on frozen features, and how many samples they need."""

from proto_core.classifiers.curves import make_gaussian_mixture, sample_complexity_curve, samples_to_reach
from proto_core.classifiers.heads import GaussianNaiveBayes, LogisticRegressionHead

__all__ = [
    "GaussianNaiveBayes",
    "LogisticRegressionHead",
    "make_gaussian_mixture",
    "sample_complexity_curve",
    "samples_to_reach",
]
