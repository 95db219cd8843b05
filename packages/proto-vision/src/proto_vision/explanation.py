"""Explanations of part-prototype networks: which parts of which training images made the logit.

Any network explains itself that names, per set of prototypes, their layer, what the head saw, the maps, and the head's
weights. Places are marked as the pixels of the input that a cell of the map stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.explain import Case, Evidence, Explanation
from proto_core.modes import evaluation_mode
from proto_core.prototypes import PrototypeLayer
from proto_vision.data.module import ImageDataModule
from proto_vision.report import ImageSample, image_report

__all__ = ["ExplainsImages", "ExplainsParts", "PartEvidence", "class_explanations", "pixels_of", "prototype_records"]

Location = tuple[tuple[int, int], tuple[int, int]]


class PartEvidence(NamedTuple):
    """One set of prototypes in a batch.

    Attributes:
        group: name of the set.
        layer: the prototypes, with their cases.
        similarities: ``[N, P]`` what the head saw.
        maps: ``[N, P, h, w]`` similarities at every place.
        weight: ``[C, P]`` the head's weights.
        bias: ``[C]`` what the logits have beside the sums, or ``None``.
        stands_for: ``[P, C]`` classes of each prototype, where not the layer but the head says so.
    """

    group: str
    layer: PrototypeLayer
    similarities: Tensor
    maps: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stands_for: Tensor | None = None


def pixels_of(row: int, column: int, map_size: tuple[int, int], image_size: int, patch: int = 1) -> Location:
    """The pixels that a place of a map stands for, as ``(start, length)`` of rows and of columns.

    Args:
        row: of the map.
        column: of the map.
        map_size: height and width of the map.
        image_size: height and width of the input.
        patch: height and width of the prototype, in places.

    Example:
        >>> from proto_vision.explanation import pixels_of
        >>> pixels_of(1, 0, (4, 4), 32)
        ((8, 8), (0, 8))
    """
    spans = []
    for place, size in ((row, map_size[0]), (column, map_size[1])):
        cells = size + patch - 1
        start, end = place * image_size // cells, -(-(place + patch) * image_size // cells)
        spans.append((start, end - start))
    return spans[0], spans[1]


@runtime_checkable
class ExplainsImages(Protocol):
    """A network that writes the report of some images."""

    def explain_images(
        self,
        data: ImageDataModule,
        images: Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        top: int = 3,
        source: str = "",
    ) -> str:
        """The report of some images as HTML.

        Args:
            data: the data set that the network was trained on.
            images: files, or ids of the data set.
            labels: classes to explain; by default the predicted one.
            top: prototypes shown for and against.
            source: name of the checkpoint, for the report's head.
        """


class ExplainsParts:
    """``explain`` and ``explain_images``, mixed into a network that offers ``part_evidence``."""

    def part_evidence(self, images: Float[Tensor, "N channels S S"]) -> tuple[Float[Tensor, "N C"], list[PartEvidence]]:
        """Logits, and for each set of prototypes what they are sums of."""
        raise TypeError(f"{type(self).__name__} does not say what its logits are sums of")

    @torch.no_grad()
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
            For each image its explanations by falling probability. Every prototype is in each explanation; the
            contributions add up to the logit. The threshold is the highest probability of another class.

        Raises:
            ValueError: unknown class, or another number of names than images.
        """
        logits, sets = self.evaluated(images)
        known = [self._cases(part) for part in sets]

        def evidence(n: int, c: int) -> tuple[Evidence, ...]:
            return _weighted(self._evidence(n, sets, known), sets, c)

        names = cast(Any, self).class_names
        bias = [part.bias for part in sets if part.bias is not None]
        return class_explanations(
            names,
            sample_ids,
            labels,
            logits,
            self.stated_probabilities(logits),
            evidence,
            torch.stack(bias).sum(0) if bias else None,
        )

    def stated_probabilities(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """The probabilities that the page states."""
        return logits.cpu().double().softmax(1)

    def explain_images(
        self,
        data: ImageDataModule,
        images: Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        top: int = 3,
        source: str = "",
    ) -> str:
        """See :class:`ExplainsImages`."""
        net = cast(Any, self)
        places = [data.find_image(name) for name in images]
        inputs = torch.stack([data.model_input(place) for place in places])
        explained = net.explain(inputs, list(images), labels)
        samples = []
        for n, (name, place, explanations) in enumerate(zip(images, places, explained, strict=True)):
            shown = {
                item.prototype for e in explanations for item in (*e.strongest_for(top), *e.strongest_against(top))
            }
            maps = self.similarity_maps(inputs[n : n + 1])[0]
            row = data.find_row(place) if isinstance(place, str) else None
            samples.append(
                ImageSample(
                    sample_id=name,
                    image=data.view(place),
                    heat={prototype: maps[prototype].cpu() for prototype in shown},
                    explanations=explanations,
                    targets=None if row is None else tuple(data.describe(row)[1]),
                    requested=labels is not None,
                )
            )
        info = {
            "model": f"{net.paper.title} ({net.system})",
            "classes": str(net.num_classes),
            "prototypes": str(sum(layer.num_prototypes for layer in net.prototype_layers().values())),
            "checkpoint": source,
        }
        return image_report(samples, title="Why the model says so", model_info=info, read_case=data.view, top=top)

    @torch.no_grad()
    def similarity_maps(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N P h w"]:
        """Similarities of images to all prototypes at every place, sets one after the other as in explanations."""
        return torch.cat([part.maps for part in self.evaluated(images)[1]], 1)

    @torch.no_grad()
    def evaluated(self, images: Float[Tensor, "N channels S S"]) -> tuple[Float[Tensor, "N C"], list[PartEvidence]]:
        """:meth:`part_evidence` in evaluation mode, on the network's device; modes are as before afterwards."""
        net = cast(nn.Module, self)
        with evaluation_mode(net):
            return self.part_evidence(images.to(cast(Any, self).device))

    def _cases(self, part: PartEvidence) -> list[tuple[tuple[str, ...], Case | None]]:
        """Classes and case of every prototype of a set."""
        net, layer = cast(Any, self), part.layer
        size, patch = (part.maps.shape[-2], part.maps.shape[-1]), layer.prototypes.shape[-1]
        identity = (layer.class_identity if part.stands_for is None else part.stands_for).bool().tolist()
        index, position = layer.case_index.tolist(), layer.case_position.tolist()
        found: list[tuple[tuple[str, ...], Case | None]] = []
        for p, row in enumerate(identity):
            classes = tuple(name for name, flag in zip(net.class_names, row) if flag)
            case = None
            if layer.case_ids[p]:
                place = pixels_of(position[p] // size[1], position[p] % size[1], size, net.image_size, patch)
                case = Case(layer.case_ids[p], index[p], place, tuple(layer.case_labels[p]))
            found.append((classes, case))
        return found

    def _evidence(
        self, n: int, sets: Sequence[PartEvidence], known: Sequence[list[tuple[tuple[str, ...], Case | None]]]
    ) -> list[Evidence]:
        """All prototypes of all sets for one image, without weights."""
        found: list[Evidence] = []
        for part, cases in zip(sets, known):
            size, patch = (part.maps.shape[-2], part.maps.shape[-1]), part.layer.prototypes.shape[-1]
            places = part.maps[n].flatten(1).argmax(1).tolist()
            values = part.similarities[n].double().tolist()
            for p, (classes, case) in enumerate(cases):
                spot = pixels_of(places[p] // size[1], places[p] % size[1], size, cast(Any, self).image_size, patch)
                found.append(Evidence(len(found), part.group, classes, values[p], 0.0, spot, case))
        return found


def _weighted(evidence: Sequence[Evidence], sets: Sequence[PartEvidence], c: int) -> tuple[Evidence, ...]:
    """The evidence with the weights towards a class, by falling contribution."""
    weights = torch.cat([part.weight[c] for part in sets]).double().tolist()
    full = [
        Evidence(e.prototype, e.group, e.classes, e.similarity, w, e.location, e.case)
        for e, w in zip(evidence, weights)
    ]
    return tuple(sorted(full, key=lambda item: -item.contribution))


def class_explanations(
    class_names: Sequence[str],
    sample_ids: Sequence[str],
    labels: Sequence[str] | None,
    logits: Float[Tensor, "N C"],
    probabilities: Float[Tensor, "N C"],
    evidence: Callable[[int, int], tuple[Evidence, ...]],
    bias: Float[Tensor, " C"] | None = None,
) -> list[tuple[Explanation, ...]]:
    """The explanations of some images, for the classes asked for or the most probable one.

    Args:
        class_names: C names.
        sample_ids: one name per image.
        labels: classes to explain; by default the predicted one.
        logits: of the images.
        probabilities: of the images.
        evidence: row, class -> all evidence, by falling contribution.
        bias: what the logits have beside the evidence.

    Returns:
        For each image its explanations by falling probability; the threshold is the highest probability of another
        class.

    Raises:
        ValueError: unknown class, or another number of names than images.
    """
    if len(sample_ids) != len(logits):
        raise ValueError(f"sample_ids: found {len(sample_ids)} names for {len(logits)} images")
    names = list(class_names)
    unknown = [name for name in labels or () if name not in names]
    if unknown:
        raise ValueError(f"labels: the model does not know {unknown}")
    logits, probabilities = logits.cpu().double(), probabilities.cpu().double()
    constants = [0.0] * len(names) if bias is None else bias.cpu().double().tolist()
    results = []
    for n, sample_id in enumerate(sample_ids):
        chosen = [names.index(name) for name in labels or ()] or [int(probabilities[n].argmax())]
        chosen.sort(key=lambda c, n=n: -float(probabilities[n, c]))  # type: ignore[misc]
        results.append(
            tuple(
                Explanation(
                    sample_id=sample_id,
                    label=names[c],
                    logit=float(logits[n, c]),
                    probability=float(probabilities[n, c]),
                    threshold=_best_other(probabilities[n], c),
                    bias=constants[c],
                    evidence=evidence(n, c),
                )
                for c in chosen
            )
        )
    return results


def prototype_records(network: Any, data: ImageDataModule) -> list[Evidence]:
    """What is known of each prototype, set after set: its set, its classes, its case.

    Similarity, weight and place in these records are those of a training image, and mean nothing here.
    """
    name = data.record_ids[int(data.rows("train")[0])]
    found = network.explain(data.model_input(name)[None], [name])[0][0].evidence
    return sorted(found, key=lambda item: item.prototype)


def _best_other(probabilities: Tensor, c: int) -> float:
    others = torch.cat([probabilities[:c], probabilities[c + 1 :]])
    return float(others.max()) if len(others) else 0.0
