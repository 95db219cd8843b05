"""Losses whose terms look at the batch as a whole, on two ranks: the joint batch's, in value and gradient."""

import pytest
import torch
from torch import nn

from proto_vision.case_based import CaseBasedLoss
from proto_vision.fopro import FoPro
from proto_vision.prob_psenn import ProbPSENNLoss
from proto_vision.protogcd import ProtoGCDLoss
from shared.tests.processes import RANKS, on_two_processes

N = 8


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def autoencoder_terms(kind, rows, gather):
    prototypes = drawn(4, 3).requires_grad_()
    x, targets = drawn(N, 3)[rows], (torch.arange(N) % 4)[rows]
    distances = torch.cdist(x, prototypes).square()
    if kind == "case_based":
        loss = CaseBasedLoss(gather_distributed=gather)(-distances, targets, x, x + distances[:, :3], distances)
    else:
        loss = ProbPSENNLoss(lambda_prototype=3.0, gather_distributed=gather)(
            -distances[:, None], targets, x, x + distances[:, :3], -distances
        )
    return loss, prototypes


def protogcd(rows, gather):
    prototypes, views = drawn(5, 6).requires_grad_(), drawn(2, N, 6)[:, rows].flatten(0, 1)
    projections = (views @ drawn(6, 6)).tanh() + views @ prototypes.sum(0, keepdim=True).T
    labelled = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    loss = ProtoGCDLoss(4, ramp_epochs=4, final_ratio=0.5, gather_distributed=gather)
    labels = torch.tensor([0, 0, 0, 0, 0, 2, 2, 0])
    terms = loss(projections, views @ prototypes.T, prototypes, labels[rows], labelled[rows], 3)
    return terms["total"], prototypes


def fopro(rows, gather):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh())
    net = FoPro(encoder, 5, 3, low_dim=4, projection_hidden=6, queue_size=16).double()
    trusted = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    images, labels = torch.stack([drawn(N, 3, 2, 2), drawn(N, 3, 2, 2) / 2]), torch.arange(N) % 3
    step = net.compute_losses(*images[:, rows], labels[rows], trusted[rows], use_prototypes=True, cleaning="confidence")
    return step.losses["cls"] + step.losses["proto"] + step.losses["low_dim"], net.encoder[1].weight


WORK = {
    "case_based": lambda *more: autoencoder_terms("case_based", *more),
    "prob_psenn": lambda *more: autoencoder_terms("prob_psenn", *more),
    "protogcd": protogcd,
    "fopro": fopro,
}


def loss_and_gradient(kind, rows, gather):
    loss, parameter = WORK[kind](rows, gather)
    loss.backward()
    return loss.detach(), parameter.grad


def half(rank):
    return slice(N // RANKS * rank, N // RANKS * (rank + 1))


def run_rank(rank):
    return {kind: loss_and_gradient(kind, half(rank), True) for kind in WORK}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", WORK)
def test_two_ranks_give_the_joint_batch(kind, ranks):
    loss, gradient = loss_and_gradient(kind, slice(0, N), False)
    for number, expected in ((0, loss), (1, gradient)):
        found = sum(answers[kind][number] for answers in ranks) / RANKS
        torch.testing.assert_close(found, expected)
    alone = [loss_and_gradient(kind, half(rank), False)[0] for rank in range(RANKS)]
    assert not torch.isclose(sum(alone) / RANKS, loss), "halves by themselves say something else"
