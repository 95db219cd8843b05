"""What an explanation is: a prediction, and the evidence whose contributions add up to its logit.

Domains only draw these records: an ECG window, an image patch, a graph node or a token is a ``location``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Case", "Evidence", "Explanation"]


@dataclass(frozen=True, slots=True)
class Case:
    """A real training sample that a prototype was projected onto.

    Attributes:
        sample_id: the sample's name in its data set, such as ``"records100/00000/00001_lr"``.
        index: position in the training set at projection time.
        location: where in the sample: ``(start, length)`` pairs per axis in the sample's own units (for an ECG, raw
            samples; for an image, pixel rows then columns); ``None`` means the whole sample.
        labels: names of the labels that the sample carries.
    """

    sample_id: str
    index: int
    location: tuple[tuple[int, int], ...] | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one prototype says about one prediction.

    Attributes:
        prototype: index of the prototype in the classifier's input.
        group: the part of the model it belongs to (an ECG branch, a head), for people to read.
        classes: names of the classes that the prototype stands for.
        similarity: similarity of the query to the prototype, as the classifier saw it.
        weight: the classifier's weight from this prototype to the explained class.
        location: where in the query the prototype matched best, same form as :attr:`Case.location`.
        case: the training sample behind the prototype, or ``None`` if it was never projected.
    """

    prototype: int
    group: str
    classes: tuple[str, ...]
    similarity: float
    weight: float
    location: tuple[tuple[int, int], ...] | None = None
    case: Case | None = None

    @property
    def contribution(self) -> float:
        """``similarity * weight``: what the prototype adds to the logit."""
        return self.similarity * self.weight


@dataclass(frozen=True, slots=True)
class Explanation:
    """One predicted class of one sample.

    Attributes:
        sample_id: the explained sample.
        label: name of the explained class.
        logit: the model's output for it.
        probability: in [0, 1].
        threshold: decision threshold, in [0, 1].
        bias: the classifier's bias for the class (0 if it has none).
        evidence: one record per prototype, all of them, by falling contribution.
        tolerance: how far the sum may be from the logit, relative to the sum of absolute contributions.

    Raises:
        ValueError: bias and contributions do not add up to the logit.
    """

    sample_id: str
    label: str
    logit: float
    probability: float
    threshold: float
    bias: float
    evidence: tuple[Evidence, ...] = field(repr=False)
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        scale = 1.0 + abs(self.bias) + sum(abs(item.contribution) for item in self.evidence)
        if not math.isclose(self.total, self.logit, rel_tol=0.0, abs_tol=self.tolerance * scale):
            raise ValueError(
                f"explanation of {self.label!r} for {self.sample_id!r} does not add up: bias and contributions give "
                f"{self.total:.6g}, the logit is {self.logit:.6g}"
            )

    @property
    def total(self) -> float:
        """Bias plus all contributions; equals the logit."""
        return math.fsum([self.bias, *(item.contribution for item in self.evidence)])

    @property
    def predicted(self) -> bool:
        """Whether the probability reaches the threshold."""
        return self.probability >= self.threshold

    def strongest_for(self, k: int = 5) -> tuple[Evidence, ...]:
        """The ``k`` prototypes that add most to the logit (only positive contributions)."""
        return tuple(item for item in self.evidence[:k] if item.contribution > 0)

    def strongest_against(self, k: int = 5) -> tuple[Evidence, ...]:
        """The ``k`` prototypes that take most from the logit, strongest first (only negative contributions)."""
        return tuple(item for item in self.evidence[::-1][:k] if item.contribution < 0)
