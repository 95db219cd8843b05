"""Terms that look for the nearest sample of the batch, on two ranks: the joint batch's, in value and gradient."""

import pytest
import torch

from proto_vision.case_based import CaseBasedLoss
from proto_vision.prob_psenn import ProbPSENNLoss
from shared.tests.processes import RANKS, on_two_processes

KINDS = ("case_based", "prob_psenn")


def losses_and_gradients(kind, rows, **settings):
    """Of half a batch or the whole; the prototypes' share comes from all ranks."""
    g = torch.Generator().manual_seed(0)
    points, targets = torch.randn(8, 3, generator=g).double(), torch.randint(4, (8,), generator=g)
    prototypes = torch.randn(4, 3, generator=g).double().requires_grad_()
    x = points[rows]
    distances = torch.cdist(x, prototypes).square()
    if kind == "case_based":
        loss = CaseBasedLoss(**settings)(-distances, targets[rows], x, x + distances[:, :3], distances)
    else:
        loss = ProbPSENNLoss(lambda_prototype=3.0, **settings)(
            -distances[:, None], targets[rows], x, x + distances[:, :3], -distances
        )
    loss.backward()
    return loss.detach(), prototypes.grad


def run_rank(rank):
    half = slice(4 * rank, 4 * rank + 4)
    return {kind: losses_and_gradients(kind, half, gather_distributed=True) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_joint_batch(kind, ranks):
    loss, gradient = losses_and_gradients(kind, slice(0, 8))
    for number, expected in ((0, loss), (1, gradient)):
        found = sum(answers[kind][number] for answers in ranks) / RANKS
        torch.testing.assert_close(found, expected)
    alone = [losses_and_gradients(kind, slice(4 * rank, 4 * rank + 4))[0] for rank in range(RANKS)]
    assert not torch.isclose(sum(alone) / RANKS, loss), "the nearest of a half is not the nearest of the whole"
