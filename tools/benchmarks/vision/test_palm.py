"""PALM's prototype update and loss against a step of the network that it trains.

CIFAR's ResNet-18, 256 images of 32 pixels, 600 prototypes (100 classes). The loss is to take at most a tenth of a step
(a ratio of at least 10).
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from proto_core.losses import PALMLoss
from proto_vision.cifar_resnet import CIFARResNet

BATCH, CLASSES = 256, 100


@pytest.mark.benchmark(group="PALM, batch of 256")
def test_palm_proto(benchmark):
    torch.manual_seed(0)
    loss, labels = PALMLoss(CLASSES), torch.arange(BATCH) % CLASSES
    embeddings = F.normalize(torch.randn(BATCH, 128)).requires_grad_()
    benchmark.pedantic(lambda: torch.autograd.grad(loss(embeddings, labels), embeddings), rounds=20, warmup_rounds=2)


@pytest.mark.benchmark(group="PALM, batch of 256")
def test_palm_resnet18(benchmark):
    torch.manual_seed(0)
    network, head = CIFARResNet(18), nn.Linear(512, 128)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1, momentum=0.9, nesterov=True)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % CLASSES

    def step():
        optimizer.zero_grad()
        F.cross_entropy(head(network(images)[-1].mean((2, 3))), labels).backward()
        optimizer.step()

    benchmark.pedantic(step, rounds=1)
