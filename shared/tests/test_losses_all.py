"""What holds for every loss: precision, layout, batch of one, order, compilation, no read-back, chunks, two processes.

A family adds its losses in ``cases/KEY.py`` as ``CASES``; known values and edge cases stand in ``test_KEY.py``.
"""

from __future__ import annotations

import copy
import importlib
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.tests.loss_case import LossCase
from shared.tests.processes import on_two_processes

HERE = Path(__file__).resolve().parent
CASES: list[LossCase] = [
    case
    for file in sorted((HERE / "cases").glob("*.py"))
    for case in importlib.import_module(f"shared.tests.cases.{file.stem}").CASES
]
every = pytest.mark.parametrize("case", CASES, ids=str)


def some(condition: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if getattr(case, condition)], ids=str)


def to(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also in lists, in another precision; detached copies."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value.clone()
    if isinstance(value, list | tuple):
        return type(value)(to(item, dtype) for item in value)
    return value


def run(case: LossCase, inputs: tuple[Any, ...], dtype: torch.dtype, **keywords: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and its gradients: of the differentiable inputs, then of the parameters."""
    module = case.build(**keywords)
    return measure(case, module if dtype == torch.bfloat16 else module.to(dtype), to(inputs, dtype))


def measure(
    case: LossCase, call: Any, inputs: tuple[Any, ...], module: nn.Module | None = None, context: Any = None
) -> Any:
    inputs = tuple(
        item.clone().requires_grad_() if i in case.differentiable(inputs) else item for i, item in enumerate(inputs)
    )
    with context or nullcontext():
        loss = call(*inputs)
    parameters = [p for p in (module or call).parameters() if p.requires_grad]
    wanted = [inputs[i] for i in case.differentiable(inputs)] + parameters
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return loss.detach(), [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients)]


def close(found: Tensor, expected: Tensor, tolerance: tuple[float, float], what: str) -> None:
    """Equal up to the tolerance, the absolute one in units of the largest entry."""
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        rtol=tolerance[0],
        atol=tolerance[1] * size,
        msg=lambda text: f"{what}: {text}",
    )


def same(one: tuple[Tensor, list[Tensor]], two: tuple[Tensor, list[Tensor]], tolerance: tuple[float, float]) -> None:
    close(one[0], two[0], tolerance, "loss")
    assert len(one[1]) == len(two[1])
    for number, (a, b) in enumerate(zip(one[1], two[1])):
        close(a, b, tolerance, f"gradient {number}")


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


@every
def test_float64_is_scalar_with_finite_gradients(case):
    loss, gradients = run(case, case.inputs(0), torch.float64)
    assert loss.ndim == 0
    assert loss.dtype == torch.float64
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert any((g != 0).any() for g in gradients), "no gradient at all: the inputs of this case show nothing"


@every
def test_float32_agrees_with_float64(case):
    loss, gradients = run(case, case.inputs(1), torch.float32)
    assert loss.dtype == torch.float32
    same((loss, gradients), run(case, case.inputs(1), torch.float64), case.tolerance)


@every
def test_bfloat16_is_computed_in_float32(case):
    rounded = to(case.inputs(2), torch.bfloat16)
    loss, _ = run(case, rounded, torch.bfloat16)
    assert loss.dtype == torch.float32
    expected, _ = run(case, rounded, torch.float64)
    close(loss, expected, case.half_tolerance, "loss")


@every
def test_autocast_changes_nothing(case):
    inputs = to(case.inputs(3), torch.float32)
    expected = run(case, inputs, torch.float32)
    found = measure(case, case.build(), inputs, context=torch.autocast("cpu", torch.bfloat16))
    assert found[0].dtype == torch.float32
    same(found, expected, (1e-5, 1e-6))


@every
def test_non_contiguous_input(case):
    inputs = case.inputs(4)
    strided = tuple(
        item.unsqueeze(0).transpose(0, -1).contiguous().transpose(0, -1).squeeze(0)
        if isinstance(item, Tensor) and item.ndim > 1
        else item
        for item in inputs
    )
    assert any(isinstance(item, Tensor) and not item.is_contiguous() for item in strided)
    same(run(case, strided, torch.float64), run(case, inputs, torch.float64), (1e-12, 1e-12))


@pytest.mark.unchecked  # bytes are no Int to the checker
@every
def test_labels_may_be_integers_of_any_width(case):
    inputs = case.inputs(1)
    expected = run(case, inputs, torch.float64)
    for kind in (torch.int32, torch.int16, torch.uint8):
        narrow = tuple(x.to(kind) if isinstance(x, Tensor) and x.dtype == torch.int64 else x for x in inputs)
        same(run(case, narrow, torch.float64), expected, (1e-12, 1e-12))


@some("batch")
def test_batch_of_one(case):
    inputs = tuple(item[:1] if i in case.batch else item for i, item in enumerate(case.inputs(5)))
    if not case.single:
        with pytest.raises(ValueError, match=r"found"):
            run(case, inputs, torch.float32)
        return
    loss, gradients = run(case, inputs, torch.float32)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("case", [case for case in CASES if case.batch and case.permutable], ids=str)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000))
def test_order_of_the_batch_does_not_matter(case, seed):
    inputs = case.inputs(seed)
    order = torch.randperm(len(inputs[case.batch[0]]), generator=torch.Generator().manual_seed(seed))
    shuffled = tuple(item[order] if i in case.batch else item for i, item in enumerate(inputs))
    loss, gradients = run(case, inputs, torch.float64)
    found, moved = run(case, shuffled, torch.float64)
    close(found, loss, (1e-9, 1e-9), "loss")
    for position, one, two in zip(case.differentiable(inputs), gradients, moved):
        close(two, one[order] if position in case.batch else one, (1e-7, 1e-9), f"gradient of input {position}")


@pytest.mark.unchecked
@pytest.mark.parametrize("case", [case for case in CASES if not case.graph_break], ids=str)
def test_compiles_to_the_same_value(case):
    """One graph, without a break (the "aot_eager" back end: tracing and derivatives, no C++ compiler)."""
    torch._dynamo.reset()
    inputs = to(case.inputs(6), torch.float32)
    module = case.build()
    expected = measure(case, copy.deepcopy(module), inputs)  # a copy, since forward may move buffers
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    same(measure(case, compiled, inputs, module), expected, (1e-5, 1e-6))


@pytest.mark.unchecked
@pytest.mark.parametrize("case", [case for case in CASES if not case.host_sync], ids=str)
def test_reads_nothing_back(case):
    """Tensors without values: whoever asks for one on the host fails."""
    inputs = tuple(item.to("meta") if isinstance(item, Tensor) else item for item in to(case.inputs(7), torch.float32))
    if any(isinstance(item, list | tuple) for item in inputs):
        inputs = tuple(type(x)(t.to("meta") for t in x) if isinstance(x, list | tuple) else x for x in inputs)
    assert case.build().to("meta")(*inputs).shape == ()


@some("chunks")
@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_chunks_change_nothing(case, chunk_size):
    same(
        run(case, case.inputs(8), torch.float64, chunk_size=chunk_size),
        run(case, case.inputs(8), torch.float64),
        (1e-10, 1e-11),
    )


@some("chunks")
def test_chunk_size_below_one_is_refused(case):
    with pytest.raises(ValueError, match="chunk_size"):
        case.build(chunk_size=0)


@pytest.mark.unchecked
@some("large")
def test_memory_is_bounded_at_sixteen_thousand_samples(case):
    """The plain form would hold several arrays of 1 GiB each."""
    inputs = case.large()
    assert any(isinstance(item, Tensor) and item.shape == (16_384, 128) for item in inputs)
    module = case.build(chunk_size=256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss, gradients = measure(case, module, inputs)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert grown < 1.0, f"{grown:.2f} GiB"


def _rank(rank: int) -> dict[str, Any]:
    """One of two processes: the first takes a third of the batch, so that the parts differ in size."""
    answers = {}
    for case in CASES:
        if not case.gathers:
            continue
        inputs = to(case.inputs(9), torch.float64)
        total = len(inputs[case.batch[0]])
        cut = total // 3
        rows = slice(0, cut) if rank == 0 else slice(cut, total)
        mine = tuple(item[rows] if i in case.batch else item for i, item in enumerate(inputs))
        module = case.build(gather_distributed=True).double()
        answers[case.name] = measure(case, module, mine)
    return answers


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All losses that gather, in one pair of processes."""
    return on_two_processes(_rank, tmp_path_factory.mktemp("ranks"))


@some("gathers")
def test_two_processes_give_the_joint_batch(case, two_processes):
    """The mean of the ranks' losses, and of their gradients as DDP takes it, are those of the joint batch."""
    loss, gradients = run(case, case.inputs(9), torch.float64)
    (loss0, first), (loss1, second) = (answers[case.name] for answers in two_processes)
    close((loss0 + loss1) / 2, loss, (1e-9, 1e-10), "loss")
    positions = case.differentiable(case.inputs(9))
    for number, expected in enumerate(gradients):
        in_batch = number < len(positions) and positions[number] in case.batch
        found = torch.cat([first[number], second[number]]) / 2 if in_batch else (first[number] + second[number]) / 2
        close(found, expected, (1e-8, 1e-10), f"gradient {number}")
