"""Scores of changed images: all versions of all images in one batch against one version at a time.

ResNet-18 at 224 pixels, 8 images in 6 versions (texture is left out: its smoothing costs more than the network).
"""

import pytest
import torch

from proto_vision import STProtoPNetModule
from proto_vision.explaining import CHARACTERISTICS, PrototypeExplainer, local_scores

NAMES = tuple(name for name in CHARACTERISTICS if name != "texture")


@pytest.fixture(scope="module")
def explainer():
    torch.manual_seed(0)
    network = STProtoPNetModule("resnet18", 200).eval()
    return PrototypeExplainer(network.similarity_maps, lambda image: image / 255, characteristics=NAMES)


@pytest.fixture(scope="module")
def inputs(explainer):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8, generator=g)
    return torch.stack([explainer.versions(image) for image in images])


@pytest.mark.benchmark(group="changed images through the network")
def test_changes_proto(benchmark, explainer, inputs):
    benchmark.pedantic(explainer.scores_of, args=(inputs,), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="changed images through the network")
def test_changes_loop(benchmark, explainer, inputs):
    def loop():
        for versions in inputs:
            maps = torch.cat([explainer.model(version[None]) for version in versions])
            local_scores(maps[:1], maps[None, 1:])

    benchmark.pedantic(loop, rounds=3, warmup_rounds=1)
