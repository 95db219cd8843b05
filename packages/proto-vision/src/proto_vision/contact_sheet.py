"""A contact sheet: many images in groups on one page, each with a caption, to look through by eye.

The page is one file with inline style, no script and no reference to anything outside it; every text is escaped. Small
images stay as they are and are enlarged by the browser with hard edges; large ones are reduced to JPEG thumbnails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from markupsafe import Markup
from PIL import Image

from proto_core.explain import plain_text, render_page
from proto_vision.data.images import to_rgb
from proto_vision.drawing import embed

__all__ = ["SheetGroup", "SheetItem", "contact_sheet"]

SMALL = 96
"""Longest side, in pixels, up to which an image is kept whole."""
THUMBNAIL = 288
"""Longest side of a reduced image: twice the width of a column, for dense screens and print."""


@dataclass(frozen=True, slots=True, eq=False)
class SheetItem:
    """An image of the sheet.

    Attributes:
        image: of any mode and size.
        caption: what it is, in a few words; also the text for those who cannot see it.
        detail: a second, smaller line.
    """

    image: Image.Image
    caption: str
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SheetGroup:
    """Images that belong together.

    Attributes:
        title: heading of the group.
        note: a sentence below the heading; may be empty.
        items: the images in order; a group without any says so.
    """

    title: str
    note: str
    items: Sequence[SheetItem]


def contact_sheet(
    groups: Sequence[SheetGroup], *, title: str, info: Mapping[str, str] = MappingProxyType({}), note: str = ""
) -> str:
    """Write the page.

    Args:
        groups: in the order of the page.
        title: of the page.
        info: facts for its head, such as the model's name.
        note: closing remark.

    Returns:
        HTML: one file, no script, pictures inside.

    Raises:
        ValueError: no group.

    Example:
        >>> from PIL import Image
        >>> from proto_vision.contact_sheet import SheetGroup, SheetItem, contact_sheet
        >>> items = [SheetItem(Image.new("RGB", (8, 8)), "cats & dogs", "cats/1.png")]
        >>> html = contact_sheet([SheetGroup("Pets", "", items)], title="Sheet")
        >>> html.count("<img src="), "cats &amp; dogs" in html, "<script" in html
        (1, True, False)
    """
    if not groups:
        raise ValueError("groups: found none, needed at least one")
    drawn = [(group, [(item, *_drawn(item)) for item in group.items]) for group in groups]
    return render_page("proto_vision", "contact_sheet.html", groups=drawn, title=title, info=info, note=note)


def _drawn(item: SheetItem) -> tuple[Markup, bool]:
    """The image as markup, and whether it is shown enlarged."""
    image, alt = to_rgb(item.image), plain_text(item.caption)
    if max(image.size) <= SMALL:
        return embed(image, alt), True
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return embed(image, alt, "jpeg"), False
