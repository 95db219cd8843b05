"""Explanations by prototypes that a decoder can draw: distances, the classifier's row, and pictures of prototypes.

Logits are sums of weighted distances, ``logit_c = sum_j w_cj d_j``. A network names its distances and weights and
decodes its prototypes; the records, the table and the page are made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from proto_core.explain import Comparison, Evidence, Explanation, Picture, ReportSection, plain_text, render_report
from proto_core.modes import evaluation_mode
from proto_vision.data.module import ImageDataModule
from proto_vision.drawing import draw_heat, draw_image, draw_part
from proto_vision.explanation import class_explanations

__all__ = ["DecodedEvidence", "DecodedPrototypes", "ExplainsByDistance"]


_ABOUT = (
    "Pictures of prototypes are what the decoder makes of them; no training image looks exactly so. Distances are "
    "squared, between the codes of image and prototype. A prototype stands for the class to which it has its lowest "
    "weight: the farther the image is from it, the more it takes from that class and the more it adds to others, so "
    "that a prototype which speaks for a class is mostly one of another class that the image is far from."
)


class DecodedEvidence(NamedTuple):
    """What the decision about some images rests on.

    Attributes:
        logits: ``[N, C]``.
        probabilities: ``[N, C]``.
        distances: ``[N, P]`` (or similarities), of which the logits are sums with ``weight``.
        weight: ``[C, P]`` the classifier's.
        reconstruction: ``[N, channels, S, S]`` pixel values in [0, 1], or ``None``.
        facts: for each image what else the page says of it.
        bias: ``[C]`` what the logits have beside the sums, or ``None``.
    """

    logits: Tensor
    probabilities: Tensor
    distances: Tensor
    weight: Tensor
    reconstruction: Tensor | None
    facts: Sequence[Mapping[str, str]]
    bias: Tensor | None = None


class DecodedPrototypes(NamedTuple):
    """Pictures of the prototypes, pixel values in [0, 1].

    Attributes:
        images: ``[P, channels, S, S]``.
        samples: ``[K, P, channels, S, S]`` of prototypes that are distributions, or ``None``.
        spread: ``[P, S, S]`` standard deviation of many samples at every pixel, or ``None``.
    """

    images: Tensor
    samples: Tensor | None = None
    spread: Tensor | None = None


class ExplainsByDistance:
    """``explain`` and ``explain_images``, mixed into a network that offers the two methods that raise here."""

    measure = "distance"
    """What the page calls the distances."""
    larger_is_nearer = False
    """Whether they are similarities."""
    origin = "decoded"
    """How a prototype became a picture."""
    about = _ABOUT
    """What a reader of the page has to know about prototypes and distances."""
    remark = ""
    """What a reader of the page has to know about this network."""

    def decoded_evidence(
        self, images: Float[Tensor, "N channels S S"], data: ImageDataModule | None
    ) -> DecodedEvidence:
        """The evidence of some images; ``data`` is what the network was trained on, where facts need it."""
        raise TypeError(f"{type(self).__name__} does not say what its logits are sums of")

    def decoded_prototypes(self, data: ImageDataModule | None = None) -> DecodedPrototypes:
        """Pictures of the prototypes; ``data`` is what the network was trained on, where pictures need it."""
        raise TypeError(f"{type(self).__name__} does not draw its prototypes")

    def explain(
        self,
        images: Float[Tensor, "N channels S S"],
        sample_ids: Sequence[str],
        labels: Sequence[str] | None = None,
    ) -> list[tuple[Explanation, ...]]:
        """Explain images.

        Args:
            images: as the data module prepares them for testing.
            sample_ids: one name per image.
            labels: classes to explain; by default the predicted one.

        Returns:
            For each image its explanations by falling probability. Every prototype is in each explanation, its
            ``similarity`` is the distance; the contributions add up to the logit. A prototype stands for the class
            for which nearness speaks most: that of its lowest weight, of similarities that of its highest.

        Raises:
            ValueError: unknown class, or another number of names than images.
        """
        return self._explained(self._evaluated(images, None), sample_ids, labels)

    @torch.no_grad()
    def _evaluated(self, images: Tensor, data: ImageDataModule | None) -> DecodedEvidence:
        with evaluation_mode(cast(nn.Module, self)):
            return self.decoded_evidence(images.to(cast(Any, self).device), data)

    def _explained(
        self, found: DecodedEvidence, sample_ids: Sequence[str], labels: Sequence[str] | None
    ) -> list[tuple[Explanation, ...]]:
        names = cast(Any, self).class_names
        weight, distances = found.weight.cpu().double(), found.distances.cpu().double()
        owners = [names[c] for c in (weight.argmax(0) if self.larger_is_nearer else weight.argmin(0)).tolist()]

        def evidence(n: int, c: int) -> tuple[Evidence, ...]:
            rows = zip(owners, distances[n].tolist(), weight[c].tolist())
            items = [Evidence(p, "prototypes", (owner,), d, w) for p, (owner, d, w) in enumerate(rows)]
            return tuple(sorted(items, key=lambda item: -item.contribution))

        return class_explanations(names, sample_ids, labels, found.logits, found.probabilities, evidence, found.bias)

    def explain_images(
        self,
        data: ImageDataModule,
        images: Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        top: int = 3,
        source: str = "",
    ) -> str:
        """See :class:`proto_vision.explanation.ExplainsImages`."""
        net = cast(Any, self)
        places = [data.find_image(name) for name in images]
        inputs = torch.stack([data.model_input(place) for place in places])
        found = self._evaluated(inputs, data)
        with torch.no_grad(), evaluation_mode(net):
            gallery = _Gallery(self.decoded_prototypes(data), self.measure, self.origin, self.larger_is_nearer)
        samples = []
        for n, (name, place, explanations) in enumerate(
            zip(images, places, self._explained(found, images, labels), strict=True)
        ):
            row = data.find_row(place) if isinstance(place, str) else None
            samples.append(
                _DecodedSample(
                    sample_id=name,
                    explanations=explanations,
                    metadata=found.facts[n],
                    targets=None if row is None else tuple(data.describe(row)[1]),
                    requested=labels is not None,
                    image=data.view(place),
                    reconstruction=None if found.reconstruction is None else _picture(found.reconstruction[n]),
                )
            )
        return render_report(
            samples,
            title="Why the model says so",
            metadata={
                "model": f"{net.paper.title} ({net.system})",
                "classes": str(net.num_classes),
                "prototypes": str(found.weight.shape[1]),
                "checkpoint": source,
            },
            draw_query=gallery.query,
            draw_evidence=gallery.evidence,
            footer=f"{self.about} {self.remark}".strip(),
            noun="Image",
            threshold="Best other class",
            measure=self.measure,
            without_case="",
            top=top,
        )


def _picture(pixels: Float[Tensor, "channels S S"]) -> Image.Image:
    """RGB."""
    return transforms.to_pil_image(pixels.detach().float().cpu().clamp(0, 1)).convert("RGB")


@dataclass(frozen=True, slots=True, eq=False)
class _DecodedSample(ReportSection):
    """An explained image and what the decoder makes of its code."""

    image: Image.Image = field(kw_only=True)
    reconstruction: Image.Image | None = field(kw_only=True)


class _Gallery:
    """Draws the page's pictures; each prototype is drawn once."""

    def __init__(self, prototypes: DecodedPrototypes, measure: str, origin: str, larger_is_nearer: bool) -> None:
        self.measure, self.origin, self.larger_is_nearer = measure, origin, larger_is_nearer
        self.images = [_picture(image) for image in prototypes.images]
        self.small = [self._thumbnail(image, f"prototype {p}") for p, image in enumerate(self.images)]
        self.samples: list[Markup] = []
        self.spread: list[tuple[Markup, float]] = []
        if prototypes.samples is not None:
            for p, images in enumerate(prototypes.samples.transpose(0, 1)):
                drawn = [self._thumbnail(_picture(image), f"sample of prototype {p}") for image in images]
                self.samples.append(_row(drawn))
        if prototypes.spread is not None:
            for p, (image, spread) in enumerate(zip(self.images, prototypes.spread)):
                self.spread.append((draw_heat(image, spread, None, f"spread of prototype {p}"), float(spread.max())))

    @staticmethod
    def _thumbnail(image: Image.Image, alt: str) -> Markup:
        return draw_part(image, ((0, image.height), (0, image.width)), alt)

    def query(self, sample: _DecodedSample) -> Picture:
        """The image, its reconstruction, and all prototypes from near to far."""
        pictures, decoded = [draw_image(sample.image, None, sample.sample_id)], ""
        if sample.reconstruction is not None:
            pictures.append(draw_image(sample.reconstruction, None, "decoded"))
            decoded = ", and what the decoder makes of its code"
        tables = [self._table(item) for item in sample.explanations]
        caption = (
            f"Image {sample.sample_id} as the model's input{decoded}. Below, all prototypes from near to far, with the "
            f"classifier's weights."
        )
        return Picture(Markup("").join([_row(pictures), *tables]), caption, wide=True)

    def _table(self, explanation: Explanation) -> Markup:
        nearest = sorted(explanation.evidence, key=lambda item: item.similarity, reverse=self.larger_is_nearer)
        rows: dict[str, list[Any]] = {
            "": [self.small[item.prototype] for item in nearest],
            "prototype": [str(item.prototype) for item in nearest],
            "stands for": [escape(plain_text(item.classes[0])) for item in nearest],
            self.measure: [f"{item.similarity:.3f}" for item in nearest],
            f"weight for {plain_text(explanation.label)}": [f"{item.weight:+.3f}" for item in nearest],
        }
        body = Markup("").join(
            Markup('<tr><th scope="row" style="white-space:nowrap">{}</th>{}</tr>').format(
                name, Markup("").join(Markup('<td style="min-width:5rem">{}</td>').format(cell) for cell in cells)
            )
            for name, cells in rows.items()
        )
        return Markup("<table>{}</table>").format(body)

    def evidence(self, sample: _DecodedSample, explanation: Explanation, item: Evidence) -> list[Comparison]:
        """The image beside the prototype, and where the prototype is a distribution samples of it and their spread."""
        del explanation  # the pictures are the same for every class
        p = item.prototype
        query = Picture(draw_image(sample.image, None, sample.sample_id), "This image.")
        found = [
            Comparison(
                query, Picture(draw_image(self.images[p], None, f"prototype {p}"), f"Prototype {p}, {self.origin}.")
            )
        ]
        if self.samples and self.spread:
            heat, most = self.spread[p]
            samples = Picture(self.samples[p], f"Samples of prototype {p}, decoded.")
            caption = f"Spread of many such samples at every pixel: bright is uncertain, up to {most:.3f} of the range."
            found.append(Comparison(samples, Picture(heat, caption)))
        return found


def _row(pictures: Sequence[Markup]) -> Markup:
    return Markup('<div style="display:flex;flex-wrap:wrap;gap:.75rem">{}</div>').format(Markup("").join(pictures))
