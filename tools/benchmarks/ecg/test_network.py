"""ProtoECGNet at the paper's size: what prototypes cost on top of the bare backbone.

Groups: one projection pass against one forward-only pass over the same records; one training step of each branch
against the same backbone with a linear head; an explanation (absolute time); the loader against the model.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proto_core.prototypes import project_prototypes
from proto_core.training import enter_stage
from proto_ecg.data.module import ECGBatch
from proto_ecg.protoecgnet import PTBXL_ALL, Branch1d, Branch2d, ProtoECGLoss, ProtoECGNet
from proto_ecg.protoecgnet.backbones import ResNet1d, ResNet2d

RECORDS, BATCH = 128, 32


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ProtoECGNet(Branch1d(5), Branch2d(18, window=3), Branch2d(7, window=None), label_names=PTBXL_ALL)


@pytest.fixture(scope="module")
def batches():
    g = torch.Generator().manual_seed(0)
    signals = torch.randn(RECORDS, 12, 1000, generator=g)
    targets = (torch.rand(RECORDS, 71, generator=g) < 3 / 71).float()
    rows = torch.arange(RECORDS).split(BATCH)
    return [ECGBatch(signals[r], targets[r], r) for r in rows]


def _rounds(benchmark, function):
    benchmark.pedantic(function, rounds=3, iterations=1, warmup_rounds=1)


@pytest.mark.benchmark(group="projection of all prototypes")
def test_projection_proto(benchmark, network, batches):
    network.stage = None
    _rounds(benchmark, lambda: project_prototypes(network, batches, lambda index: (str(index), ())))


@pytest.mark.benchmark(group="projection of all prototypes")
def test_projection_reference(benchmark, network, batches):
    network.stage = None
    network.eval()

    @torch.no_grad()
    def forward():
        for batch in batches:
            network(batch.signal.unsqueeze(1))

    _rounds(benchmark, forward)


def _step(module, loss):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("name", ["rhythm", "morphology", "diffuse"])
def test_step_proto(benchmark, network, batches, name):
    benchmark.group = f"training step, {name}"
    stage = next(s for s in network.stages if s.name == f"{name}.joint")
    enter_stage(network, stage)
    network.train()
    assert isinstance(network.loss, ProtoECGLoss)
    _rounds(benchmark, _step(network, lambda: network.training_step(batches[0], 0)))
    network.stage = None


@pytest.mark.parametrize("name", ["rhythm", "morphology", "diffuse"])
def test_step_reference(benchmark, network, batches, name):
    benchmark.group = f"training step, {name}"
    backbone = ResNet1d() if name == "rhythm" else ResNet2d()
    columns = network.columns(name)
    head = nn.Linear(backbone.out_channels, len(columns))
    x = batches[0].signal if name == "rhythm" else batches[0].signal.unsqueeze(1)
    targets = batches[0].targets[:, columns]

    def loss():
        features = backbone(x)
        return F.binary_cross_entropy_with_logits(
            head(features.flatten(2).mean(-1) if features.ndim == 4 else features), targets
        )

    _rounds(benchmark, _step(nn.ModuleList([backbone, head]), loss))


@pytest.mark.benchmark(group="explain one record (absolute)")
def test_explain_proto(benchmark, network, batches):
    network.stage = None
    signal = batches[0].signal[:1]
    _rounds(benchmark, lambda: network.explain(signal, ["one"]))
    assert np.median(benchmark.stats.stats.data) < 0.5
