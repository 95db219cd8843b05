"""Prototype losses of ProtoECGNet, forward and backward, against plain torch written from their definitions.

Each group holds ``..._proto`` and ``..._reference`` (a loop over samples and classes, or over prototypes), and for the
masked terms ``..._dense`` (the product of similarities and mask as one N x P x C tensor). Size of the 71-label set:
P = 1000, N = 128, C = 71, 512 features, about 3 labels a record.

    pytest tools/benchmarks/ecg/test_losses.py --benchmark-only --benchmark-group-by=group
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from proto_core.losses import (
    DiversityLoss,
    MultiLabelClusterLoss,
    MultiLabelSeparationLoss,
    PrototypeContrastiveLoss,
)

SAMPLES, PROTOTYPES, CLASSES, FEATURES = 128, 1000, 71, 512


@pytest.fixture(scope="module")
def sizes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "similarities": (torch.rand(SAMPLES, PROTOTYPES, generator=generator) * 2 - 1).requires_grad_(),
        "targets": (torch.rand(SAMPLES, CLASSES, generator=generator) < 3 / CLASSES).float(),
        "identity": torch.nn.functional.one_hot(torch.arange(PROTOTYPES) % CLASSES, CLASSES).float(),
        "prototypes": torch.randn(PROTOTYPES, FEATURES, generator=generator).requires_grad_(),
        "cooccurrence": torch.eye(CLASSES) * 0.9 + 0.1,
    }


def step(loss: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(x, *rest)
    return value.detach(), torch.autograd.grad(value, x)[0]


def loop(sign: int, strict: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Cluster (sign -1) or separation (sign 1), sample by sample and class by class."""

    def loss(s: Tensor, y: Tensor, identity: Tensor) -> Tensor:
        values = []
        for n in range(len(s)):
            row = s[n]
            if strict and sign > 0:
                free = (identity * y[n]).sum(dim=1) == 0
                values += [row[free].max()] if free.any() else []
                continue
            for c in range(y.shape[1]):
                mask = identity[:, c] * y[n, c]
                if not strict:
                    values.append((row * (mask if sign < 0 else 1 - mask)).max())
                elif y[n, c] == 1:
                    values.append(row[mask == 1].max())
        return sign * torch.stack(values).mean()

    return loss


def dense(sign: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(s: Tensor, y: Tensor, identity: Tensor) -> Tensor:
        mask = identity * y[:, None, :]
        return sign * (s[:, :, None] * (mask if sign < 0 else 1 - mask)).max(dim=1).values.mean()

    return loss


def diversity_loop(prototypes: Tensor) -> Tensor:
    unit = prototypes / prototypes.norm(dim=1, keepdim=True)
    total = prototypes.new_zeros(())
    for p in range(len(unit)):
        row = unit @ unit[p]
        wanted = torch.zeros_like(row)
        wanted[p] = 1
        total = total + (row - wanted).square().sum()
    return total / len(unit) ** 2


def contrastive_loop(prototypes: Tensor, identity: Tensor, cooccurrence: Tensor) -> Tensor:
    unit = prototypes / prototypes.norm(dim=1, keepdim=True)
    sums = [prototypes.new_zeros(()) for _ in range(4)]
    for p in range(len(unit)):
        row = (unit @ unit[p]).clamp(-1 + 1e-6, 1 - 1e-6)
        related = identity @ (cooccurrence @ identity[p])
        for number, term in enumerate((row * related, related, row * (1 - related), 1 - related)):
            sums[number] = sums[number] + term.sum()
    return -(sums[0] / (sums[1] + 1e-6) - sums[2] / (sums[3] + 1e-6)) / len(unit) ** 0.5


MASKED = {
    "cluster": (MultiLabelClusterLoss(), loop(-1, False), dense(-1)),
    "separation": (MultiLabelSeparationLoss(), loop(1, False), dense(1)),
    "strict_cluster": (MultiLabelClusterLoss(masking="strict"), loop(-1, True), None),
    "strict_separation": (MultiLabelSeparationLoss(masking="strict"), loop(1, True), None),
}
ON_PROTOTYPES = {
    "diversity": (DiversityLoss(), diversity_loop, ()),
    "contrastive": (PrototypeContrastiveLoss(), contrastive_loop, ("identity", "cooccurrence")),
}


def run(benchmark, sizes: dict[str, Tensor], term: str, which: int) -> None:
    if term in MASKED:
        names, losses = ("similarities", "targets", "identity"), MASKED[term]
    else:
        *losses, rest = ON_PROTOTYPES[term]
        names = ("prototypes", *rest)
    arguments = [sizes[name] for name in names]
    value = benchmark.pedantic(step, (losses[which], *arguments), rounds=3 if which else 20, warmup_rounds=1)
    torch.testing.assert_close(value, step(losses[0], *arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.benchmark(group="loss: cluster")
def test_cluster_proto(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "cluster", 0)


@pytest.mark.benchmark(group="loss: cluster")
def test_cluster_reference(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "cluster", 1)


@pytest.mark.benchmark(group="loss: cluster")
def test_cluster_dense(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "cluster", 2)


@pytest.mark.benchmark(group="loss: separation")
def test_separation_proto(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "separation", 0)


@pytest.mark.benchmark(group="loss: separation")
def test_separation_reference(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "separation", 1)


@pytest.mark.benchmark(group="loss: separation")
def test_separation_dense(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "separation", 2)


@pytest.mark.benchmark(group="loss: strict cluster")
def test_strict_cluster_proto(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "strict_cluster", 0)


@pytest.mark.benchmark(group="loss: strict cluster")
def test_strict_cluster_reference(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "strict_cluster", 1)


@pytest.mark.benchmark(group="loss: strict separation")
def test_strict_separation_proto(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "strict_separation", 0)


@pytest.mark.benchmark(group="loss: strict separation")
def test_strict_separation_reference(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "strict_separation", 1)


@pytest.mark.benchmark(group="loss: diversity")
def test_diversity_proto(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "diversity", 0)


@pytest.mark.benchmark(group="loss: diversity")
def test_diversity_reference(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "diversity", 1)


@pytest.mark.benchmark(group="loss: contrastive")
def test_contrastive_proto(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "contrastive", 0)


@pytest.mark.benchmark(group="loss: contrastive")
def test_contrastive_reference(benchmark, sizes: dict[str, Tensor]) -> None:
    run(benchmark, sizes, "contrastive", 1)
