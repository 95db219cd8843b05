"""Associations of prototypes with phecodes: all cells at once against one statsmodels Logit per cell.

The pair fits the same 200 cells of 4,000 patients; the last benchmark is a study of the paper's number of prototypes.
"""

import numpy as np
import pytest
from scipy.stats import zscore
from statsmodels.api import Logit, add_constant

from proto_ecg.phenotypes import PrototypePhenotyper

PATIENTS, PROTOTYPES, PHECODES = 4000, 100, 2


def population(prototypes, phecodes):
    rng = np.random.default_rng(0)
    activations = rng.normal(size=(PATIENTS, prototypes))
    logits = activations[:, :phecodes] - 2
    return activations, (rng.random((PATIENTS, phecodes)) < 1 / (1 + np.exp(-logits))).astype(float)


@pytest.mark.benchmark(group="associations, 100 prototypes x 2 phecodes")
def test_associations_proto(benchmark):
    activations, outcomes = population(PROTOTYPES, PHECODES)
    benchmark.pedantic(PrototypePhenotyper().fit, (activations, outcomes), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="associations, 100 prototypes x 2 phecodes")
def test_associations_statsmodels(benchmark):
    activations, outcomes = population(PROTOTYPES, PHECODES)
    z = zscore(activations)

    def loop():
        return [
            Logit(outcomes[:, k], add_constant(z[:, p])).fit(disp=0, tol=1e-10).params[1]
            for p in range(PROTOTYPES)
            for k in range(PHECODES)
        ]

    slow = benchmark.pedantic(loop, rounds=2, warmup_rounds=0)
    fast = PrototypePhenotyper().fit(activations, outcomes).beta.ravel()
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-8)


@pytest.mark.benchmark(group="associations, 1037 prototypes x 20 phecodes (absolute)")
def test_study_size(benchmark):
    activations, outcomes = population(1037, 20)
    benchmark.pedantic(PrototypePhenotyper().fit, (activations, outcomes), rounds=1)
