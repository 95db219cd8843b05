"""Required inductive bias of kernel hypotheses grows with the dimension of the inputs."""

import math
import warnings
from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
import torch

from proto_core.theory.inductive_bias import fit_loss_distribution, required_inductive_bias, sample_kernel_losses

DIMENSIONS, SEEDS = (1, 2, 3, 4, 6, 8), range(3)


def losses(dimension: int, seed: int) -> np.ndarray:
    """Test losses of 2,000 functions through 60 points of a sine along the diagonal."""
    rng = np.random.default_rng(seed)
    parts = []
    for count in (60, 30):
        x = rng.normal(size=(count, dimension))
        parts += [torch.from_numpy(x), torch.from_numpy(np.sin(1.5 * x.sum(1, keepdims=True) / math.sqrt(dimension)))]
    generator = torch.Generator().manual_seed(seed)
    return sample_kernel_losses(*parts, num_samples=2000, jitter=1e-6, generator=generator).numpy()


@pytest.mark.claim
def test_bias_grows_with_dimension(claim_record):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = {d: [losses(d, seed) for seed in SEEDS] for d in DIMENSIONS}
        biases = {d: [required_inductive_bias(sample, 0.1) for sample in drawn[d]] for d in DIMENSIONS}
        means = [mean(biases[d]) for d in DIMENSIONS]
        grows = all(a <= b for a, b in pairwise(means)) and means[-1] > 10 and means[0] < 0.1
        claim_record(
            "inductive_bias",
            metric="nats that a test loss of 0.1 requires, inputs of 8 dimensions against 1",
            method=biases[8],
            baseline=biases[1],
            margin="above 10 against below 0.1, never falling from 1 over 2, 3, 4, 6 to 8 dimensions",
            holds=grows,
        )
        at_quantile = [
            fit_loss_distribution(sample).inductive_bias(float(np.quantile(sample, 0.05)))
            for d in DIMENSIONS
            if d >= 3
            for sample in drawn[d]
        ]
        counted = [-math.log(0.05)] * len(at_quantile)
        near = all(abs(a - b) <= 1.0 for a, b in zip(at_quantile, counted))
        falling = all(
            all(a >= b for a, b in pairwise(required_inductive_bias(drawn[d][0], e) for e in (0.05, 0.1, 0.3, 1.0)))
            for d in DIMENSIONS
        )
        claim_record(
            "inductive_bias",
            metric="nats at the 5 % quantile of the losses, fitted against counted, 3 dimensions and more",
            method=at_quantile,
            baseline=counted,
            margin="within 1.0 each, and the bias never rises with the target",
            holds=near and falling,
        )
    assert grows, means
    assert near, at_quantile
    assert falling
