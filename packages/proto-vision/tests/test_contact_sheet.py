"""The contact sheet: one self-contained page, escaped, small images whole, large ones reduced."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from proto_vision.contact_sheet import SheetGroup, SheetItem, contact_sheet


def pictures(html):
    """Kind and image of each embedded picture."""
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', html)
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in found]


def test_texts_are_escaped_and_nothing_lies_outside_the_page():
    evil = "<script>alert(1)</script>\"'&\u202e\x00"
    item = SheetItem(Image.new("RGB", (4, 4)), evil, evil)
    html = contact_sheet([SheetGroup(evil, evil, [item])], title=evil, info={evil: evil}, note=evil)
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "\x00" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;alert(1)") == 10  # title twice, two facts, heading, note, alt, two lines, remark


def test_groups_keep_their_order_and_say_when_they_are_empty():
    one = SheetItem(Image.new("L", (4, 4)), "first caption", "first detail")
    two = SheetItem(Image.new("RGBA", (4, 4)), "second caption")
    html = contact_sheet([SheetGroup("A", "of note", [one, two]), SheetGroup("B", "", [])], title="T")
    order = ["<h1>T", "#g1", "#g2", "<bdi>A</bdi></h2>", "of note", "first caption", "first detail", "second caption"]
    places = [html.index(text) for text in [*order, "<bdi>B</bdi></h2>", "No image."]]
    assert places == sorted(places)
    assert html.count("<figure") == 2
    assert "2 images" in html
    assert "0 images" in html
    assert "<footer" not in html
    assert "<nav" not in contact_sheet([SheetGroup("A", "", [one])], title="T")


def test_small_images_keep_their_pixels_and_large_ones_are_reduced():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 96, 3), dtype=np.uint8))
    large = Image.new("RGB", (1000, 500), (10, 200, 30))
    html = contact_sheet([SheetGroup("A", "", [SheetItem(small, "s"), SheetItem(large, "l")])], title="T")
    (kind, first), (other, second) = pictures(html)
    assert (kind, other) == ("png", "jpeg")
    assert np.array_equal(np.asarray(first), np.asarray(small))
    assert second.size == (288, 144)
    assert np.abs(np.asarray(second).astype(int) - (10, 200, 30)).max() < 6
    assert large.size == (1000, 500)
    assert html.count('class="small"') == 1


def test_a_sheet_without_groups_is_refused():
    with pytest.raises(ValueError, match="groups: found none"):
        contact_sheet([], title="T")
