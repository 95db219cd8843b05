"""Consistency and stability of part prototypes (EvalProtoPNet): the authors' values, borders, absent classes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.losses import ClusterLoss, SeparationLoss, SubspaceOrthogonalityLoss
from proto_core.metrics import (
    PartPrototypeScores,
    assign_parts,
    consistency_score,
    map_peaks,
    parts_near,
    peaks,
    perturb_images,
    rescale_part_locations,
    stability_score,
)
from proto_core.prototypes import PartPrototypes


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "evalprotopnet.npz")


@pytest.mark.parametrize("case", ["parts_a", "parts_b", "parts_c"])
def test_scores_equal_the_authors_code(golden, case):
    def value(name):
        return torch.from_numpy(golden[f"{case}/{name}"])

    size, half, classes = (int(value(name)) for name in ("img_size", "half_size", "num_classes"))
    locations = rescale_part_locations(value("part_locs"), value("boxes"), size)
    visible, targets = value("part_visible"), value("targets")
    clean, noisy = (
        assign_parts(value(name), locations, visible, img_size=size, half_size=half)
        for name in ("maps", "maps_perturbed")
    )
    assert clean.dtype == torch.bool
    assert torch.equal(clean.long(), value("assignment"))
    found = consistency_score(clean, visible, targets, classes, threshold=float(value("threshold")))
    assert found == pytest.approx(float(value("consistency")), abs=1e-4)
    assert stability_score(clean, noisy, targets, classes) == pytest.approx(float(value("stability")), abs=1e-4)


def test_rescaling_and_borders_equal_the_reference(golden):
    def value(name):
        return torch.from_numpy(golden[name])

    found = rescale_part_locations(value("rescale/part_locs"), value("rescale/boxes"), int(golden["rescale/img_size"]))
    assert found.dtype == torch.int64
    assert torch.equal(found, value("rescale/rescaled"))
    sizes = {"img_size": int(golden["border/img_size"]), "half_size": int(golden["border/half_size"])}
    met = assign_parts(value("border/maps"), value("border/part_locs"), value("border/part_visible"), **sizes)
    assert torch.equal(met.long(), value("border/assignment"))


def test_classes_without_images_equal_the_reference(golden):
    def value(name):
        return torch.from_numpy(golden[f"absent/{name}"])

    rest = value("targets"), int(golden["absent/num_classes"])
    found = consistency_score(value("assignment"), value("part_visible"), *rest)
    assert found == pytest.approx(float(golden["absent/consistency"]), abs=1e-9)
    stable = stability_score(value("assignment"), value("assignment_perturbed"), *rest)
    assert stable == pytest.approx(float(golden["absent/stability"]), abs=1e-9)


def test_losses_equal_the_authors_code(golden):
    for case in ("model_a", "model_b"):
        prototypes = torch.from_numpy(golden[f"{case}/prototypes"])
        classes, per_class = int(golden[f"{case}/num_classes"]), int(golden[f"{case}/prototypes_per_class"])
        layer = PartPrototypes(classes, per_class, prototypes.shape[1], similarity="projection")
        cosine, targets = (torch.from_numpy(golden[f"{case}/{name}"]) for name in ("max_cosine", "targets"))
        for found, name in [
            (ClusterLoss()(cosine, targets, layer.class_identity), "cluster"),
            (SeparationLoss()(cosine, targets, layer.class_identity), "separation"),
            (SubspaceOrthogonalityLoss()(prototypes, classes), "orthogonality"),
        ]:
            np.testing.assert_allclose(found.numpy(), golden[f"{case}/{name}"], rtol=1e-6, atol=1e-8)
    inputs = [torch.from_numpy(golden[f"negative/{name}"]) for name in ("similarities", "targets", "class_identity")]
    assert ClusterLoss()(*inputs).item() == pytest.approx(float(golden["negative/cluster"]), rel=1e-6)
    assert SeparationLoss()(*inputs).item() == pytest.approx(float(golden["negative/separation"]), rel=1e-6)


def images(seed: int, samples: int = 30, classes: int = 4):
    g = torch.Generator().manual_seed(seed)
    clean, noisy = (torch.rand(samples, 3, 5, generator=g) < 0.6 for _ in range(2))
    visible = torch.rand(samples, 5, generator=g) < 0.8
    return clean & visible.unsqueeze(1), noisy & visible.unsqueeze(1), visible, torch.arange(samples) % classes


def test_scores_equal_a_loop():
    clean, noisy, visible, targets = images(0)
    consistent, stable = [], []
    for c in range(4):
        rows = [n for n in range(30) if targets[n] == c]
        for k in range(3):
            shares = []
            for m in range(5):
                shown = sum(bool(visible[n, m]) for n in rows)
                shares.append(sum(bool(clean[n, k, m]) for n in rows) / max(1, shown))
            consistent.append(max(shares) >= 0.7)
            stable.append(np.mean([bool((clean[n, k] == noisy[n, k]).all()) for n in rows]))
    assert 0 < np.mean(consistent) < 1
    found = consistency_score(clean, visible, targets, 4, threshold=0.7)
    assert found == pytest.approx(100 * np.mean(consistent))
    assert stability_score(clean, noisy, targets, 4) == pytest.approx(100 * np.mean(stable))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 30), max_size=4))
def test_any_split_gives_the_same(seed, cuts):
    clean, noisy, visible, targets = images(seed)
    whole, split = (PartPrototypeScores(4, 3, 5) for _ in range(2))
    whole.update(clean, visible, targets, noisy)
    edges = [0, *sorted(cuts), 30]
    for a, b in itertools.pairwise(edges):
        split.update(clean[a:b], visible[a:b], targets[a:b], noisy[a:b])
    assert split.compute() == whole.compute()


def test_sure_cases():
    g = torch.Generator().manual_seed(0)
    places = torch.randint(8, 56, (60, 2), generator=g)
    maps = torch.zeros(60, 1, 64, 64)
    maps[torch.arange(60), 0, places[:, 1], places[:, 0]] = 1.0
    targets, options = torch.arange(60) % 3, {"img_size": 64, "half_size": 4}
    visible = torch.ones(60, 2, dtype=torch.bool)
    locations = torch.stack([places, torch.randint(0, 64, (60, 2), generator=g)], dim=1)
    met = assign_parts(maps, locations, visible, **options)
    assert consistency_score(met, visible, targets, 3) == 100
    assert stability_score(met, met, targets, 3) == 100
    astray = assign_parts(maps[torch.randperm(60, generator=g)], locations, visible, **options)
    assert consistency_score(astray, visible, targets, 3) < 50
    hidden = torch.zeros_like(visible)
    assert consistency_score(assign_parts(maps, locations, hidden, **options), hidden, targets, 3) == 0


def test_many_maps_go_in_parts_and_half_precision_in_float32(monkeypatch):
    clean = torch.rand(9, 2, 7, 7, generator=torch.Generator().manual_seed(3)).bfloat16()
    locations, visible = torch.randint(0, 32, (9, 4, 2)), torch.ones(9, 4)
    whole = assign_parts(clean.float(), locations, visible, img_size=32, half_size=5)
    monkeypatch.setitem(peaks.CACHED, "cpu", 1)
    assert torch.equal(assign_parts(clean, locations, visible, img_size=32, half_size=5), whole)


def test_shares_of_each_prototype_are_what_the_scores_count():
    clean, noisy, visible, targets = images(1)
    scores = PartPrototypeScores(5, 3, 5, threshold=0.7)  # no image of class 4
    scores.update(clean, visible, targets, noisy)
    shares, kept = scores.shares(), scores.kept()
    rows = targets == 2
    expected = (clean[rows, 1, 3].sum() / visible[rows, 3].sum()).double()
    torch.testing.assert_close(shares[2, 1, 3], expected, rtol=1e-6, atol=0)
    assert kept[2, 1].item() == pytest.approx((clean[rows, 1] == noisy[rows, 1]).all(1).double().mean().item())
    assert not shares[4].any()
    assert not kept[4].any()
    found = scores.compute()
    assert found["consistency"] == pytest.approx(100 * (shares[:4] >= 0.7).any(2).double().mean().item())
    assert found["stability"] == pytest.approx(100 * kept[:4].mean().item())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(1, 1), (2, 2), (7, 7), (5, 8), (14, 3)]),
    st.integers(1, 130),
    st.sampled_from(["values", "smooth", "negative", "few levels"]),
)
def test_peaks_are_those_of_maps_enlarged_whole(seed, grid, size, kind):
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, *grid, generator=g, dtype=torch.float64)
    maps = {
        "values": lambda: maps,
        "smooth": lambda: torch.nn.functional.avg_pool2d(maps, 3, 1, padding=1),
        "negative": lambda: -maps.abs() - 1,
        "few levels": lambda: maps.round(),
    }[kind]()
    found = map_peaks(maps, size)
    large = torch.nn.functional.interpolate(maps, (size, size), mode="bicubic").flatten(2)
    assert ((found >= 0) & (found < size)).all()
    at = large.gather(2, (found[..., 1] * size + found[..., 0])[..., None])[..., 0]
    slack = 1e-13 * maps.abs().amax((2, 3))
    assert (at >= large.amax(2) - slack).all()
    before = torch.arange(size * size) < (found[..., 1] * size + found[..., 0])[..., None]
    assert not (before & (large > (at + slack)[..., None])).any()


def test_the_first_of_equal_pixels_is_the_peak(monkeypatch):
    assert not map_peaks(torch.full((2, 3, 7, 7), 0.7), 100).any()
    assert not map_peaks(torch.full((1, 1, 7, 7), -0.3), 224).any()
    assert not map_peaks(torch.full((1, 1, 7, 7), torch.nan), 64).any()
    tie = torch.zeros(1, 1, 1, 2)
    tie[0, 0, 0] = torch.tensor([1.0, 1.0])
    assert map_peaks(tie, 8).tolist() == [[[0, 0]]]
    even = torch.zeros(1, 1, 5, 5)
    even[0, 0, 2, 2] = 1.0  # the middle lies between two pixels on each axis
    assert map_peaks(even, 40).tolist() == [[[19, 19]]]
    whole = map_peaks(torch.randn(50, 2, 7, 7, generator=torch.Generator().manual_seed(0)), 100)
    monkeypatch.setattr(peaks, "KEPT", 1)  # most maps then have to be computed whole
    again = map_peaks(torch.randn(50, 2, 7, 7, generator=torch.Generator().manual_seed(0)), 100)
    assert torch.equal(again, whole)


@pytest.mark.parametrize(("grid", "size"), [((7, 7), 224), ((7, 7), 100), ((4, 4), 24)])
def test_a_high_level_leaves_the_peak_of_small_differences_where_it_is(grid, size):
    low = torch.randn(40, 3, *grid, generator=torch.Generator().manual_seed(0))
    maps = 3 + 0.01 * low
    large = torch.nn.functional.interpolate(maps.double(), (size, size), mode="bicubic").flatten(2)
    found = map_peaks(maps, size)
    at = large.gather(2, (found[..., 1] * size + found[..., 0])[..., None])[..., 0]
    assert (large.amax(2) - at).max() < 1e-7


def test_a_flat_map_peaks_at_the_first_pixel_of_any_image():
    for grid in ((1, 1), (2, 3), (4, 4), (7, 7)):
        for size in (3, 7, 16, 17, 30, 32, 53, 100):
            maps = torch.tensor([0.7, -0.3, 1.1])[None, :, None, None].expand(2, 3, *grid)
            assert not map_peaks(maps, size).any(), (grid, size)


def test_fractions_are_cut_off_and_targets_are_integers_of_any_width():
    parts, boxes = torch.tensor([[[15.9, 30.9]]]), torch.tensor([[10.9, 20.2, 20.7, 40.9]])
    assert rescale_part_locations(parts, boxes, 224).tolist() == [[[112, 112]]]
    clean, noisy, visible, targets = images(2)
    for kind in (torch.int32, torch.int16):
        narrow = targets.to(kind)
        assert consistency_score(clean, visible, narrow, 4) == consistency_score(clean, visible, targets, 4)
        assert stability_score(clean, noisy, narrow, 4) == stability_score(clean, noisy, targets, 4)


def test_perturbation_is_clipped_noise():
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = perturb_images(x, generator=torch.Generator().manual_seed(1)) - x
    assert noise.abs().max() <= 0.25 + 1e-6
    assert (noise.abs() > 0.2499).float().mean().item() == pytest.approx(0.2113, abs=0.02)
    assert noise.std().item() == pytest.approx(0.167, abs=0.005)
    again = perturb_images(x, generator=torch.Generator().manual_seed(1)) - x
    assert torch.equal(noise, again)
    assert torch.equal(perturb_images(x, std=0.0), x)


ONES = torch.ones(2, 1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rescale_part_locations(torch.ones(1, 2, 2).long(), torch.tensor([[3, 1, 3, 4]]), 8),
            r"boxes: found \[3, 1, 3, 4\] in row 0",
        ),
        (lambda: rescale_part_locations(torch.ones(1, 2, 2).long(), torch.ones(2, 4).long(), 8), "part_locs, boxes"),
        (
            lambda: assign_parts(torch.ones(2, 1, 3, 3), torch.ones(2, 3, 2).long(), torch.ones(2, 4)),
            "maps, part_locs, part_visible: found shapes",
        ),
        (
            lambda: assign_parts(torch.ones(2, 1, 3, 3), torch.ones(2, 3, 2).long(), torch.ones(2, 3), half_size=-1),
            "half_size: found -1",
        ),
        (lambda: map_peaks(torch.ones(2, 3, 3), 8), "maps: found shape"),
        (lambda: map_peaks(torch.ones(2, 0, 3, 3), 8), "maps: found shape"),
        (
            lambda: parts_near(torch.ones(2, 1, 2).long(), torch.ones(2, 3, 2).long(), torch.ones(2, 4)),
            "peaks, part_locs, part_visible: found shapes",
        ),
        (lambda: consistency_score(ONES, torch.ones(2, 2), torch.tensor([0, 1]), 2), "found shapes"),
        (lambda: consistency_score(ONES, torch.ones(2, 3), torch.tensor([0, 2]), 2), "targets: found values"),
        (lambda: consistency_score(ONES[:0], torch.ones(0, 3), torch.tensor([0])[:0], 2), "found no image"),
        (lambda: consistency_score(ONES[0], torch.ones(1, 3), torch.tensor([0]), 2), "assignment: found shape"),
        (lambda: stability_score(ONES[0], ONES[0], torch.tensor([0]), 2), "assignment: found shape"),
        (lambda: stability_score(ONES, ONES[:1], torch.tensor([0, 1]), 2), "found shapes"),
        (lambda: stability_score(ONES, ONES, torch.tensor([0.0, 1.0]), 2), "targets: found torch.float32"),
        (lambda: perturb_images(torch.ones(1, 3, 2, 2), std=-1.0), "std, eps"),
        (lambda: perturb_images(torch.ones(1, 3, 2, 2), std=float("nan")), "std, eps: found nan and 0.25"),
        (lambda: perturb_images(torch.ones(1, 3, 2, 2, dtype=torch.uint8)), "images: found torch.uint8"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
