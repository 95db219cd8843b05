"""On one GPU: pair losses against pytorch-metric-learning and plain torch, PALM against its network's step, steps of
ProtoECGNet against bare backbones, projection against a forward pass.

Each round ends when the GPU has. Run them with ``tools/bench.py -m gpu tools/benchmarks/gpu``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proto_core.losses import MultiSimilarityLoss, OrthogonalProjectionLoss, PALMLoss
from proto_core.prototypes import project_prototypes
from proto_core.training import enter_stage
from proto_ecg.data.module import ECGBatch
from proto_ecg.protoecgnet import PTBXL_ALL, Branch1d, Branch2d, ProtoECGNet
from proto_ecg.protoecgnet.backbones import ResNet1d, ResNet2d
from proto_vision import STProtoPNetModule
from proto_vision.cifar_resnet import CIFARResNet
from proto_vision.data.dataset import ImageBatch
from tools.benchmarks.core import test_multi_similarity as multi_similarity
from tools.benchmarks.core import test_opl as opl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PRECISIONS = ("float32", "bfloat16")

PAIRS: dict[str, tuple[Any, dict[str, Callable[[], Any]]]] = {
    "multi_similarity": (
        multi_similarity,
        {"proto": MultiSimilarityLoss, "pytorch_metric_learning": multi_similarity.peer},
    ),
    "opl": (opl, {"proto": OrthogonalProjectionLoss, "dense": lambda: opl.dense}),
}
"""Loss -> the CPU's benchmark with its batches and step, and what is compared."""


def measured(benchmark: Any, call: Callable[[], Any], rounds: int = 20) -> None:
    def finished() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=rounds, warmup_rounds=3)


@pytest.mark.parametrize("count", [512, 4096, 16384])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, losses) in PAIRS.items() for kind in losses])
def test_pairs(benchmark, name, kind, count):
    benchmark.group, benchmark.name = f"{name} N={count}", f"{name}_{count}_{kind}"
    source, losses = PAIRS[name]
    x, labels = source.batch(count)
    x, labels, loss = x.detach().cuda().requires_grad_(), labels.cuda(), losses[kind]()
    measured(benchmark, lambda: source.step(loss, x, labels))


def _step(module: nn.Module, loss: Callable[[], torch.Tensor], precision: str) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        value.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["proto", "resnet18"])
def test_palm(benchmark, kind, precision):
    benchmark.group, benchmark.name = f"PALM, batch of 256, {precision}", f"palm_{precision}_{kind}"
    torch.manual_seed(0)
    labels = torch.arange(256, device="cuda") % 100
    if kind == "proto":
        loss = PALMLoss(100).cuda()
        x = F.normalize(torch.randn(256, 128, device="cuda")).requires_grad_()
        measured(benchmark, lambda: torch.autograd.grad(loss(x, labels), x))
        return
    network, head = CIFARResNet(18), nn.Linear(512, 128)
    both = nn.ModuleList([network, head]).cuda()
    images = torch.randn(256, 3, 32, 32, device="cuda")
    work = _step(both, lambda: F.cross_entropy(head(network(images)[-1].mean((2, 3))), labels), precision)
    measured(benchmark, work)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["proto", "reference"])
@pytest.mark.parametrize("name", ["rhythm", "morphology", "diffuse"])
@pytest.mark.parametrize("records", [32, 1024])
def test_protoecgnet_step(benchmark, records, kind, name, precision):
    """The paper's network; the backbone with a linear head. 32 records are the paper's batch."""
    benchmark.group = f"ProtoECGNet, {name}, {records} records, {precision}"
    benchmark.name = f"{name}_{records}_{precision}_{kind}"
    torch.manual_seed(0)
    network = ProtoECGNet(Branch1d(5), Branch2d(18, window=3), Branch2d(7, window=None), label_names=PTBXL_ALL)
    signal = torch.randn(records, 12, 1000, device="cuda")
    targets = (torch.rand(records, 71, device="cuda") < 3 / 71).float()
    if kind == "proto":
        enter_stage(network, next(stage for stage in network.stages if stage.name == f"{name}.joint"))
        network.cuda().train()
        batch = ECGBatch(signal, targets, torch.arange(records, device="cuda"))
        measured(benchmark, _step(network, lambda: network.training_step(batch, 0), precision))
        return
    backbone = ResNet1d() if name == "rhythm" else ResNet2d()
    columns = network.columns(name)
    head = nn.Linear(backbone.out_channels, len(columns))
    both = nn.ModuleList([backbone, head]).cuda()
    wanted = targets[:, columns]
    x = signal if name == "rhythm" else signal.unsqueeze(1)

    def loss() -> torch.Tensor:
        features = backbone(x)
        features = features.flatten(2).mean(-1) if features.ndim == 4 else features
        return F.binary_cross_entropy_with_logits(head(features), wanted)

    measured(benchmark, _step(both, loss, precision))


@pytest.mark.parametrize("kind", ["proto", "forward"])
@pytest.mark.parametrize("each", [5, 50])
def test_projection(benchmark, kind, each):
    """ST-ProtoPNet on ResNet-18 at 224 pixels, 200 classes, 2,000 and 20,000 prototypes, 512 images."""
    benchmark.group, benchmark.name = f"projection of {400 * each} prototypes", f"projection_{400 * each}_{kind}"
    torch.manual_seed(0)
    network = STProtoPNetModule("resnet18", 200, prototypes_per_class=each).eval().cuda()
    images, rows = torch.randn(512, 3, 224, 224, device="cuda"), torch.arange(512, device="cuda")
    parts = [value.split(64) for value in (images, rows % 200, rows, torch.ones_like(rows).bool())]
    batches = [ImageBatch(*part) for part in zip(*parts)]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            network(batch.image)

    def project() -> None:
        project_prototypes(network, batches, lambda index: (str(index), ()), overwrite=False)

    measured(benchmark, project if kind == "proto" else forward, rounds=3)
