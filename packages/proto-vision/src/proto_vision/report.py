"""The report of explained images: this part looks like that part of that training image.

The page itself is written by ``proto_core.explain.report``; here the images are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image
from torch import Tensor

from proto_core.explain import Comparison, Evidence, Explanation, Picture, ReportSection, render_report
from proto_vision.drawing import Location, draw_heat, draw_image, draw_part

__all__ = ["ImageSample", "image_report"]

FOOTER = (
    "The frame marks the pixels of the cell of the feature map where the prototype matched best; the network saw more "
    "than the frame. In the map of similarities bright is more similar. An image is shown as the network sees it, in "
    "its size. Predicted is the class whose probability is highest."
)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSample(ReportSection):
    """An explained image.

    Attributes:
        image: RGB, in the geometry of the model's input; the places of the explanations count its pixels.
        heat: prototype -> its map of similarities ``[h, w]``; prototypes without one are drawn without.
    """

    image: Image.Image = field(kw_only=True)
    heat: Mapping[int, Tensor] = field(kw_only=True, default_factory=dict)


def image_report(
    samples: Sequence[ImageSample],
    *,
    title: str,
    model_info: Mapping[str, str],
    read_case: Callable[[str], Image.Image],
    top: int = 3,
) -> str:
    """Write the report of some images.

    Args:
        samples: the explained images.
        title: of the page.
        model_info: shown in the head of the page, such as the model's name.
        read_case: gives a training image in the geometry of the model's input; called once per image. One that it
            cannot read (``OSError``, ``ValueError``, ``LookupError``) is shown as a note.
        top: how many prototypes are shown for each class, for and against.

    Returns:
        HTML: one file, no script, pictures inside.

    Raises:
        ValueError: no sample, or a sample without explanation.

    Example:
        >>> from PIL import Image
        >>> from proto_core.explain import Case, Evidence, Explanation
        >>> from proto_vision.report import ImageSample, image_report
        >>> image = Image.new("RGB", (32, 32))
        >>> case = Case("cat/1.png", index=0, location=((0, 8), (8, 8)), labels=("cat",))
        >>> evidence = (Evidence(0, "support", ("cat",), 0.9, 1.0, location=((8, 8), (8, 8)), case=case),)
        >>> found = Explanation("mine", "cat", logit=0.9, probability=0.7, threshold=0.3, bias=0.0, evidence=evidence)
        >>> sample = ImageSample("mine", (found,), image=image)
        >>> html = image_report([sample], title="Report", model_info={}, read_case=lambda name: image)
        >>> html.count("<img src="), "<script" in html
        (5, False)
    """
    painter = _Painter(read_case)
    return render_report(
        samples,
        title=title,
        metadata=model_info,
        draw_query=painter.query,
        draw_evidence=painter.evidence,
        footer=FOOTER,
        noun="Image",
        threshold="Best other class",
        top=top,
    )


class _Painter:
    """Draws the page's pictures; each training image is read once."""

    def __init__(self, read_case: Callable[[str], Image.Image]) -> None:
        self.read_case = read_case
        self.cases: dict[str, Image.Image | str] = {}

    def query(self, sample: ImageSample) -> Picture:
        size = f"{sample.image.width} x {sample.image.height} pixels"
        return Picture(draw_image(sample.image, None, sample.sample_id), f"Image {sample.sample_id}, {size}.")

    def evidence(self, sample: ImageSample, explanation: Explanation, item: Evidence) -> list[Comparison]:
        del explanation  # the picture of a match is the same for every class
        place = cast("Location | None", item.location)
        if item.prototype in sample.heat:
            image = draw_heat(sample.image, sample.heat[item.prototype], place, "similarities of this image")
            query = Picture(image, "This image: similarity to the prototype at every place, the best one framed.")
        else:
            query = Picture(draw_image(sample.image, place, "this image"), "This image, the best match framed.")
        if item.case is None:
            return [Comparison(query, Picture(None, "No training image.", "This prototype was never projected."))]
        name = item.case.sample_id
        found = self._read(name)
        if isinstance(found, str):
            note = f"The image could not be read: {found}"
            return [Comparison(query, Picture(None, f"Training image {name}.", note))]
        spot = cast("Location | None", item.case.location)
        case = Picture(draw_image(found, spot, name), f"Training image {name}, the prototype framed.")
        whole = Comparison(query, case)
        if place is None or spot is None:
            return [whole]
        part = Picture(draw_part(sample.image, place, "part of this image"), "This part of this image ...")
        other = Picture(draw_part(found, spot, f"part of {name}"), f"... looks like this part of {name}.")
        return [Comparison(part, other), whole]

    def _read(self, name: str) -> Any:
        """The training image, or why it cannot be had."""
        if name not in self.cases:
            try:
                self.cases[name] = self.read_case(name)
            except (OSError, ValueError, LookupError) as error:
                self.cases[name] = str(error) or type(error).__name__
        return self.cases[name]
