"""What theory says, as functions: consistency bounds, minimisability gaps, required inductive bias."""

from proto_core.theory.h_consistency import (
    bayes_conditional_risk,
    h_consistency_bound,
    h_consistency_bound_closed,
    h_consistency_transform,
    minimizability_gap,
    minimizability_gap_upper,
    minimizability_gap_upper_deterministic,
)

__all__ = [
    "bayes_conditional_risk",
    "h_consistency_bound",
    "h_consistency_bound_closed",
    "h_consistency_transform",
    "minimizability_gap",
    "minimizability_gap_upper",
    "minimizability_gap_upper_deterministic",
]
