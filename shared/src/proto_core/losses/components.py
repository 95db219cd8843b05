"""Margins of prototype networks: of probabilities, of templates, of certified robustness (arXiv 2412.15499), GLVQ."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets, check_option, readable
from proto_core.precision import full_precision
from proto_core.prototypes.components import cbc_margin_root
from proto_core.systems import Paper

__all__ = ["GLVQLoss", "ProbabilityMarginLoss", "RobustnessMarginLoss", "TemplateMarginLoss"]


class _MarginLoss(nn.Module):
    """What the losses of this file share: a reduction."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = check_option("reduction", reduction, "mean", "sum", "none")

    def _reduced(self, losses: Tensor) -> Tensor:
        return losses if self.reduction == "none" else losses.sum() if self.reduction == "sum" else losses.mean()


class ProbabilityMarginLoss(_MarginLoss):
    """``max(0, largest other probability - own probability + margin)``.

    Args:
        margin: wanted difference.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an unknown reduction; shapes or types that do not fit, fewer than two classes, a target outside
            0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.losses import ProbabilityMarginLoss
        >>> ProbabilityMarginLoss(0.3)(torch.tensor([[0.5, 0.25]]), torch.tensor([0])).round(decimals=4)
        tensor(0.0500)
    """

    def __init__(self, margin: float = 0.025, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.margin = margin

    def extra_repr(self) -> str:
        """Settings."""
        return f"margin={self.margin}, reduction={self.reduction!r}"

    def forward(self, probabilities: Float[Tensor, "N C"], targets: Int[Tensor, "N"]) -> Float[Tensor, "..."]:
        """Loss of a batch."""
        check_class_targets(probabilities, targets, "probabilities")
        if probabilities.shape[1] < 2:
            raise ValueError(f"probabilities: found {probabilities.shape[1]} class, needed at least 2")
        p, column = full_precision(probabilities), targets.long().unsqueeze(1)
        other = p.scatter(1, column, -torch.inf).amax(dim=1)
        return self._reduced((other - p.gather(1, column).squeeze(1) + self.margin).relu())


class RobustnessMarginLoss(_MarginLoss):
    """``max(0, margin - sigma_min ln t)`` with t the :func:`~proto_core.prototypes.cbc_margin_root`.

    ``sigma_min ln t`` is the certified radius of the ``"norm"`` kernel (a monotone stand-in for ``"gaussian"``), with a
    negative sign where the decision is wrong.

    Args:
        margin: wanted radius.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: as the root; a sigma that is not positive or does not fit.

    Example:
        >>> import torch
        >>> from proto_core.losses import RobustnessMarginLoss
        >>> reasoning = torch.stack([torch.eye(2), torch.zeros(2, 2)])
        >>> detections, target = torch.tensor([[0.8, 0.2]]), torch.tensor([0])
        >>> RobustnessMarginLoss(1.0)(detections, reasoning, torch.ones(2), target).round(decimals=4)
        tensor(0.3069)
    """

    paper: ClassVar[Paper] = Paper(
        title="A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations",
        year=2024,
        arxiv="2412.15499",
        code="si-cim/cbc-aaai-2025@6d63a7c",
        evidence="code",
        summary="classes by components that must or must not be there, with a certified radius",
        claim="training on the certified margin raises certified accuracy without loss of accuracy",
    )

    def __init__(self, margin: float = 0.3, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.margin = margin

    def extra_repr(self) -> str:
        """Settings."""
        return f"margin={self.margin}, reduction={self.reduction!r}"

    def forward(
        self,
        detections: Float[Tensor, "N K"],
        reasoning: Float[Tensor, "2 K C"],
        sigma: Float[Tensor, "K"],
        targets: Int[Tensor, "N"],
    ) -> Float[Tensor, "..."]:
        """Loss of a batch."""
        root = cbc_margin_root(detections, reasoning, targets)
        if tuple(sigma.shape) != tuple(detections.shape[1:]):
            raise ValueError(f"sigma: found shape {tuple(sigma.shape)}, needed ({detections.shape[1]},)")
        if readable(sigma) and not bool((sigma > 0).all()):
            raise ValueError(f"sigma: found {float(sigma.min())}, needed positive widths")
        smallest = full_precision(sigma).to(root).amin()
        return self._reduced((self.margin - smallest * root.log()).relu())


class TemplateMarginLoss(_MarginLoss):
    """Margin between the best template of the own class and the best of the others.

    Similarity: ``max(0, best other - best own + margin)``, for similarities in [0, 1]: a negative one counts as 0.
    Distance: ``max(0, nearest own - nearest other + margin)``.

    Args:
        margin: wanted difference.
        similarity: whether comparisons are similarities.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an unknown reduction; shapes or types that do not fit, a target without a template of its own or of
            another class.

    Example:
        >>> import torch
        >>> from proto_core.losses import TemplateMarginLoss
        >>> loss = TemplateMarginLoss(0.5)
        >>> loss(torch.tensor([[0.75, 0.5]]), torch.tensor([0, 1]), torch.tensor([0]))
        tensor(0.2500)
    """

    def __init__(self, margin: float = 0.3, similarity: bool = True, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.margin = margin
        self.similarity = similarity

    def extra_repr(self) -> str:
        """Settings."""
        return f"margin={self.margin}, similarity={self.similarity}, reduction={self.reduction!r}"

    def forward(
        self, comparisons: Float[Tensor, "N P"], template_labels: Int[Tensor, "P"], targets: Int[Tensor, "N"]
    ) -> Float[Tensor, "..."]:
        """Loss of a batch."""
        own = _own_templates(comparisons, template_labels, targets)
        values = full_precision(comparisons)
        if self.similarity:
            best, other = (torch.where(mask, values, 0).amax(dim=1).relu() for mask in (own, ~own))
            return self._reduced((other - best + self.margin).relu())
        near, far = (torch.where(mask, values, torch.inf).amin(dim=1) for mask in (own, ~own))
        return self._reduced((near - far + self.margin).relu())


class GLVQLoss(_MarginLoss):
    """``(d+ - d-) / (d+ + d-)``: d+ the nearest template of the own class, d- the nearest other; in [-1, 1].

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an unknown reduction; shapes or types that do not fit, a target without a template of its own or of
            another class.

    Example:
        >>> import torch
        >>> from proto_core.losses import GLVQLoss
        >>> GLVQLoss()(torch.tensor([[1.0, 3.0]]), torch.tensor([0, 1]), torch.tensor([0]))
        tensor(-0.5000)
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def extra_repr(self) -> str:
        """Settings."""
        return f"reduction={self.reduction!r}"

    def forward(
        self, distances: Float[Tensor, "N P"], template_labels: Int[Tensor, "P"], targets: Int[Tensor, "N"]
    ) -> Float[Tensor, "..."]:
        """Loss of a batch; 0 with a zero gradient where both distances are 0."""
        own = _own_templates(distances, template_labels, targets)
        values = full_precision(distances)
        near, far = (torch.where(mask, values, torch.inf).amin(dim=1) for mask in (own, ~own))
        total = near + far
        apart = total > 0
        ratio = torch.where(apart, near - far, 0) / torch.where(apart, total, 1)
        return self._reduced(ratio)


def _own_templates(comparisons: Tensor, template_labels: Tensor, targets: Tensor) -> Tensor:
    """Which templates are of a sample's class, checked."""
    if comparisons.ndim != 2 or targets.shape != comparisons.shape[:1] or len(targets) == 0:
        shapes = f"{tuple(comparisons.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"comparisons, targets: found shapes {shapes}, needed [N, P] and [N] with N at least 1")
    if template_labels.shape != comparisons.shape[1:]:
        raise ValueError(f"template_labels: found {tuple(template_labels.shape)}, needed ({comparisons.shape[1]},)")
    own = targets.unsqueeze(1) == template_labels
    if readable(own):
        for mask, whose in ((own, "its own class"), (~own, "another class")):
            if not bool(mask.any(dim=1).all()):
                target = int(targets[int((~mask.any(dim=1)).nonzero()[0])])
                raise ValueError(f"template_labels: found no template of {whose} for target {target}, needed one")
    return own
