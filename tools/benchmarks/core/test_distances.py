"""Distances of 2,048 points to 512 centres in 64 dimensions against SciPy, forward, float32."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from proto_core.distances import METRICS

PEERS = {
    "sq_euclidean": "sqeuclidean",
    "euclidean": "euclidean",
    "manhattan": "cityblock",
    "cosine": "cosine",
    "minkowski": "minkowski",
    "chebyshev": "chebyshev",
    "canberra": "canberra",
    "bray_curtis": "braycurtis",
    "mahalanobis": "mahalanobis",
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("kind", ["proto", "scipy"])
def test_distance(benchmark, kind, name):
    benchmark.group, benchmark.name = f"{name} 2048x512x64", f"{name}_{kind}"
    g = torch.Generator().manual_seed(0)
    x, c = torch.rand(2048, 64, generator=g) + 0.1, torch.rand(512, 64, generator=g) + 0.1
    own: dict = {"minkowski": {"p": 3.0}, "mahalanobis": {"precision": torch.eye(64)}}.get(name, {})
    other: dict = {"minkowski": {"p": 3.0}, "mahalanobis": {"VI": np.eye(64)}}.get(name, {})
    if kind == "proto":
        with torch.no_grad():
            benchmark(METRICS[name], x, c, **own)
    else:
        benchmark(cdist, x.numpy(), c.numpy(), PEERS[name], **other)
