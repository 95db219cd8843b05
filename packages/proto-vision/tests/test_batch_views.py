"""Views of a whole batch: each step alone against its definition, draws that differ, ranges, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_vision.data.batch_views import random_views

STILL = {"scale": (1.0, 1.0), "jittered": 0.0, "grey": 0.0, "flip": 0.0}


def images(count=6, channels=3, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_nothing_drawn_leaves_the_images():
    torch.testing.assert_close(random_views(images(), **STILL), images(), atol=1e-5, rtol=1e-5)


def test_every_image_is_mirrored_by_its_own_draw():
    x = images(200)
    mirrored = random_views(x, **STILL | {"flip": 1.0})
    torch.testing.assert_close(mirrored, x.flip(-1), atol=1e-5, rtol=1e-5)
    some = random_views(x, **STILL | {"flip": 0.5}, generator=torch.Generator().manual_seed(1))
    kept = (some - x).abs().amax((1, 2, 3)) < 1e-4
    turned = (some - x.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert bool((kept ^ turned).all())
    assert 70 < int(kept.sum()) < 130


def test_grey_images_have_three_equal_channels():
    found = random_views(images(), **STILL | {"grey": 1.0})
    weights = torch.tensor([0.2989, 0.587, 0.114])
    expected = (images() * (weights / weights.sum()).reshape(3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_crops_hold_a_share_of_the_area():
    # on a ramp from left to right, the range of a crop is its width
    ramp = torch.linspace(0, 1, 64).expand(100, 1, 64, 64).contiguous()
    found = random_views(ramp, **STILL | {"scale": (0.25, 0.64)})
    width = (found.amax((1, 2, 3)) - found.amin((1, 2, 3))) * 64 / 63
    assert float(width.min()) > 0.47
    assert float(width.max()) < 0.83
    assert float(width.std()) > 0.03
    quarter = random_views(ramp, **STILL | {"scale": (0.25, 0.25)})
    assert float(quarter[:, 0, 0, 0].std()) > 0.05


def test_colours_change_by_factors_within_the_jitter():
    grey = torch.full((300, 3, 4, 4), 0.5)
    found = random_views(grey, **STILL | {"jittered": 1.0, "jitter": 0.4})
    # an image of one colour without colour knows brightness alone
    assert float(found.min()) > 0.5 * 0.6 - 1e-4
    assert float(found.max()) < 0.5 * 1.4 + 1e-4
    assert float(found[:, 0, 0, 0].std()) > 0.08
    untouched = random_views(images(300), **STILL | {"jittered": 0.3})
    share = float(((untouched - images(300)).abs().amax((1, 2, 3)) < 1e-4).float().mean())
    assert 0.6 < share < 0.8


@given(st.integers(0, 5), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_pixels_stay_pixels_and_draws_repeat(count, channels, size, seed):
    x = images(count, channels, size, seed)
    one, two = (random_views(x, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert one.shape == x.shape
    assert torch.equal(one, two)
    assert bool(((one >= 0) & (one <= 1)).all())


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"images: found shape \(2, 2, 8, 8\)"):
        random_views(torch.rand(2, 2, 8, 8))
    for scale in ((0.0, 1.0), (0.5, 0.2), (0.5, 1.5)):
        with pytest.raises(ValueError, match="scale: found"):
            random_views(images(), scale=scale)
    for name in ("jitter", "jittered", "grey", "flip"):
        with pytest.raises(ValueError, match=f"{name}: found 1.5"):
            random_views(images(), **{name: 1.5})
