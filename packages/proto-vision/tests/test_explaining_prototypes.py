"""Explaining prototypes: the authors' images and scores, the card's edge cases, running sums, ProtoPNet's layer."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import nn
from torchvision.transforms.v2 import functional as F

from proto_core.prototypes import PartPrototypes, push_part_prototypes
from proto_vision.explaining import (
    CHARACTERISTICS,
    LocalScores,
    PrototypeExplainer,
    explain,
    generalisation_test,
    global_scores,
    local_scores,
    perturb,
    perturb_all,
    redundancy,
)

OPENCV = importlib.util.find_spec("cv2") is not None
needs_opencv = pytest.mark.skipif(not OPENCV, reason="texture needs OpenCV (the extra 'texture' of proto-vision)")
WITHOUT_TEXTURE = tuple(name for name in CHARACTERISTICS if name != "texture")


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "explaining_prototypes.npz")


def random_image(seed, height, width):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# -- perturbations


@pytest.mark.parametrize("case", ["perturb_a", "perturb_b"])
@pytest.mark.parametrize("name", WITHOUT_TEXTURE)
def test_changes_equal_the_authors_code(golden, case, name):
    found = perturb(torch.from_numpy(golden[f"{case}/image"]), name)
    assert found.dtype == torch.uint8
    away = np.abs(found.numpy().astype(int) - golden[f"{case}/{name}"]).max()
    assert away <= (0 if name in ("shape", "brightness") else 1)


@needs_opencv
@pytest.mark.parametrize("case", ["perturb_a", "perturb_b"])
def test_texture_equals_the_authors_code(golden, case):
    found = perturb(torch.from_numpy(golden[f"{case}/image"]), "texture")
    assert np.abs(found.numpy().astype(int) - golden[f"{case}/texture"]).max() <= 1
    assert perturb(random_image(0, 3, 2), "texture").shape == (3, 3, 2)
    assert torch.equal(perturb_all(torch.from_numpy(golden[f"{case}/image"]))[4], found)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1.5), st.floats(-0.5, 0.5))
def test_colours_change_as_pil_changes_them(seed, height, width, strength, turn):
    image = random_image(seed, height, width)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    for name, reference, value in (
        ("contrast", F.adjust_contrast, strength),
        ("saturation", F.adjust_saturation, strength),
        ("brightness", F.adjust_brightness, strength),
        ("hue", F.adjust_hue, turn),
    ):
        expected = torch.from_numpy(np.array(reference(pil, value))).permute(2, 0, 1)
        assert torch.equal(perturb(image, name, strength=value), expected), name


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 50), st.integers(1, 50))
def test_shape_rolls_rows_then_columns(seed, height, width):
    image = random_image(seed, height, width)
    expected = image.numpy().copy()
    for i in range(height):
        expected[:, i] = np.roll(expected[:, i], int(4 * np.sin(np.pi * i * 0.05)), axis=1)
    for j in range(width):
        expected[:, :, j] = np.roll(expected[:, :, j], int(4 * np.sin(np.pi * j * 0.05)), axis=1)
    np.testing.assert_array_equal(perturb(image, "shape"), expected)
    assert torch.equal(perturb(image, "shape", strength=(0, 0.05)), image)


def test_known_levels_are_cut_not_rounded():
    pixel = torch.tensor([201, 99, 7], dtype=torch.uint8)[:, None, None]
    assert perturb(pixel, "brightness").flatten().tolist() == [160, 79, 5]  # 160.8, 79.2, 5.6
    luma = (19595 * 201 + 38470 * 99 + 7471 * 7 + 32768) >> 16
    assert perturb(pixel, "saturation").flatten().tolist() == [int(luma + 0.7 * (v - luma)) for v in (201, 99, 7)]
    two = torch.tensor([[0, 255]] * 3, dtype=torch.uint8)[:, None]  # grey 127.5, which becomes 128
    assert perturb(two, "contrast")[0, 0].tolist() == [int(128 - 0.45 * 128), int(128 + 0.45 * 127)]


def test_grey_and_constant_images_do_not_change_where_they_cannot():
    grey = random_image(0, 9, 11)[:1].expand(3, -1, -1)
    for name in ("hue", "saturation"):
        assert torch.equal(perturb(grey, name), grey), name
    constant = torch.tensor([90, 90, 90], dtype=torch.uint8)[:, None, None].expand(3, 5, 5)
    for name in ("contrast", "hue", "saturation", "shape"):
        assert torch.equal(perturb(constant, name), constant), name
    explainer = PrototypeExplainer(two_maps, lambda image: image / 255, characteristics=WITHOUT_TEXTURE)
    delta = explainer.local(grey).delta
    assert (delta[:, [WITHOUT_TEXTURE.index("hue"), WITHOUT_TEXTURE.index("saturation")]] == 0).all()


def test_without_opencv_texture_alone_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = random_image(0, 8, 8)
    assert perturb_all(image, WITHOUT_TEXTURE).shape == (5, 3, 8, 8)
    for call in (lambda: perturb(image, "texture"), lambda: perturb_all(image)):
        with pytest.raises(ImportError, match="extra 'texture' of proto-vision"):
            call()


@pytest.mark.bad_input
def test_bad_images_and_settings_are_named():
    image = random_image(0, 4, 4)
    for call, says in [
        (lambda: perturb(image, "colour"), "found .'colour'., needed some of"),
        (lambda: perturb(image.float(), "hue"), "found torch.float32"),
        (lambda: perturb(image[:2], "hue"), r"found torch.uint8 \(2, 4, 4\), needed a uint8 tensor \[3, H, W\]"),
        (lambda: perturb(image[None], "hue"), r"\(1, 3, 4, 4\)"),
        (lambda: perturb(image.numpy(), "hue"), "found ndarray"),
        (lambda: perturb(image[:, :0], "hue"), "one pixel at least"),
        (lambda: perturb(image, "contrast", strength=-1), "strength: found -1 for contrast"),
        (lambda: perturb(image, "hue", strength=float("nan")), "strength: found nan for hue"),
        (lambda: perturb(image, "shape", strength=4), "two numbers"),
        (lambda: perturb(image, "shape", strength=(4, 1, 2)), "two numbers"),
        (lambda: perturb(image, "texture", strength="much"), "strength: found 'much'"),
        (lambda: perturb_all(image, ()), "characteristics: found"),
        (lambda: perturb_all(image, ("hue", "hue")), "none twice"),
        (lambda: PrototypeExplainer(two_maps, torch.relu, characteristics=("hue", "size")), "'size'"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


# -- scores


@pytest.mark.parametrize("case", ["scores_a", "scores_b"])
def test_scores_equal_the_authors_code(golden, case):
    def value(name):
        return torch.from_numpy(golden[f"{case}/{name}"])

    prototypes = value("prototypes")
    layer = PartPrototypes(1, len(prototypes), prototypes.shape[1], similarity="l2_log").double()
    layer.prototypes.data.copy_(prototypes)
    pooled, maps = layer(value("features"))
    np.testing.assert_allclose(maps.detach(), value("maps"), rtol=1e-6)
    np.testing.assert_allclose(pooled.detach(), value("similarity"), rtol=1e-6)
    found = local_scores(value("maps"), value("perturbed_maps"))
    exact = {"rtol": 1e-9, "atol": 1e-10}
    np.testing.assert_array_equal(found.location, value("location"))
    np.testing.assert_allclose(found.similarity, value("similarity"), **exact)
    np.testing.assert_allclose(found.delta, value("delta"), **exact)
    scores = global_scores(found.delta, found.similarity)
    np.testing.assert_allclose(scores, value("global"), **exact)
    np.testing.assert_allclose(redundancy(scores), value("redundancy"), **exact)


def test_changed_maps_are_read_at_the_place_of_the_original():
    maps = torch.zeros(1, 1, 2, 3)
    maps[0, 0, 1, 1] = 2.0
    changed = torch.zeros(1, 1, 1, 2, 3)
    changed[0, 0, 0, 0, 0], changed[0, 0, 0, 1, 1] = 9.0, 2.5
    found = local_scores(maps, changed)
    assert found.location.item() == 4
    assert found.delta.item() == -0.5
    tied = local_scores(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2))
    assert tied.location.item() == 0


def test_half_precision_is_subtracted_in_full():
    maps = (9 + torch.rand(2, 3, 2, 2)).bfloat16()
    changed = (9 + torch.rand(2, 2, 3, 2, 2)).bfloat16()
    found = local_scores(maps, changed)
    assert found.delta.dtype == torch.float32
    expected = local_scores(maps.float(), changed.float())
    assert all(torch.equal(one, two) for one, two in zip(found, expected))


def test_weights_that_add_up_to_nothing_give_nan():
    delta = torch.tensor([[[1.0, 2.0, 1.0]], [[3.0, 4.0, 3.0]]])
    similarity = torch.tensor([[0.5, 1.0, -1.0], [-0.5, 1.0, -3.0]])
    found = global_scores(delta, similarity)
    assert found[0].isnan().all()
    assert found[1:].flatten().tolist() == [3.0, 2.5]  # negative similarities weigh as they are


def test_redundancy_is_a_distance():
    scores = torch.rand(5, 6, dtype=torch.float64)
    scores[3] = scores[1]
    found = redundancy(scores)
    assert (found.diagonal() == 0).all()
    assert found[1, 3] == 0
    assert torch.equal(found, found.T)
    assert found[0, 2].item() == pytest.approx((scores[0] - scores[2]).norm().item())


def test_explain_sorts_and_selects():
    row = torch.tensor([0.1, 0.5, float("nan"), 2.0, 0.5, -1.0])
    assert explain(row)[:3] == [("shape", 2.0), ("saturation", 0.5), ("texture", 0.5)]
    assert [name for name, _ in explain(row)][-1] == "hue"
    assert explain(row, 1) == [("shape", 2.0)]
    assert len(explain(row, 99)) == 6
    papers = explain(row, characteristics=CHARACTERISTICS[:5])
    assert {name for name, _ in papers} == set(CHARACTERISTICS) - {"brightness"}
    assert explain([1.0, 2.0], characteristics=("hue", "shape")) == [("shape", 2.0), ("hue", 1.0)]


def test_generalisation_is_welchs_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 6)), rng.normal(0.3, 2, size=(20, 6))
    a[3, 2] = np.nan
    found = generalisation_test(torch.from_numpy(a), torch.from_numpy(b))
    assert tuple(found) == CHARACTERISTICS
    for q, name in enumerate(CHARACTERISTICS):
        one = a[np.isfinite(a[:, q]), q]
        t, p = stats.ttest_ind(one, b[:, q], equal_var=False)
        expected = [one.mean(), b[:, q].mean(), one.std(ddof=1), b[:, q].std(ddof=1), t, p]
        assert list(found[name].values()) == pytest.approx(expected)
    alone = generalisation_test(torch.ones(1, 6), torch.ones(1, 6))["hue"]
    assert alone["mean_a"] == 1
    assert all(np.isnan(alone[key]) for key in ("std_a", "welch_t", "welch_p"))


@pytest.mark.bad_input
def test_bad_scores_are_named():
    maps, changed = torch.rand(2, 3, 4, 4), torch.rand(2, 6, 3, 4, 4)
    spoilt = changed.clone()
    spoilt[0, 0, 0, 0, 0] = torch.nan
    for call, says in [
        (lambda: local_scores(maps, changed[:1]), "maps, perturbed_maps: found shapes"),
        (lambda: local_scores(maps, changed[..., :3]), "maps, perturbed_maps: found shapes"),
        (lambda: local_scores(maps, maps), "maps, perturbed_maps: found shapes"),
        (lambda: local_scores(maps[:0], changed[:0]), "maps, perturbed_maps: found shapes"),
        (lambda: local_scores(maps, spoilt), "perturbed_maps: found NaN"),
        (lambda: local_scores(maps * torch.nan, changed), "maps: found NaN"),
        (lambda: global_scores(torch.rand(2, 6, 3), torch.rand(2, 4)), "delta, similarity: found shapes"),
        (lambda: global_scores(torch.rand(0, 6, 3), torch.rand(0, 3)), "N at least 1"),
        (lambda: redundancy(torch.rand(3)), "scores: found shape"),
        (lambda: explain(torch.rand(4)), "score_row: found shape"),
        (lambda: explain(torch.rand(6), 0), "k: found 0"),
        (lambda: explain(torch.rand(6), characteristics=("size",)), "'size'"),
        (lambda: generalisation_test(torch.rand(3, 5), torch.rand(3, 6)), "scores_a: found shape"),
        (lambda: generalisation_test(torch.rand(3, 6), torch.rand(6)), "scores_b: found shape"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


# -- the explainer


def two_maps(images):
    """Two prototypes: one looks for light, one for red against blue."""
    return torch.stack([images.mean(1), images[:, 0] - images[:, 2]], 1) + 2


def test_running_sums_equal_the_whole():
    images = [random_image(seed, 6 + seed, 9) for seed in range(5)]
    explainer = PrototypeExplainer(two_maps, sized, characteristics=WITHOUT_TEXTURE)
    parts = [explainer.local(image) for image in images]
    assert isinstance(parts[0], LocalScores)
    assert parts[0].delta.shape == (1, 5, 2)
    with pytest.raises(ValueError, match="images: found none"):
        explainer.global_scores()
    delta, similarity = torch.cat([p.delta for p in parts]), torch.cat([p.similarity for p in parts])
    expected = global_scores(delta.double(), similarity.double())
    whole = explainer.run(iter(images), batch_size=2).global_scores()
    torch.testing.assert_close(whole, expected)
    explainer.reset()
    assert explainer.run(images[:3]).run(images[3:]).num_images == 5  # two runs go on with one sum
    torch.testing.assert_close(explainer.global_scores(), expected)
    assert explainer(images[0]).delta.equal(parts[0].delta)


def sized(image):
    return F.resize(image, [6, 6], antialias=True) / 255


def test_a_module_is_asked_in_evaluation_mode_without_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.drop = nn.Parameter(torch.ones(1)), nn.Dropout(0.9)

        def forward(self, images):
            assert not self.drop.training
            return self.drop(two_maps(images)) * self.scale

    net = Net()
    explainer = PrototypeExplainer(net, sized, characteristics=("contrast", "brightness"))
    found = explainer.local(random_image(1, 6, 6))
    assert net.training
    assert net.drop.training
    assert not found.delta.requires_grad
    bright = found.delta[0, 1, 0].item()
    assert bright == pytest.approx(0.2 * (found.similarity[0, 0].item() - 2), abs=0.01)


@pytest.mark.bad_input
def test_bad_input_of_the_explainer_is_named():
    explainer = PrototypeExplainer(two_maps, sized, characteristics=("hue", "shape"))
    flat = PrototypeExplainer(lambda images: images.mean((2, 3)), sized, characteristics=("hue",))
    for call, says in [
        (lambda: explainer.run([]), "images: found none"),
        (lambda: explainer.run([random_image(0, 4, 4)], batch_size=0), "batch_size: found 0"),
        (lambda: explainer.update(torch.rand(2, 4, 3, 6, 6)), r"needed \[N, 3, channels, S, S\]"),
        (lambda: flat.local(random_image(0, 4, 4)), r"model: gave shape \(2, 3\)"),
        (lambda: explainer.local(torch.rand(3, 4, 4)), "image: found torch.float32"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    explainer.run([random_image(0, 4, 4)])
    explainer.model = lambda images: images
    with pytest.raises(ValueError, match="found 3 prototypes, before 2"):
        explainer.run([random_image(0, 4, 4)])


# -- ProtoPNet's layer (see the card's section 2)


def test_distances_are_those_of_patches_and_never_negative():
    layer = PartPrototypes(2, 2, 3, patch_size=2, similarity="l2_log", epsilon=1e-3).double()
    features = torch.randn(2, 3, 4, 5).double()
    maps = layer.distance_maps(features)
    for p in range(4):
        for r in range(3):
            for c in range(4):
                away = (features[:, :, r : r + 2, c : c + 2] - layer.prototypes[p]).square().sum((1, 2, 3))
                torch.testing.assert_close(maps[:, p, r, c], away)
    torch.testing.assert_close(layer(features)[1], ((maps + 1) / (maps + 1e-3)).log())
    with torch.no_grad():
        layer.prototypes[1].copy_(features[1, :, 1:3, 2:4])
    pooled, _ = layer(features)
    assert pooled[1, 1].item() == pytest.approx(np.log(1e3), abs=1e-3)
    pooled.sum().backward()
    assert layer.prototypes.grad.isfinite().all()


def test_push_takes_the_patch_as_it_is():
    layer = PartPrototypes(2, 1, 2, similarity="l2_log")
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0]])[:, :, None, None]
    found = push_part_prototypes(layer, [(features, torch.tensor([0, 1]))])
    assert found.image_index.tolist() == [0, 1]
    assert torch.equal(layer.prototypes.detach()[:, :, 0, 0], features[:, :, 0, 0])


def test_layer_computes_half_precision_in_full_and_refuses_bad_settings():
    layer = PartPrototypes(2, 1, 3, similarity="l2_log")
    features = torch.rand(2, 3, 4, 4).bfloat16()
    assert layer(features)[1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(features)[1], layer(features.float())[1])
    for settings_, says in (({"epsilon": 0}, "epsilon: found 0"), ({"similarity": "l2"}, "similarity: found 'l2'")):
        with pytest.raises(ValueError, match=says):
            PartPrototypes(2, 1, 3, **{"similarity": "l2_log"} | settings_)
