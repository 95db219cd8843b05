"""Claim of the ECG phenotypes: single prototypes follow sub-patterns of a class better than the class does.

Six classes of four prototypes: three tight ones, whose outcome is the class, and three heterogeneous ones, whose
outcomes are sub-patterns. Classes whose prototypes disagree about a phecode shall have prototypes further apart, and
permuted outcomes shall give nothing. Data as the card of the method says; the cohort of the paper is not public.
"""

import numpy as np
import pytest

from proto_ecg.phenotypes import (
    PrototypePhenotyper,
    class_activation,
    intra_class_distance,
    intra_class_distance_test,
    mixed_significance,
    phecode_auc,
)

SEEDS = range(5)
RECORDS, CLASSES, PARTS, DIM, OUTCOMES = 4000, 6, 4, 16, 12
SPREAD = np.where(np.arange(CLASSES) < 3, 0.2, 1.5)


def population(seed):
    """Activations ``[4000, 24]``, outcomes ``[4000, 12]``, prototypes ``[24, 16]`` and their classes ``[24, 6]``."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, DIM))
    prototypes = centres[:, None] + SPREAD[:, None, None] * rng.normal(size=(CLASSES, PARTS, DIM))
    own, part = rng.integers(0, CLASSES, RECORDS), rng.integers(0, PARTS, RECORDS)
    middle = np.where((own < 3)[:, None], centres[own], prototypes[own, part])
    x = middle + 0.7 * rng.normal(size=(RECORDS, DIM))
    flat = prototypes.reshape(-1, DIM)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    activations = x / np.linalg.norm(x, axis=1, keepdims=True) @ unit.T
    hits = [(own == 3 + k % 3) & (part == k // 3) if k < 6 else own == (k - 6) % 3 for k in range(OUTCOMES)]
    chance = 1 / (1 + np.exp(3 - 4 * np.stack(hits, axis=1)))
    outcomes = (rng.random((RECORDS, OUTCOMES)) < chance).astype(float)
    return activations, outcomes, flat, np.repeat(np.eye(CLASSES), PARTS, axis=0), rng.permutation(RECORDS)


@pytest.mark.claim
def test_prototypes_are_finer_phenotypes_than_classes(claim_record):
    best, best_class, tight_gain, mixed, uniform, p_values, real, chance = [], [], [], [], [], [], [], []
    for seed in SEEDS:
        activations, outcomes, prototypes, identity, order = population(seed)
        table = PrototypePhenotyper().fit(activations, outcomes)
        ours = table.auc.max(axis=0)
        classes = phecode_auc(class_activation(activations, identity), outcomes).max(axis=0)
        best.append(ours[:6].mean())
        best_class.append(classes[:6].mean())
        tight_gain.append((ours - classes)[6:].mean())
        status = mixed_significance(table.significant, identity)
        test = intra_class_distance_test(intra_class_distance(prototypes, identity), status)
        mixed.append(test.mean_mixed)
        uniform.append(test.mean_uniform)
        p_values.append(test.p_value)
        real.append(float(table.significant.sum()))
        chance.append(float(PrototypePhenotyper().fit(activations, outcomes[order]).significant.sum()))
    gains = np.subtract(best, best_class)
    finer = bool((gains >= 0.01).all() and (gains > tight_gain).all())
    claim_record(
        "ecg_phenotypes",
        metric="best AUC for sub-patterns (baseline: best class activation)",
        method=best,
        baseline=best_class,
        margin="larger by at least 0.01 on every seed, and by more than for whole classes",
        holds=finer,
    )
    apart = all(m > u and p < 0.001 for m, u, p in zip(mixed, uniform, p_values))
    claim_record(
        "ecg_phenotypes",
        metric="intra-class distance of mixed cells (baseline: uniform cells)",
        method=mixed,
        baseline=uniform,
        margin="larger with one-sided p < 0.001 on every seed",
        holds=apart,
    )
    quiet = max(chance) <= 1
    claim_record(
        "ecg_phenotypes",
        metric="significant cells of 288 with permuted outcomes (baseline: outcomes as they are)",
        method=chance,
        baseline=real,
        margin="at most 1 on every seed",
        holds=quiet,
    )
    assert finer, (gains, tight_gain)
    assert apart, (mixed, uniform, p_values)
    assert quiet, chance
