"""Explanations of part-prototype networks: which parts of which training images made the logit.

Any network explains itself that names, per set of prototypes, their layer, what the head saw, the maps, and the head's
weights. Places are marked as the pixels of the input that a cell of the map stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.explain import Case, Evidence, Explanation
from proto_core.prototypes import PartPrototypes

__all__ = ["ExplainsParts", "PartEvidence", "pixels_of"]

Location = tuple[tuple[int, int], tuple[int, int]]


class PartEvidence(NamedTuple):
    """One set of prototypes in a batch.

    Attributes:
        group: name of the set.
        layer: the prototypes, with their cases.
        similarities: ``[N, P]`` what the head saw.
        maps: ``[N, P, h, w]`` similarities at every place.
        weight: ``[C, P]`` the head's weights.
    """

    group: str
    layer: PartPrototypes
    similarities: Tensor
    maps: Tensor
    weight: Tensor


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


class ExplainsParts:
    """``explain``, mixed into a network that offers ``part_evidence``."""

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
        net = cast(Any, self)
        if len(sample_ids) != len(images):
            raise ValueError(f"sample_ids: found {len(sample_ids)} names for {len(images)} images")
        unknown = [name for name in labels or () if name not in net.class_names]
        if unknown:
            raise ValueError(f"labels: the model does not know {unknown}")
        logits, sets = self._evaluated(images)
        logits = logits.double().cpu()
        probabilities = logits.softmax(1)
        known = [self._cases(part) for part in sets]
        results = []
        for n, sample_id in enumerate(sample_ids):
            chosen = [net.class_names.index(name) for name in labels or ()] or [int(logits[n].argmax())]
            chosen.sort(key=lambda c, n=n: -float(probabilities[n, c]))  # type: ignore[misc]
            evidence = self._evidence(n, sets, known)
            results.append(
                tuple(
                    Explanation(
                        sample_id=sample_id,
                        label=net.class_names[c],
                        logit=float(logits[n, c]),
                        probability=float(probabilities[n, c]),
                        threshold=_best_other(probabilities[n], c),
                        bias=0.0,
                        evidence=_weighted(evidence, sets, c),
                    )
                    for c in chosen
                )
            )
        return results

    @torch.no_grad()
    def similarity_maps(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N P h w"]:
        """Similarities of images to all prototypes at every place, sets one after the other as in explanations."""
        return torch.cat([part.maps for part in self._evaluated(images)[1]], 1)

    def _evaluated(self, images: Tensor) -> tuple[Tensor, list[PartEvidence]]:
        """Evidence in evaluation mode; modes are as before afterwards."""
        net = cast(nn.Module, self)
        modes = [(child, child.training) for child in net.modules()]
        net.eval()
        try:
            return self.part_evidence(images.to(cast(Any, self).device))
        finally:
            for child, mode in modes:
                child.training = mode

    def _cases(self, part: PartEvidence) -> list[tuple[tuple[str, ...], Case | None]]:
        """Classes and case of every prototype of a set."""
        net, layer = cast(Any, self), part.layer
        size, patch = (part.maps.shape[-2], part.maps.shape[-1]), layer.prototypes.shape[-1]
        identity = layer.class_identity.bool().tolist()
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


def _best_other(probabilities: Tensor, c: int) -> float:
    others = torch.cat([probabilities[:c], probabilities[c + 1 :]])
    return float(others.max()) if len(others) else 0.0
