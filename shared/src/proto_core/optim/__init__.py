"""Optimisers and regularisers of the loss landscape: trajectories, sharpness-aware minimisation, measures of it."""

from proto_core.optim.gradient_norm import GradientNormRegularizer
from proto_core.optim.null_space import (
    NullSpaceProjection,
    NullSpaceSGD,
    input_covariance,
    null_space_mask,
    null_space_projector,
)
from proto_core.optim.sharpness import SAM, hessian_top_eigenvalue, hessian_trace, sharpness
from proto_core.optim.trajectory import MESA, IndexedDataset, TrajectoryLoss, trajectory_kl

__all__ = [
    "MESA",
    "SAM",
    "GradientNormRegularizer",
    "IndexedDataset",
    "NullSpaceProjection",
    "NullSpaceSGD",
    "TrajectoryLoss",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "input_covariance",
    "null_space_mask",
    "null_space_projector",
    "sharpness",
    "trajectory_kl",
]
