"""Pictures of prototypes by the training images that show them; what pages about prototypes draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from PIL import Image

from proto_core.explain import Evidence, Picture
from proto_vision.drawing import Location, draw_image, draw_part

__all__ = ["CaseGallery"]


class CaseGallery:
    """Pictures of prototypes: the training image that each is projected onto, or its part alone.

    Each image is read once; one that cannot be read is a note.

    Args:
        prototypes: records of the prototypes.
        read_case: gives a training image in the geometry of the model's input.

    Example:
        >>> from PIL import Image
        >>> from proto_core.explain import Case, Evidence
        >>> from proto_vision.case_gallery import CaseGallery
        >>> case = Case("cat/1.png", index=0, location=((0, 8), (8, 8)), labels=("cat",))
        >>> records = [Evidence(0, "parts", ("cat",), 0.9, 1.0, None, case)]
        >>> CaseGallery(records, lambda name: Image.new("RGB", (32, 32))).whole(0).caption
        'Prototype 0, framed in cat/1.png.'
    """

    def __init__(self, prototypes: Sequence[Evidence], read_case: Callable[[str], Image.Image]) -> None:
        self.prototypes, self.read_case = prototypes, read_case
        self.known: dict[str, Image.Image | str] = {}

    def whole(self, number: int) -> Picture:
        """The prototype's training image, its place framed."""
        return self._picture(number, whole=True)

    def part(self, number: int) -> Picture:
        """The prototype alone."""
        return self._picture(number, whole=False)

    def _picture(self, number: int, *, whole: bool) -> Picture:
        case = self.prototypes[number].case
        if case is None:
            return Picture(None, f"Prototype {number}.", "It was never projected onto a training image.")
        name, place = case.sample_id, cast("Location", case.location)
        if name not in self.known:
            try:
                self.known[name] = self.read_case(name)
            except (OSError, ValueError, LookupError) as error:
                self.known[name] = f"The image could not be read: {error}"
        image = self.known[name]
        if isinstance(image, str):
            return Picture(None, f"Prototype {number}: {name}.", image)
        if whole:
            return Picture(draw_image(image, place, name), f"Prototype {number}, framed in {name}.")
        return Picture(draw_part(image, place, f"part of {name}"), f"Prototype {number}: part of {name}.")
