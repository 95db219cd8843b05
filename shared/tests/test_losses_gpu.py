"""What holds for every loss on a GPU: the CPU's values, bf16 autocast, no read-back, bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.tests.test_losses_all import CASES, close, measure, run, same, to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.unchecked,
]

every = pytest.mark.parametrize("case", CASES, ids=str)


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(on_gpu(item) for item in value) if isinstance(value, list | tuple) else value


def built(case: Any) -> nn.Module:
    return case.build().float().cuda()


@every
def test_gives_what_the_cpu_gives(case):
    inputs = case.inputs(1)
    found = measure(case, built(case), on_gpu(to(inputs, torch.float32)))
    assert found[0].is_cuda
    assert found[0].dtype == torch.float32
    expected = run(case, inputs, torch.float64)
    same((found[0].cpu(), [g.cpu() for g in found[1]]), expected, case.tolerance)


@every
def test_autocast_changes_nothing(case):
    inputs = on_gpu(to(case.inputs(3), torch.float32))
    expected = measure(case, built(case), inputs)
    found = measure(case, built(case), inputs, context=torch.autocast("cuda", torch.bfloat16))
    assert found[0].dtype == torch.float32
    same(found, expected, (1e-4, 1e-5))


@every
def test_bfloat16_is_computed_in_float32(case):
    rounded = to(case.inputs(2), torch.bfloat16)
    loss, _ = measure(case, case.build().cuda(), on_gpu(rounded))
    assert loss.dtype == torch.float32
    close(loss.cpu(), run(case, rounded, torch.float64)[0], case.half_tolerance, "loss")


@pytest.mark.parametrize("case", [case for case in CASES if not case.host_sync], ids=str)
def test_never_waits_for_the_gpu(case):
    module, inputs = built(case), on_gpu(to(case.inputs(3), torch.float32))
    measure(case, module, inputs)  # the first call may set up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        measure(case, module, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [case for case in CASES if case.large], ids=str)
def test_memory_stays_bounded(case):
    """16,384 samples of 128 dimensions; one whole matrix of pairs alone is 1 GiB."""
    inputs = on_gpu(case.large())
    module = case.build(chunk_size=256).float().cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    measure(case, module, inputs)
    assert torch.cuda.max_memory_allocated() - before < 2**30
