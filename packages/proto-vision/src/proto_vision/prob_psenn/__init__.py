"""Prob-PSENN: prototypes that are distributions, so that explanations have an uncertainty of their own.

Source: "Uncertainty-Aware Explanations Through Probabilistic Self-Explainable Neural Networks", 2024, arXiv 2403.13740.
"""

from proto_core.metrics import aleatoric_uncertainty, epistemic_uncertainty, predictive_entropy
from proto_core.prototypes import GaussianPrototypes, gaussian_log_prob, sample_gaussian, sampled_distances
from proto_vision.prob_psenn.network import (
    ProbPSENN,
    ProbPSENNLoss,
    ProbPSENNOutput,
    VariationalProbPSENN,
    cnn32_autoencoder,
    latent_divergence,
)
from proto_vision.prob_psenn.system import ProbPSENNModule, PSENNSchedule
from proto_vision.prob_psenn.uncertainty import explanatory_epistemic_uncertainty, overlap_index

__all__ = [
    "GaussianPrototypes",
    "PSENNSchedule",
    "ProbPSENN",
    "ProbPSENNLoss",
    "ProbPSENNModule",
    "ProbPSENNOutput",
    "VariationalProbPSENN",
    "aleatoric_uncertainty",
    "cnn32_autoencoder",
    "epistemic_uncertainty",
    "explanatory_epistemic_uncertainty",
    "gaussian_log_prob",
    "latent_divergence",
    "overlap_index",
    "predictive_entropy",
    "sample_gaussian",
    "sampled_distances",
]
