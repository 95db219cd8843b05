"""The total loss of ProtoECGNet: golden arrays of the authors' code, weights, and edges."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from proto_ecg.protoecgnet.loss import ProtoECGLoss

CLOSE = {"rtol": 1e-6, "atol": 1e-8}
ARGUMENTS = ("logits", "targets", "similarities", "prototypes", "prototype_class", "cooccurrence", "pos_weight")


def golden_case(golden_dir: Path, case: str) -> dict[str, Tensor]:
    with np.load(golden_dir / "protoecgnet.npz") as arrays:
        return {name[2:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith(case)}


def made_batch(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, similarities, prototypes = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((5, 3), (5, 6), (6, 4))
    )
    targets = (torch.rand(5, 3, generator=generator) < 0.5).to(dtype)
    cooccurrence = torch.eye(3) * 0.8 + 0.2
    return [logits, targets, similarities, prototypes, torch.eye(3).repeat(2, 1), cooccurrence, torch.ones(3) * 2]


@pytest.mark.parametrize("case", ["a_", "b_", "c_"])
def test_total_and_terms_are_the_authors(golden_dir: Path, case: str) -> None:
    golden = golden_case(golden_dir, case)
    for name in ("similarities", "prototypes", "logits"):
        golden[name].requires_grad_()
    arguments = [golden[name] for name in ARGUMENTS]
    loss = ProtoECGLoss()
    total = loss(*arguments)
    torch.testing.assert_close(total, golden["total"], **CLOSE)
    total.backward()
    for name in ("similarities", "prototypes", "logits"):
        torch.testing.assert_close(golden[name].grad, golden[f"total_grad_{name}"], **CLOSE)

    terms = loss.terms(*arguments)
    torch.testing.assert_close(terms["bce"], golden["bce_weighted"], **CLOSE)
    torch.testing.assert_close(loss.terms(*arguments[:-1])["bce"], golden["bce"], **CLOSE)
    for name in ("cluster", "separation", "diversity", "contrastive", "sparsity"):
        torch.testing.assert_close(terms[name], golden[name], **CLOSE)
    strict = ProtoECGLoss(masking="strict").terms(*arguments)
    for name in ("cluster", "separation"):
        torch.testing.assert_close(strict[name], golden[f"strict_{name}"], **CLOSE)


def test_each_weight_weighs_its_term() -> None:
    arguments = made_batch()
    names = ("cluster", "separation", "diversity", "contrastive", "sparsity")
    none = {f"lam_{name}": 0.0 for name in names}
    terms = ProtoECGLoss().terms(*arguments)
    torch.testing.assert_close(ProtoECGLoss(**none)(*arguments), terms["bce"])
    for name in names:
        loss = ProtoECGLoss(**none | {f"lam_{name}": 7.0})
        torch.testing.assert_close(loss(*arguments), terms["bce"] + 7 * terms[name])


def test_half_precision_and_autocast_are_float32_inside() -> None:
    arguments = made_batch(torch.bfloat16)
    half = ProtoECGLoss()(*arguments)
    assert half.dtype == torch.float32
    wide = [tensor.double() for tensor in arguments]
    torch.testing.assert_close(half.double(), ProtoECGLoss()(*wide), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ProtoECGLoss()(*arguments), half)
    expected = F.binary_cross_entropy_with_logits(wide[0], wide[1], pos_weight=wide[-1])
    torch.testing.assert_close(ProtoECGLoss().terms(*wide)["bce"], expected)


@pytest.mark.bad_input  # the compiler cannot trace the run-time shape checks
def test_compiles_whole() -> None:
    arguments = made_batch()
    loss = ProtoECGLoss(lam_sparsity=0.1)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))


@pytest.mark.bad_input
def test_shapes_that_do_not_fit() -> None:
    arguments = made_batch()
    for position, message in ((0, "logits, targets"), (2, "similarities, targets"), (6, "pos_weight")):
        wrong = list(arguments)
        wrong[position] = wrong[position][..., :-1]
        with pytest.raises(ValueError, match=f"{message}.*found shape"):
            ProtoECGLoss()(*wrong)
    wrong = [*arguments[:5], torch.eye(4), arguments[6]]
    with pytest.raises(ValueError, match="cooccurrence: found shapes"):
        ProtoECGLoss()(*wrong)
    with pytest.raises(ValueError, match="masking: found 'soft'"):
        ProtoECGLoss(masking="soft")
