"""Projection of part prototypes onto training images against one forward pass over the same images.

ResNet-18 at 224 pixels, two sets of prototypes (ST-ProtoPNet). One streaming pass projects any number of prototypes;
its time over the forward pass is to be at most 1.3 (a ratio of at least 0.77).
"""

import pytest
import torch

from proto_core.prototypes import project_prototypes
from proto_vision import STProtoPNetModule
from proto_vision.data.dataset import ImageBatch

IMAGES, BATCH = 48, 16
SIZES = {400: (20, 10), 2000: (200, 5), 20000: (200, 50)}
"""Prototypes of both sets together -> classes, prototypes of a class and set."""


@pytest.fixture(scope="module", params=SIZES)
def network(request):
    torch.manual_seed(0)
    classes, each = SIZES[request.param]
    return STProtoPNetModule("resnet18", classes, prototypes_per_class=each).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group="projection of part prototypes")
def test_projection_proto(benchmark, network, images):
    targets = torch.arange(IMAGES) % network.num_classes
    parts = [rows.split(BATCH) for rows in (images, targets, torch.arange(IMAGES), torch.ones(IMAGES).bool())]
    batches = [ImageBatch(*part) for part in zip(*parts)]
    work = {"args": (network, batches, lambda index: (str(index), ()))}
    benchmark.pedantic(project_prototypes, **work, kwargs={"overwrite": False}, rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="projection of part prototypes")
def test_projection_forward(benchmark, network, images):
    @torch.no_grad()
    def forward():
        for part in images.split(BATCH):
            network(part)

    benchmark.pedantic(forward, rounds=3, warmup_rounds=1)
