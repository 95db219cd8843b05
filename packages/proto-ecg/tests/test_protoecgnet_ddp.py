"""ProtoECGNet on two gloo processes: losses, gradients and projected cases are those of one with the joined batch."""

from functools import partial

import pytest
import torch

from shared.tests.processes import on_two_processes

RECORDS, LENGTH = 16, 320
STAGES = ("rhythm.joint", "morphology.joint", "diffuse.joint", "morphology.classifier", "fusion")


def network(masking):
    from proto_ecg.protoecgnet import Branch1d, Branch2d, LossWeights, ProtoECGNet

    torch.manual_seed(3)
    net = ProtoECGNet(
        Branch1d(2, proto_dim=8, backbone="resnet1d10_narrow"),
        Branch2d(2, proto_dim=8, backbone="resnet10_narrow", window=3),
        Branch2d(2, proto_dim=8, backbone="resnet10_narrow", window=None),
        label_names=["AFIB", "SR", "IMI", "LVH", "NORM"],
        branch_labels={"rhythm": ["AFIB", "SR"], "morphology": ["IMI", "LVH"], "diffuse": ["NORM"]},
        num_samples=LENGTH,
        loss=LossWeights(cluster=1.0, separation=1.0, diversity=1.0, contrastive=1.0, sparsity=0.1, masking=masking),
    )
    net.use_training_targets(records().targets)
    return net


def records():
    from proto_ecg.data.module import ECGBatch

    g = torch.Generator().manual_seed(1)
    signal = torch.randn(RECORDS, 12, LENGTH, generator=g)
    targets = (torch.rand(RECORDS, 5, generator=g) < 0.3).float()
    targets[0] = 1  # every label has a positive, and the two halves have different numbers of them
    return ECGBatch(signal, targets, torch.arange(RECORDS))


def share(rank, world):
    from proto_ecg.data.module import ECGBatch

    return ECGBatch(*(part[rank::world] for part in records()))


def work(rank, world):
    """Losses and gradients of every stage, with batch norm at rest, then the projection."""
    from proto_core.distributed import is_distributed
    from proto_core.prototypes import project_prototypes
    from proto_core.training import enter_stage

    def mean(x):
        if is_distributed():
            torch.distributed.all_reduce(x)
        return x / world

    found = {}
    for masking in ("reference", "strict"):
        net = network(masking)
        for name in STAGES:
            enter_stage(net, next(stage for stage in net.stages if stage.name == name))
            net.eval()
            net.zero_grad()
            loss = net.training_step(share(rank, world), 0)
            loss.backward()
            found[f"{masking} {name}"] = mean(loss.detach().clone())
            for key, parameter in net.named_parameters():
                if parameter.grad is not None:
                    found[f"{masking} {name} {key}"] = mean(parameter.grad.clone())
    net.stage = None
    part = share(rank, world)
    batches = [type(part)(*(column[i : i + 3] for column in part)) for i in range(0, len(part.signal), 3)]
    cases = project_prototypes(net, batches, lambda index: (f"record {index}", ()))
    for name, case in cases.items():
        found |= {f"{name} index": case.sample_index, f"{name} place": case.position, f"{name} vectors": case.vectors}
        found[f"{name} ids"] = [net.branch(name).layer.case_ids[p] for p in range(len(case.position))]
    return found


@pytest.mark.unchecked
def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    ranks = on_two_processes(partial(work, world=2), tmp_path)
    one = work(0, 1)
    for two in ranks:
        assert two.keys() == one.keys()
        for key, value in one.items():
            if isinstance(value, list):
                assert two[key] == value, key
            else:
                torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert {name for key in one for name in key.split() if name in STAGES} == set(STAGES)
    assert all("record" in case for name in ("rhythm", "morphology", "diffuse") for case in one[f"{name} ids"])
