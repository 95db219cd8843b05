"""Explanations of ProtoECGNet: which training ECGs speak for a label, where, and by how much.

Source: ProtoECGNet (arXiv 2504.08713): a label's logit is the sum over prototypes of similarity times weight, plus the
bias. Window positions are mapped to samples by ``start = int(i * L / T)``, ``length = int(W * L / T)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from proto_core.explain import Case, Evidence, Explanation
from proto_core.prototypes import WindowPrototypes, window_similarity
from proto_ecg.protoecgnet.backbones import feature_length

if TYPE_CHECKING:
    from proto_ecg.protoecgnet.system import ProtoECGNet

__all__ = ["ExplainsECG"]

Location = tuple[tuple[int, int], ...] | None


class ExplainsECG:
    """Explaining records; mixed into :class:`ProtoECGNet`."""

    def prototype_names(self) -> list[str]:
        """A readable name of each prototype: branch, its classes, running number."""
        net = cast("ProtoECGNet", self)
        names = []
        for branch in net.branch_names:
            for row, classes in enumerate(self._prototype_classes(branch)):
                names.append(f"{branch}/{'+'.join(classes)}/{row}")
        return names

    def _prototype_classes(self, branch: str) -> list[tuple[str, ...]]:
        net = cast("ProtoECGNet", self)
        labels = net.branch_labels[branch]
        rows = net.branch(branch).class_identity.tolist()
        return [tuple(labels[c] for c, flag in enumerate(row) if flag) for row in rows]

    def _location(self, branch: str, position: int, length: int) -> Location:
        """Window in samples of a record of ``length`` samples; ``None`` where the prototype sees the whole record."""
        layer = cast("ProtoECGNet", self).branch(branch).layer
        steps = feature_length(length)
        if not isinstance(layer, WindowPrototypes) or layer.window >= steps or position < 0:
            return None
        return ((int(position * length / steps), int(layer.window * length / steps)),)

    def case_window(self, branch: str, prototype: int) -> tuple[int, int] | None:
        """Start and length, in samples, of a prototype's window in its case; ``None`` for whole records and no case."""
        net = cast("ProtoECGNet", self)
        place = self._location(branch, int(net.branch(branch).layer.case_position[prototype]), net.num_samples)
        return None if place is None else place[0]

    @torch.no_grad()
    def explain(
        self,
        signals: Float[Tensor, "N leads L"],
        sample_ids: Sequence[str],
        labels: Sequence[str] | None = None,
    ) -> list[tuple[Explanation, ...]]:
        """Explain records.

        Args:
            signals: preprocessed as in training, in millivolts.
            sample_ids: one name per record.
            labels: names of the labels to explain; by default those predicted at the stored thresholds, or the most
                probable one where none is.

        Returns:
            For each record its explanations by falling probability. Every prototype is in each explanation;
            contributions and bias add up to the logit.

        Raises:
            ValueError: unknown label, or another number of names than records.
        """
        net = cast("ProtoECGNet", self)
        if len(sample_ids) != len(signals):
            raise ValueError(f"sample_ids: found {len(sample_ids)} names for {len(signals)} records")
        unknown = [name for name in labels or () if name not in net.label_names]
        if unknown:
            raise ValueError(f"labels: the model does not know {unknown}")
        training = net.training
        net.eval()
        try:
            x = signals.to(net.device).unsqueeze(1)
            similarities, places = [], []
            for name in net.branch_names:
                branch = net.branch(name)
                features = branch.features(net._input(name, x))
                similarities.append(branch.layer(features))
                layer = branch.layer
                if isinstance(layer, WindowPrototypes):
                    places.append(window_similarity(features, layer.prototypes).argmax(-1))
                else:
                    places.append(torch.zeros_like(similarities[-1], dtype=torch.long))
            weight = net.classifier.weight.double().cpu()
            bias = net.classifier.bias.double().cpu()
            found = torch.cat(similarities, 1)
            logits = net.classifier(found.to(net.classifier.weight.dtype)).double().cpu()
        finally:
            net.train(training)
        found, where = found.double().cpu(), torch.cat(places, 1).cpu()
        probabilities = logits.sigmoid()
        results = []
        known = self._cases()
        for n, sample_id in enumerate(sample_ids):
            chosen = self._chosen(probabilities[n], labels)
            spots = where[n].tolist()
            own = [self._location(known[p][0], spot, signals.shape[-1]) for p, spot in enumerate(spots)]
            results.append(
                tuple(
                    Explanation(
                        sample_id=sample_id,
                        label=net.label_names[c],
                        logit=float(logits[n, c]),
                        probability=float(probabilities[n, c]),
                        threshold=float(net.thresholds[c]),
                        bias=float(bias[c]),
                        evidence=self._evidence(known, found[n], own, weight[c]),
                    )
                    for c in chosen
                )
            )
        return results

    def _chosen(self, probabilities: Tensor, labels: Sequence[str] | None) -> list[int]:
        net = cast("ProtoECGNet", self)
        if labels is not None:
            chosen = [net.label_names.index(name) for name in labels]
        else:
            chosen = (probabilities >= net.thresholds.cpu()).nonzero().flatten().tolist()
            chosen = chosen or [int(probabilities.argmax())]
        return sorted(chosen, key=lambda c: -float(probabilities[c]))

    def _cases(self) -> list[tuple[str, tuple[str, ...], Case | None]]:
        """Branch, classes and case of every prototype."""
        net = cast("ProtoECGNet", self)
        known: list[tuple[str, tuple[str, ...], Case | None]] = []
        for name in net.branch_names:
            layer = net.branch(name).layer
            index, position = layer.case_index.tolist(), layer.case_position.tolist()
            for row, classes in enumerate(self._prototype_classes(name)):
                case = None
                if layer.case_ids[row]:
                    place = self._location(name, position[row], net.num_samples)
                    case = Case(layer.case_ids[row], index[row], place, tuple(layer.case_labels[row]))
                known.append((name, classes, case))
        return known

    def _evidence(
        self,
        known: Sequence[tuple[str, tuple[str, ...], Case | None]],
        similarity: Tensor,
        places: Sequence[Location],
        weight: Tensor,
    ) -> tuple[Evidence, ...]:
        order = (-similarity * weight).argsort(stable=True).tolist()
        values, weights = similarity.tolist(), weight.tolist()
        return tuple(
            Evidence(p, known[p][0], known[p][1], values[p], weights[p], places[p], known[p][2]) for p in order
        )
