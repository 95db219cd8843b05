"""Part prototypes, their push and their losses (ST-ProtoPNet), and how heat maps meet masks: the authors' values."""

import copy
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proto_core.losses import (
    ClosenessLoss,
    ClusterLoss,
    DiscriminationLoss,
    IncorrectConnectionL1Loss,
    SeparationLoss,
    SubspaceOrthogonalityLoss,
)
from proto_core.metrics import content_heatmap, deletion_auc, heatmap_iou, outside_inside_ratio
from proto_core.prototypes import PartPrototypes, PushResult, push_part_prototypes


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "st_protopnet.npz")


def near(found, expected, rtol=1e-6, atol=1e-8):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", ["losses_a", "losses_b", "losses_unit"])
@pytest.mark.parametrize(
    ("name", "loss", "inputs"),
    [
        ("cluster_multiply", ClusterLoss("multiply"), ["similarities", "labels", "class_identity"]),
        ("cluster_exclude", ClusterLoss(), ["similarities", "labels", "class_identity"]),
        ("separation_multiply", SeparationLoss("multiply"), ["similarities", "labels", "class_identity"]),
        ("separation_exclude", SeparationLoss(), ["similarities", "labels", "class_identity"]),
        ("closeness", ClosenessLoss(), ["prototypes_support", "num_classes"]),
        ("discrimination", DiscriminationLoss(), ["prototypes_trivial", "num_classes"]),
        ("orthogonality", SubspaceOrthogonalityLoss(), ["prototypes_trivial", "num_classes"]),
        ("l1", IncorrectConnectionL1Loss(), ["last_layer_weight", "class_identity"]),
    ],
)
def test_losses_equal_the_authors_code(golden, case, name, loss, inputs):
    arguments = [torch.from_numpy(golden[f"{case}/{key}"]) for key in inputs]
    arguments = [int(value) if value.ndim == 0 else value for value in arguments]
    arguments[0].requires_grad_()
    found = loss(*arguments)
    near(found, golden[f"{case}/{name}"])
    slope, expected = torch.autograd.grad(found, arguments[0])[0], torch.from_numpy(golden[f"{case}/{name}_grad"])
    if name == "orthogonality":
        # where |p|^2 - 1 is rounding alone its sign is the machine's, and the slope along p any of -2, 0 and 2
        p = arguments[0].detach()
        unit = (p.square().sum(1, keepdim=True) - 1).abs() < 1e-12
        along = [(g * p).sum(1, keepdim=True) for g in (slope, expected)]
        steps = (along[0] - along[1])[unit] / 2
        torch.testing.assert_close(steps, steps.round().clamp(-2, 2), rtol=0, atol=1e-9)
        slope, expected = (torch.where(unit, g - part * p, g) for g, part in zip((slope, expected), along))
    near(slope, expected.numpy())


def pairs_of_classes(vectors, classes, pick):
    """The definition, pair by pair."""
    groups = vectors.reshape(classes, -1, vectors.shape[-1])
    return np.mean([pick(groups[a] @ groups[b].T) for a, b in permutations(range(classes), 2)])


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_losses_equal_the_definition(classes, per_class, seed):
    vectors = np.random.default_rng(seed).normal(size=(classes * per_class, 3))
    tensor = torch.from_numpy(vectors)
    near(ClosenessLoss()(tensor, classes), -pairs_of_classes(vectors, classes, np.min))
    near(DiscriminationLoss()(tensor[..., None, None], classes), pairs_of_classes(vectors, classes, np.max))
    excess = [group @ group.T - np.eye(per_class) for group in vectors.reshape(classes, per_class, 3)]
    near(SubspaceOrthogonalityLoss()(tensor, classes), np.abs(excess).sum())
    near(SubspaceOrthogonalityLoss("fro2")(tensor, classes), np.square(excess).sum())


def test_one_prototype_per_class_is_only_asked_for_its_length():
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    assert SubspaceOrthogonalityLoss()(prototypes, 2) == 3 + 0.75


@pytest.mark.parametrize("kind", ["projection", "cosine"])
@pytest.mark.parametrize("branch", ["trivial", "support"])
def test_maps_equal_the_authors_code(golden, kind, branch):
    def value(name):
        return torch.from_numpy(golden[f"model_{kind}/{name}"])

    prototypes, features = value(f"prototypes_{branch}"), value(f"features_{branch}")
    classes, per_class = int(value("num_classes")), int(value("prototypes_per_class"))
    layer = PartPrototypes(classes, per_class, prototypes.shape[1], similarity=kind, rectify=kind == "cosine").double()
    layer.prototypes.data.copy_(prototypes)
    pooled, maps = layer(features)
    near(maps, value(f"maps_{branch}"))
    near(pooled @ value(f"head_{branch}").T, value(f"logits_{branch}"))
    if kind == "cosine":
        near(pooled, value(f"max_{branch}"))
    else:
        near(layer.similarity_maps(features, "cosine").amax(dim=(2, 3)), value(f"max_{branch}"))


@pytest.mark.parametrize("kind", ["projection", "cosine"])
@pytest.mark.parametrize("branch", ["trivial", "support"])
def test_push_equals_the_authors_code(golden, kind, branch):
    def value(name):
        return torch.from_numpy(golden[f"model_{kind}/{name}"])

    def features(images):
        z = F.conv2d(images, value("backbone_conv_weight"), value("backbone_conv_bias"), stride=2, padding=1).tanh()
        if kind == "cosine":
            z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
        for number in (1, 2):
            names = [f"addon_{branch}_conv{number}_{what}" for what in ("weight", "bias")]
            z = F.conv2d(z, *map(value, names))
            z = z.tanh() if kind == "projection" else z
        return z

    near(features(value("x")), value(f"features_{branch}"))
    prototypes = value(f"prototypes_{branch}")
    classes, per_class = int(value("num_classes")), int(value("prototypes_per_class"))
    layer = PartPrototypes(classes, per_class, prototypes.shape[1], similarity=kind, rectify=True).double()
    layer.prototypes.data.copy_(prototypes)
    images, labels, size = value("push_images"), value("push_labels"), int(value("push_batch_size"))
    batches = [(features(x), y) for x, y in zip(images.split(size), labels.split(size))]
    found = push_part_prototypes(layer, batches)
    near(layer.prototypes, value(f"push_prototypes_{branch}"), rtol=1e-6, atol=1e-6)
    everything = torch.cat([z for z, _ in batches])
    for p in range(len(prototypes)):
        index, row, col = int(found.image_index[p]), int(found.row[p]), int(found.col[p])
        assert labels[index] == layer.class_identity[p].argmax()
        near(layer.prototypes[p, :, 0, 0], F.normalize(everything[index, :, row, col], dim=0))


@pytest.mark.parametrize("similarity", ["cosine", "projection"])
@pytest.mark.parametrize("patch", [1, 2])
def test_similarity_equals_a_loop_over_places(similarity, patch):
    layer = PartPrototypes(2, 2, 3, patch_size=patch, similarity=similarity).double()
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = layer.prototypes / layer.prototypes.norm(dim=1, keepdim=True)
    z = features / features.norm(dim=1, keepdim=True) if similarity == "cosine" else features
    expected = torch.stack(
        [
            torch.stack([(z[:, :, r : r + patch, c : c + patch] * p).sum(dim=(1, 2, 3)) for p in unit], dim=1)
            for r in range(5 - patch)
            for c in range(6 - patch)
        ],
        dim=2,
    )
    pooled, maps = layer(features)
    torch.testing.assert_close(maps.flatten(2), expected)
    torch.testing.assert_close(pooled, expected.amax(dim=2))
    push_part_prototypes(layer, [(features, torch.tensor([1, 0]))])
    torch.testing.assert_close(layer.prototypes.norm(dim=1), torch.ones(4, patch, patch, dtype=torch.float64))


def test_push_of_a_patch_takes_the_place_it_names():
    layer = PartPrototypes(1, 1, 2, patch_size=2)
    features = torch.zeros(2, 2, 3, 4)
    features[1, 0, 1:, 2:] = 5.0
    layer.prototypes.data[0, 0], layer.prototypes.data[0, 1] = 1.0, 0.0
    found = push_part_prototypes(layer, [(features[:1], torch.tensor([0])), (features[1:], torch.tensor([0]))])
    assert [int(x) for x in found[:3]] == [1, 1, 2]
    torch.testing.assert_close(found.similarity, torch.tensor([4.0]))
    assert layer.prototypes[0, 0].tolist() == [[1, 1], [1, 1]]
    assert layer.prototypes[0, 1].tolist() == [[0, 0], [0, 0]]


def test_first_in_order_wins_a_tie_and_a_class_without_images_stays():
    layer = PartPrototypes(3, 1, 2)
    before = layer.prototypes.detach().clone()
    features = torch.ones(4, 2, 2, 2)
    found = push_part_prototypes(layer, [(features[:2], torch.tensor([2, 0])), (features[2:], torch.tensor([0, 2]))])
    assert isinstance(found, PushResult)
    assert found.image_index.tolist() == [1, -1, 0]
    assert found.row.tolist() == [0, -1, 0] == found.col.tolist()
    assert found.similarity[1] == -torch.inf
    assert torch.equal(layer.prototypes[1], before[1])
    empty = push_part_prototypes(layer, [])
    assert empty.image_index.tolist() == empty.row.tolist() == [-1] * 3


def test_zero_features_are_no_direction():
    layer = PartPrototypes(2, 1, 3)
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    pooled, _ = layer(features)
    assert pooled.tolist() == [[0, 0]]
    gradients = torch.autograd.grad(pooled.sum(), [features, layer.prototypes])
    assert all((g == 0).all() for g in gradients)


def test_layer_behaves_as_every_prototype_layer():
    layer = PartPrototypes(2, 3, 4, similarity="projection", rectify=True)
    assert (layer.num_classes, layer.prototypes_per_class, layer.num_prototypes) == (2, 3, 6)
    assert ((layer.prototypes >= 0) & (layer.prototypes < 1)).all()
    assert layer.class_identity.tolist() == [[1, 0]] * 3 + [[0, 1]] * 3
    assert "similarity='projection', rectify=True" in repr(layer)
    features = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    other = PartPrototypes(2, 3, 4, similarity="projection", rectify=True)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer)):
        assert torch.equal(same(features)[0], layer(features)[0])
    layer.prototypes.data.mul_(7)
    torch.testing.assert_close(other(features)[0], layer(features)[0])
    layer.normalize_()
    torch.testing.assert_close(layer.prototypes.norm(dim=1), torch.ones(6, 1, 1))
    half, full = layer(features.bfloat16())[0], layer(features)[0]
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(features)[0], full)
        assert layer(features)[1].dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.int32, torch.int16])
def test_targets_may_be_integers_of_any_width(kind):
    g = torch.Generator().manual_seed(0)
    similarities, targets = torch.rand(3, 6, generator=g), torch.tensor([2, 0, 1])
    identity = torch.eye(3).repeat_interleave(2, 0)
    for loss in (ClusterLoss(), SeparationLoss("multiply")):
        assert torch.equal(loss(similarities, targets.to(kind), identity), loss(similarities, targets, identity))
    features = torch.rand(3, 4, 2, 2, generator=g)
    found = push_part_prototypes(PartPrototypes(3, 1, 4), [(features, targets.to(kind))])
    assert found.image_index.tolist() == [1, 2, 0]


@pytest.mark.unchecked
def test_layer_compiles():
    layer, features = PartPrototypes(2, 3, 4), torch.randn(2, 4, 3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), layer(features))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PartPrototypes(0, 1, 2), "num_classes: found 0"),
        (lambda: PartPrototypes(2, 1, 2, patch_size=0), "patch_size: found 0"),
        (lambda: PartPrototypes(2, 1, 2, similarity="dot"), "similarity: found 'dot'"),
        (lambda: PartPrototypes(2, 1, 2)(torch.ones(1, 3, 2, 2)), r"features: found shape \(1, 3, 2, 2\)"),
        (lambda: PartPrototypes(2, 1, 2, patch_size=3)(torch.ones(1, 2, 2, 2)), "at least 3"),
        (
            lambda: push_part_prototypes(PartPrototypes(2, 1, 2), [(torch.ones(1, 2, 2, 2), torch.tensor([2]))]),
            "targets: found 2",
        ),
        (
            lambda: push_part_prototypes(
                PartPrototypes(2, 1, 2), [(torch.ones(1, 2, n, n), torch.tensor([1])) for n in (2, 3)]
            ),
            "needed one size",
        ),
        (lambda: ClosenessLoss()(torch.ones(3, 2), 1), "num_classes: found 1"),
        (lambda: DiscriminationLoss()(torch.ones(3, 2), 1), "num_classes: found 1"),
        (lambda: DiscriminationLoss()(torch.ones(3, 2), 2), "prototypes: found 3 for 2 classes"),
        (lambda: SubspaceOrthogonalityLoss()(torch.ones(3, 2), 2), "prototypes: found 3 for 2 classes"),
        (lambda: SubspaceOrthogonalityLoss()(torch.ones(4, 2, 2, 2), 2), r"found shape \(4, 2, 2, 2\)"),
        (lambda: ClosenessLoss()(torch.ones(4, 2, 1, 2), 2), r"found shape \(4, 2, 1, 2\)"),
        (lambda: SubspaceOrthogonalityLoss("l2"), "norm: found 'l2'"),
        (lambda: SeparationLoss()(torch.ones(1, 2), torch.tensor([0]), torch.ones(2, 1)), "found 1 class"),
        (lambda: ClusterLoss()(torch.ones(1, 2), torch.tensor([2]), torch.eye(2)), "targets: found"),
        (lambda: ClusterLoss()(torch.ones(2, 2), torch.tensor([True, True]), torch.eye(2)), "found torch.bool"),
        (lambda: SeparationLoss()(torch.ones(2, 2), torch.tensor([0.0, 1.0]), torch.eye(2)), "found torch.float32"),
        (lambda: IncorrectConnectionL1Loss()(torch.ones(3, 2), torch.ones(3, 2)), "weight, class_identity"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_saliency_equals_the_authors_code(golden):
    heat, mask = torch.from_numpy(golden["saliency/heatmap"]), torch.from_numpy(golden["saliency/mask"])
    near(content_heatmap(heat, mask), golden["saliency/content_heatmap"])
    near(outside_inside_ratio(heat, mask), golden["saliency/oirr"])
    near(heatmap_iou(heat, mask), golden["saliency/iou"])
    near(deletion_auc(torch.from_numpy(golden["saliency/deletion_scores"])), golden["saliency/deletion_auc"])


def test_saliency_of_a_known_picture():
    heat = torch.tensor([[1.0, 0.6], [0.2, 0.0]])
    mask = torch.tensor([[1, 0], [1, 0]])
    near(content_heatmap(heat, mask), 0.6)
    near(outside_inside_ratio(heat, mask), 0.3 / 0.6)
    near(heatmap_iou(heat, mask), 1 / 3, rtol=1e-6)
    near(heatmap_iou(heat, mask, threshold=0.1), 2 / 3, rtol=1e-6)
    near(deletion_auc(torch.tensor([1.0, 0.5, 0.0])), 0.5)
    several = torch.stack([heat, heat.T]), torch.stack([mask, mask.T])
    near(outside_inside_ratio(*several), [0.5, 0.5])
    near(deletion_auc(torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])), [0.5, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: content_heatmap(torch.ones(2, 2), torch.zeros(2, 2)), "mask: found 1 of 1 without a pixel inside"),
        (lambda: outside_inside_ratio(torch.ones(2, 2), torch.ones(2, 2)), "mask: found 1 of 1 without a pixel outs"),
        (lambda: heatmap_iou(torch.ones(2, 2), torch.ones(2, 3)), "heatmap, mask: found shapes"),
        (lambda: deletion_auc(torch.ones(1)), "scores: found shape"),
    ],
)
def test_saliency_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_prototypes_learn_under_the_losses():
    torch.manual_seed(0)
    layer = PartPrototypes(3, 2, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    loss: nn.Module = DiscriminationLoss()
    layer.normalize_()
    before = loss(layer.prototypes, 3).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(layer.prototypes, 3).backward()
        optimizer.step()
        layer.normalize_()
    assert loss(layer.prototypes, 3).item() < before - 0.3
