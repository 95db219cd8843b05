"""Collectives on two gloo processes: the joint batch's values and gradients, whatever lies on which rank."""

import pytest
import torch
from torch import Tensor

from proto_core.distributed import all_reduce_sum, gather_parts, gather_with_grad, joint_mean
from proto_core.losses import MultiLabelClusterLoss, MultiLabelSeparationLoss
from proto_core.metrics import MacroAUROC, macro_auroc
from shared.tests.processes import RANKS, on_two_processes

SPLIT = (5, 2)
LOSSES = [
    kind(masking=masking, gather_distributed=True)
    for kind in (MultiLabelClusterLoss, MultiLabelSeparationLoss)
    for masking in ("reference", "strict")
]


def joint_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(sum(SPLIT), 6, generator=generator, dtype=torch.float64) * 2 - 1
    targets = (torch.rand(sum(SPLIT), 3, generator=generator) < 0.4).double()
    targets[0] = 1  # a sample without foreign prototypes: counts differ between the ranks
    return similarities, targets, torch.eye(3, dtype=torch.float64).repeat(2, 1)


def run_rank(rank: int) -> dict[str, object]:
    found: dict[str, object] = {}
    similarities, targets, identity = joint_batch()
    part, labels = similarities.split(SPLIT)[rank].clone().requires_grad_(), targets.split(SPLIT)[rank]

    for number, loss in enumerate(LOSSES):
        value = loss(part, labels, identity)
        found[f"loss {number}"] = (value.detach(), torch.autograd.grad(value, part)[0])

    joint = gather_with_grad(part)
    weight = torch.arange(joint.numel(), dtype=joint.dtype).reshape(joint.shape)
    (gradient,) = torch.autograd.grad((joint * weight * (rank + 1)).sum(), part)
    found["gather"] = (joint.detach(), gradient)
    found["gather of nothing"] = gather_with_grad(part[: part.shape[0] * rank].detach())
    found["gather other types"] = [
        gather_with_grad(part.detach().to(dtype)) for dtype in (torch.bool, torch.int64, torch.bfloat16)
    ]
    scalars, nothing = gather_parts(torch.tensor(rank)), gather_parts(torch.zeros(0, 3 + rank))
    uneven = gather_parts(part.detach() if rank else torch.zeros(0))
    found["parts"] = (scalars, [tuple(x.shape) for x in nothing], uneven)
    with pytest.raises(ValueError, match="x: found parts"):
        gather_parts(torch.zeros(1, 2 + rank))
    found["sum"] = all_reduce_sum(torch.tensor(rank + 1))
    found["empty mean"] = joint_mean(torch.zeros(()), torch.tensor(0))

    metric = MacroAUROC()
    for rows in torch.arange(sum(SPLIT)).tensor_split([3])[rank].split(2):
        metric.update(similarities[rows, :3], targets[rows], rows)
    metric.update(similarities[:1, :3], targets[:1], torch.tensor([0]))  # as a distributed sampler pads
    before = metric.gathered()
    found["metric"] = (metric.compute(), *before, *metric.gathered())
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_two_processes(run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=lambda number: repr(LOSSES[number]))
def test_mean_over_ranks_is_the_joint_batchs_loss(ranks: list[dict], number: int) -> None:
    similarities, targets, identity = joint_batch()
    similarities.requires_grad_()
    expected = LOSSES[number](similarities, targets, identity)
    (gradient,) = torch.autograd.grad(expected, similarities)
    values, parts = zip(*(found[f"loss {number}"] for found in ranks))
    torch.testing.assert_close(torch.stack(values).mean(), expected)
    # DDP divides each rank's gradient by the number of ranks
    torch.testing.assert_close(torch.cat(parts) / RANKS, gradient)


def test_gather_is_the_joint_batch_and_sums_gradients(ranks: list[dict]) -> None:
    similarities, _, _ = joint_batch()
    weight = torch.arange(similarities.numel(), dtype=similarities.dtype).reshape(similarities.shape)
    for rank, found in enumerate(ranks):
        joint, gradient = found["gather"]
        assert torch.equal(joint, similarities)
        torch.testing.assert_close(gradient, (weight * 3).split(SPLIT)[rank])
        assert torch.equal(found["gather of nothing"], similarities[SPLIT[0] :])
        for gathered in found["gather other types"]:
            assert torch.equal(gathered, similarities.to(gathered.dtype))


def test_parts_of_ranks_that_hold_nothing(ranks: list[dict]) -> None:
    similarities, _, _ = joint_batch()
    for rank, found in enumerate(ranks):
        scalars, nothing, uneven = found["parts"]
        assert [int(x) for x in scalars] == [0, 1]
        assert nothing == [(0, 3 + rank)] * RANKS
        assert uneven[0].shape == (0, 6)
        assert torch.equal(uneven[1], similarities[SPLIT[0] :])


def test_sums_and_empty_means(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["sum"] == 3
        assert found["empty mean"] == 0


def test_metric_of_both_ranks_is_the_folds(ranks: list[dict]) -> None:
    similarities, targets, _ = joint_batch()
    scores = similarities[:, :3].float()
    for found in ranks:
        value, *gathered = found["metric"]
        assert value == torch.tensor(macro_auroc(scores, targets))
        for seen_scores, seen_targets in (gathered[:2], gathered[2:]):
            assert torch.equal(seen_scores, scores)
            assert torch.equal(seen_targets.double(), targets)


def test_without_a_process_group_nothing_changes() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_with_grad(x) is x
    assert all_reduce_sum(torch.tensor(3)) == 3
    assert joint_mean(torch.tensor(6.0), torch.tensor(4)) == 1.5
    assert joint_mean(torch.tensor(0.0), torch.tensor(0)) == 0
    assert joint_mean(torch.tensor(0.25), torch.tensor(0.5)) == 0.5  # of weights, less than one in sum
    assert gather_parts(x)[0] is x


@pytest.mark.bad_input
def test_scalar_cannot_be_gathered() -> None:
    with pytest.raises(ValueError, match="x: found a scalar"):
        gather_with_grad(torch.tensor(1.0))
