"""Prototype losses: golden arrays of the authors' code, loops written from the definitions, and the edges."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from proto_core.losses import (
    ClusterLoss,
    DiversityLoss,
    MultiLabelClusterLoss,
    MultiLabelSeparationLoss,
    PrototypeContrastiveLoss,
    SeparationLoss,
    prototype_gram,
)
from proto_core.losses.extremum import masked_maximum
from proto_core.precision import unit_vectors

MULTI_LABEL = {"cluster": MultiLabelClusterLoss, "separation": MultiLabelSeparationLoss}
SINGLE_LABEL = {"cluster": ClusterLoss, "separation": SeparationLoss}
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with np.load(path) as arrays:
        return {name[len(prefix) :]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith(prefix)}


def value_and_gradient(loss: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, *rest)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def batch(seed: int = 0, samples: int = 5, per_class: int = 2, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities, targets and the identity of class-interleaved prototypes, the last one of two classes."""
    generator = torch.Generator().manual_seed(seed)
    similarities = torch.rand(samples, per_class * classes, generator=generator, dtype=torch.float64) * 2 - 1
    targets = (torch.rand(samples, classes, generator=generator) < 0.4).double()
    identity = torch.eye(classes, dtype=torch.float64).repeat(per_class, 1)
    identity[-1, 0] = 1
    return similarities, targets, identity


def loop(term: str, masking: str, s: Tensor, y: Tensor, identity: Tensor) -> Tensor:
    """The definition, entry by entry; a zero sum over an empty set."""
    values = []
    for n in range(len(s)):
        if term == "separation" and masking == "strict":
            free = [p for p in range(s.shape[1]) if not any(identity[p, c] * y[n, c] for c in range(y.shape[1]))]
            values += [torch.stack([s[n, p] for p in free]).max()] if free else []
            continue
        for c in range(y.shape[1]):
            own = [bool(identity[p, c] * y[n, c]) for p in range(s.shape[1])]
            if masking == "strict":
                values += [-torch.stack([s[n, p] for p, mine in enumerate(own) if mine]).max()] if any(own) else []
                continue
            keep = [mine if term == "cluster" else not mine for mine in own]
            best = torch.stack([s[n, p] * float(kept) for p, kept in enumerate(keep)]).max()
            values.append(-best if term == "cluster" else best)
    return torch.stack(values).mean() if values else s.sum() * 0


@pytest.mark.parametrize("case", ["a_", "b_", "c_"])
@pytest.mark.parametrize("masking", ["reference", "strict"])
@pytest.mark.parametrize("term", ["cluster", "separation"])
def test_multi_label_terms_are_the_authors(golden_dir: Path, case: str, masking: str, term: str) -> None:
    golden = tensors(golden_dir / "protoecgnet.npz", case)
    loss = MULTI_LABEL[term](masking=masking)
    value, gradient = value_and_gradient(loss, golden["similarities"], golden["targets"], golden["prototype_class"])
    name = term if masking == "reference" else f"strict_{term}"
    torch.testing.assert_close(value, golden[name], **CLOSE)
    torch.testing.assert_close(gradient, golden[f"{name}_grad_similarities"], **CLOSE)


@pytest.mark.parametrize("case", ["a_", "b_", "c_"])
def test_terms_of_prototypes_are_the_authors(golden_dir: Path, case: str) -> None:
    golden = tensors(golden_dir / "protoecgnet.npz", case)
    value, gradient = value_and_gradient(DiversityLoss(), golden["prototypes"])
    torch.testing.assert_close(value, golden["diversity"], **CLOSE)
    torch.testing.assert_close(gradient, golden["diversity_grad_prototypes"], **CLOSE)
    value, gradient = value_and_gradient(
        PrototypeContrastiveLoss(), golden["prototypes"], golden["prototype_class"], golden["cooccurrence"]
    )
    torch.testing.assert_close(value, golden["contrastive"], **CLOSE)
    torch.testing.assert_close(gradient, golden["contrastive_grad_prototypes"], **CLOSE)


@pytest.mark.parametrize("case", ["losses_a/", "losses_b/", "losses_unit/"])
@pytest.mark.parametrize("masking", ["exclude", "multiply"])
@pytest.mark.parametrize("term", ["cluster", "separation"])
def test_single_label_terms_are_the_authors(golden_dir: Path, case: str, masking: str, term: str) -> None:
    golden = tensors(golden_dir / "st_protopnet.npz", case)
    loss = SINGLE_LABEL[term](masking=masking)
    value, gradient = value_and_gradient(loss, golden["similarities"], golden["labels"], golden["class_identity"])
    torch.testing.assert_close(value, golden[f"{term}_{masking}"], **CLOSE)
    torch.testing.assert_close(gradient, golden[f"{term}_{masking}_grad"], **CLOSE)


@pytest.mark.parametrize("masking", ["reference", "strict"])
@pytest.mark.parametrize("term", ["cluster", "separation"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_multi_label_terms_are_their_definitions(term: str, masking: str, data: st.DataObject) -> None:
    samples, prototypes, classes = (data.draw(st.integers(1, high)) for high in (4, 6, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    shift = data.draw(st.sampled_from([-2.0, -1.0, 0.0]))
    s = torch.rand(samples, prototypes, generator=generator, dtype=torch.float64) * 2 + shift
    y = torch.rand(samples, classes, generator=generator) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    identity = torch.rand(prototypes, classes, generator=generator) < data.draw(st.sampled_from([0.2, 0.6, 1.0]))
    identity[~identity.any(dim=1), 0] = True
    value, gradient = value_and_gradient(MULTI_LABEL[term](masking=masking), s, y, identity)
    expected, expected_gradient = value_and_gradient(lambda x: loop(term, masking, x, y, identity), s)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.bad_input  # the compiler cannot trace the run-time shape checks
@pytest.mark.parametrize(
    "loss",
    [
        *(MULTI_LABEL[term](masking=masking) for term in MULTI_LABEL for masking in ("reference", "strict")),
        *(SINGLE_LABEL[term](masking=masking) for term in SINGLE_LABEL for masking in ("exclude", "multiply")),
    ],
    ids=repr,
)
def test_compiled_whole_gives_the_same(loss: nn.Module) -> None:
    similarities, targets, identity = batch()
    if isinstance(loss, ClusterLoss | SeparationLoss):
        targets = torch.tensor([0, 3, 1, 2, 2])
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(compiled, similarities, targets, identity),
        value_and_gradient(loss, similarities, targets, identity),
    )


@pytest.mark.unchecked
@pytest.mark.bad_input  # as above
def test_terms_of_prototypes_compile_whole() -> None:
    _, _, identity = batch()
    prototypes = torch.randn(len(identity), 3, 2, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    for loss, rest in ((DiversityLoss(), ()), (PrototypeContrastiveLoss(), (identity, torch.eye(4)))):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            value_and_gradient(compiled, prototypes, *rest), value_and_gradient(loss, prototypes, *rest)
        )


@pytest.mark.parametrize("masking", ["reference", "strict"])
@pytest.mark.parametrize("term", ["cluster", "separation"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_order_of_samples_prototypes_and_classes_does_not_matter(term: str, masking: str, seed: int) -> None:
    s, y, identity = batch(seed)
    loss = MULTI_LABEL[term](masking=masking)
    generator = torch.Generator().manual_seed(seed)
    n, p, c = (torch.randperm(size, generator=generator) for size in (*s.shape, y.shape[1]))
    value, gradient = value_and_gradient(loss, s, y, identity)
    other, other_gradient = value_and_gradient(loss, s[n][:, p], y[n][:, c], identity[p][:, c])
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(other_gradient, gradient[n][:, p])


def test_order_of_prototypes_does_not_matter_to_their_terms() -> None:
    _, _, identity = batch()
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(len(identity), 5, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(identity), generator=generator)
    cooccurrence = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    for loss, rest, reordered in (
        (DiversityLoss(), (), ()),
        (PrototypeContrastiveLoss(), (identity, cooccurrence), (identity[order], cooccurrence)),
    ):
        value, gradient = value_and_gradient(loss, prototypes, *rest)
        other, other_gradient = value_and_gradient(loss, prototypes[order], *reordered)
        torch.testing.assert_close(other, value)
        torch.testing.assert_close(other_gradient, gradient[order])


@pytest.mark.parametrize("masking", ["reference", "strict"])
@pytest.mark.parametrize("term", ["cluster", "separation"])
def test_half_precision_is_summed_in_float32(term: str, masking: str) -> None:
    s, y, identity = batch(samples=300)
    loss = MULTI_LABEL[term](masking=masking)
    for half in (torch.bfloat16, torch.float16):
        value, gradient = value_and_gradient(loss, s.to(half), y.to(half), identity.to(half))
        assert value.dtype == torch.float32
        assert gradient.dtype == half
        torch.testing.assert_close(value.double(), loss(s.to(half).double(), y, identity), rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(s.float(), y, identity).double(), loss(s, y, identity), rtol=1e-6, atol=1e-7)


def test_autocast_does_not_coarsen_the_terms_of_prototypes() -> None:
    _, _, identity = batch()
    prototypes = torch.randn(len(identity), 64, generator=torch.Generator().manual_seed(0))
    cooccurrence = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    for loss, rest in ((DiversityLoss(), ()), (PrototypeContrastiveLoss(), (identity, cooccurrence))):
        plain = loss(prototypes, *rest)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(prototypes, *rest), plain, rtol=0, atol=0)
        half = loss(prototypes.bfloat16(), *rest)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, loss(prototypes.bfloat16().float(), *rest), rtol=0, atol=0)


@pytest.mark.parametrize("masking", ["reference", "strict"])
@pytest.mark.parametrize("term", ["cluster", "separation"])
def test_one_sample_and_strided_input(term: str, masking: str) -> None:
    s, y, identity = batch()
    loss = MULTI_LABEL[term](masking=masking)
    one = value_and_gradient(loss, s[:1], y[:1], identity)
    expected = value_and_gradient(lambda x: loop(term, masking, x, y[:1], identity), s[:1])
    torch.testing.assert_close(one, expected)
    strided = s.T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        value_and_gradient(loss, strided, y.T.contiguous().T, identity.T.contiguous().T),
        value_and_gradient(loss, s, y, identity),
    )


def test_empty_sets_are_zero_with_zero_gradient() -> None:
    s, y, identity = batch()
    nothing, everything = torch.zeros_like(y), torch.ones_like(y)
    for loss, targets in (
        (MultiLabelClusterLoss(masking="reference"), nothing),
        (MultiLabelClusterLoss(masking="strict"), nothing),
        (MultiLabelSeparationLoss(masking="strict"), everything),
    ):
        value, gradient = value_and_gradient(loss, s, targets, identity)
        assert value == 0
        assert (gradient == 0).all()
    for term in MULTI_LABEL:
        for masking in ("reference", "strict"):
            value, gradient = value_and_gradient(MULTI_LABEL[term](masking=masking), s[:0], y[:0], identity)
            assert value == 0
            assert gradient.shape == (0, s.shape[1])
    for term in SINGLE_LABEL:
        assert SINGLE_LABEL[term]()(s[:0], torch.zeros(0, dtype=torch.long), identity) == 0


def test_masked_zeros_win_over_negative_similarities() -> None:
    s, y, identity = batch()
    s = -s.abs() - 0.1
    y[:, 0] = 1
    value, gradient = value_and_gradient(MultiLabelClusterLoss(), s, y, identity)
    assert value == 0
    assert (gradient == 0).all()
    # where every prototype is of the class nothing is masked
    value, gradient = value_and_gradient(MultiLabelClusterLoss(), s, y[:, :1], torch.ones(s.shape[1], 1))
    torch.testing.assert_close(value, -s.max(dim=1).values.mean())
    assert (gradient.sum(dim=1) == -1 / len(s)).all()


def test_strict_cluster_leaves_out_a_class_without_prototypes() -> None:
    s, y, identity = batch(classes=3)
    wide = torch.cat([identity, torch.zeros(len(identity), 1)], dim=1)
    with_orphan = torch.cat([y, torch.ones(len(y), 1)], dim=1)
    loss = MultiLabelClusterLoss(masking="strict")
    torch.testing.assert_close(loss(s, with_orphan, wide), loss(s, y, identity))


def test_contrast_by_hand() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    identity = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    cooccurrence = torch.tensor([[1.0, 0.25], [0.25, 1.0]], dtype=torch.float64)
    # A sums to 6; S A: diagonal 3, pairs 2 (0 * 0.25 + 0.6 * 0.25 + 0.8); B sums to 3; S B: 2 * 0.6 * 0.75
    expected = -((3 + 1.9) / 6 - 0.9 / 3) / 3**0.5
    value = PrototypeContrastiveLoss()(prototypes, identity, cooccurrence)
    assert value.item() == pytest.approx(expected, abs=3e-6)  # the clamp and the guards move it by eps
    assert DiversityLoss()(prototypes).item() == pytest.approx(2 * (0.36 + 0.64) / 9)


def test_gradients_of_prototypes_are_those_of_finite_differences() -> None:
    _, _, identity = batch()
    prototypes = torch.randn(len(identity), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cooccurrence = torch.rand(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # not symmetric
    prototypes.requires_grad_()
    assert torch.autograd.gradcheck(DiversityLoss(), prototypes)
    assert torch.autograd.gradcheck(lambda x: PrototypeContrastiveLoss()(x, identity, cooccurrence), prototypes)
    assert torch.autograd.gradgradcheck(DiversityLoss(), prototypes)


def test_backward_under_autocast_stays_in_full_precision() -> None:
    _, _, identity = batch()
    prototypes = torch.randn(len(identity), 64, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradient(DiversityLoss(), prototypes)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value_and_gradient(DiversityLoss(), prototypes), expected, rtol=0, atol=0)


def test_zero_prototype_is_finite() -> None:
    _, _, identity = batch()
    prototypes = torch.randn(len(identity), 5, generator=torch.Generator().manual_seed(0))
    prototypes[0] = 0
    for loss, rest in ((DiversityLoss(), ()), (PrototypeContrastiveLoss(), (identity, torch.eye(4)))):
        value, gradient = value_and_gradient(loss, prototypes, *rest)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()


def test_masked_maximum_looks_up_rows() -> None:
    s = torch.tensor([[1.0, 5.0, 3.0], [-4.0, -2.0, -6.0]], requires_grad=True)
    rows = torch.tensor([1, 0, 1])
    mask = torch.tensor([[True, False, True], [True, False, True], [False, False, False]])
    best, found = masked_maximum(s, mask, fill=-torch.inf, rows=rows)
    assert best.tolist() == [-4, 3, 0]
    assert found.tolist() == [True, True, False]
    best.sum().backward()
    assert s.grad is not None
    assert s.grad.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.bad_input
@pytest.mark.parametrize("loss", [MultiLabelClusterLoss(), MultiLabelSeparationLoss()])
def test_multi_label_shapes_that_do_not_fit(loss: nn.Module) -> None:
    s, y, identity = batch()
    for wrong in (
        (s, y[:, 0], identity),
        (s, y[:-1], identity),
        (s[:, :-1], y, identity),
        (s, y[:, :-1], identity),
        (s[0], y, identity),
        (s[:, :0], y, identity[:0]),
    ):
        with pytest.raises(ValueError, match="similarities, targets, class_identity: found shapes"):
            loss(*wrong)
    with pytest.raises(ValueError, match="class_identity"):
        loss(s, y, torch.zeros_like(identity))


@pytest.mark.bad_input
@pytest.mark.parametrize("loss", [ClusterLoss(), SeparationLoss()])
def test_single_label_input_that_does_not_fit(loss: nn.Module) -> None:
    s, y, identity = batch()
    labels = torch.tensor([0, 1, 2, 3, 0])
    for wrong in ((s, y, identity), (s, labels[:-1], identity), (s[:, :-1], labels, identity)):
        with pytest.raises(ValueError, match="similarities, targets, class_identity: found shapes"):
            loss(*wrong)
    for bad in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match="targets: found values from"):
            loss(s, bad, identity)


@pytest.mark.bad_input
def test_settings_and_matrices_that_do_not_fit() -> None:
    for kind, known in ((MultiLabelClusterLoss, "strict"), (MultiLabelSeparationLoss, "strict")):
        with pytest.raises(ValueError, match=rf"masking: found 'exclude', needed one of reference, {known}"):
            kind(masking="exclude")
    for kind in (ClusterLoss, SeparationLoss):
        with pytest.raises(ValueError, match="masking: found 'strict', needed one of exclude, multiply"):
            kind(masking="strict")
    with pytest.raises(ValueError, match="eps: found 0"):
        PrototypeContrastiveLoss(eps=0)
    _, _, identity = batch()
    prototypes = torch.ones(len(identity), 2)
    with pytest.raises(ValueError, match="cooccurrence: found shapes"):
        PrototypeContrastiveLoss()(prototypes, identity, torch.eye(3))
    with pytest.raises(ValueError, match="cooccurrence: found shapes"):
        PrototypeContrastiveLoss()(prototypes[1:], identity, torch.eye(4))
    with pytest.raises(ValueError, match="prototypes: found shape"):
        DiversityLoss()(prototypes[:, 0])
    with pytest.raises(ValueError, match="found 1 class, needed 2"):
        SeparationLoss()(torch.ones(2, 2), torch.zeros(2, dtype=torch.long), torch.ones(2, 1))


def test_terms_of_prototypes_work_under_functional_transforms() -> None:
    prototypes = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = prototypes.clone().requires_grad_()
    DiversityLoss()(leaf).backward()
    torch.testing.assert_close(torch.func.grad(DiversityLoss())(prototypes), leaf.grad)


def test_large_sets_have_the_cosines_and_gradients_of_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(611, 7, dtype=torch.float64, generator=generator)  # rows that no number of blocks divides
    weight = torch.randn(611, 611, dtype=torch.float64, generator=generator)  # not symmetric

    def plain(x: Tensor) -> Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return (unit @ unit.T * weight).sum()

    torch.testing.assert_close(
        value_and_gradient(lambda x: (prototype_gram(x) * weight).sum(), prototypes),
        value_and_gradient(plain, prototypes),
    )


def test_prototypes_shorter_than_the_smallest_norm_have_the_gradient_of_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    prototypes[1] *= 1e-13
    prototypes[3] = 0
    weight = torch.randn(5, 5, dtype=torch.float64, generator=generator)

    def plain(x: Tensor) -> Tensor:
        unit = unit_vectors(x)
        return (unit @ unit.T * weight).sum()

    torch.testing.assert_close(
        value_and_gradient(lambda x: (prototype_gram(x) * weight).sum(), prototypes),
        value_and_gradient(plain, prototypes),
    )
