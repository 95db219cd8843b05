"""What every prototype layer does alike: state, copies, resetting, a description, half precision, compilation."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.distances import METRICS
from proto_core.prototypes import (
    ClassificationByComponents,
    GaussianPrototypes,
    MixturePrototypes,
    PartPrototypes,
    PointPrototypes,
    VectorQuantizerEMAReset,
    WindowPrototypes,
    prototype_class_matrix,
    push_part_prototypes,
)


def vectors(width: int = 6) -> Tensor:
    return F.normalize(torch.randn(7, width, generator=torch.Generator().manual_seed(0)), dim=1)


def quantizer() -> VectorQuantizerEMAReset:
    layer = VectorQuantizerEMAReset(4, 6)
    layer(torch.randn(9, 6))
    return layer.eval()


LAYERS = {
    "PointPrototypes": (lambda: PointPrototypes(6, prototype_class_matrix(3, 2)), vectors),
    "PointPrototypes[manhattan]": (
        lambda: PointPrototypes(6, prototype_class_matrix(3, 2), distance="manhattan"),
        vectors,
    ),
    "PartPrototypes": (lambda: PartPrototypes(3, 2, 6), lambda: vectors(24).reshape(7, 6, 2, 2)),
    "WindowPrototypes": (
        lambda: WindowPrototypes(6, 2, prototype_class_matrix(3, 2)),
        lambda: vectors(24).reshape(7, 6, 1, 4),
    ),
    "GaussianPrototypes": (lambda: GaussianPrototypes(3, 6), vectors),
    "MixturePrototypes": (lambda: MixturePrototypes(3, 6, 2), vectors),
    "ClassificationByComponents": (lambda: ClassificationByComponents(6, 3), lambda: vectors().abs()),
    "VectorQuantizerEMAReset": (quantizer, vectors),
}
every = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return LAYERS[name][0](), LAYERS[name][1]()


def answers(layer: nn.Module, x: Tensor) -> list[Tensor]:
    found = layer(x)
    return [found] if isinstance(found, Tensor) else list(found)


@every
def test_state_and_copies(name, tmp_path):
    layer, x = build(name)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(1)
    other = LAYERS[name][0]()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for same in (other, copy.deepcopy(layer)):
        for one, two in zip(answers(same, x), answers(layer, x)):
            assert torch.equal(one, two)


@every
def test_reset_and_description(name):
    layer, _ = build(name)
    before = {key: value.clone() for key, value in layer.state_dict().items() if isinstance(value, Tensor)}
    torch.manual_seed(5)
    layer.reset_parameters()
    after = layer.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    assert layer.extra_repr()
    assert name.split("[")[0] in repr(layer)


@every
def test_half_precision_is_computed_in_float32(name):
    layer, x = build(name)
    x = x.bfloat16()
    expected = answers(layer, x.float())
    for one, two in zip(answers(layer, x), expected):
        torch.testing.assert_close(one.to(two.dtype), two, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(answers(layer, x.float()), expected):
            torch.testing.assert_close(one.to(two.dtype), two, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.unchecked
def test_compiles(name):
    torch._dynamo.reset()
    layer, x = build(name)
    expected = answers(copy.deepcopy(layer), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one, two in zip(answers(compiled, x), expected):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("distance", sorted(set(METRICS) - {"hamming"}))
def test_points_take_any_distance(distance):
    layer = PointPrototypes(6, prototype_class_matrix(3, 1), distance=distance)
    x = vectors()
    options = {"precision": torch.ones(6)} if distance == "mahalanobis" else {}
    torch.testing.assert_close(layer(x), -METRICS[distance](x, layer.prototypes, **options))
    torch.testing.assert_close(layer.match(x, torch.tensor([2]))[..., 0], layer(x)[:, 2:])
    assert distance in repr(layer)
    assert layer(layer.prototypes.detach()).argmax(dim=1).tolist() == [0, 1, 2]


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="distance: found 'near'"):
        PointPrototypes(6, prototype_class_matrix(3, 1), distance="near")


def test_pushed_parts_are_real_cases():
    layer = PartPrototypes(3, 1, 6)
    x = vectors(24).reshape(7, 6, 2, 2)
    found = push_part_prototypes(layer, [(x, torch.arange(7) % 3)])
    for p, (image, row, col) in enumerate(zip(*(index.tolist() for index in found[:3]))):
        torch.testing.assert_close(layer.prototypes[p, :, 0, 0], F.normalize(x[image, :, row, col], dim=0))
