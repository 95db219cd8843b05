"""Shallow prototype-based network: RBF detections of trained components, and reasoning over them.

Source: arXiv 2412.15499 (the authors released the deep networks alone; start values and optimiser are ours).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets, check_option, check_positive
from proto_core.prototypes import ClassificationByComponents, rbf_detection, robustness_certificate

__all__ = ["ShallowPBN"]


class ShallowPBN(nn.Module):
    """``p = head(exp(-|x - w_k| / sigma_k))`` of components w in the space of the input.

    Widths start at ``sqrt(D)`` (``"norm"``) or D (``"gaussian"``), which suits standardised data; components are drawn
    from N(0, 1) until :meth:`initialise` makes them samples.

    Args:
        dim: D.
        num_components: K.
        num_classes: C, at least 2.
        kernel: ``"norm"`` or ``"gaussian"`` (the exponent squared).
        variant: ``"slim"`` or ``"original"``, see :class:`~proto_core.prototypes.ClassificationByComponents`.

    Attributes:
        components: Parameter ``[K, D]``.
        log_sigma: Parameter ``[K]``; sigma is its exponential, so that it stays positive.
        head: :class:`~proto_core.prototypes.ClassificationByComponents`.

    Shapes:
        ``[N, D]`` -> probabilities ``[N, C]``, detections ``[N, K]``, distances ``[N, K]``.

    Raises:
        ValueError: a size below 1, fewer than two classes, an unknown kernel or variant; inputs of another width.

    Source:
        arXiv 2412.15499; the certificate by the triangle inequality.

    Example:
        >>> import torch
        >>> from proto_vision.robust_pbn import ShallowPBN
        >>> net = ShallowPBN(dim=4, num_components=6, num_classes=3)
        >>> probabilities, detections, distances = net(torch.randn(5, 4))
        >>> probabilities.shape, detections.shape, net.certify(torch.randn(5, 4), torch.arange(5) % 3).shape
        (torch.Size([5, 3]), torch.Size([5, 6]), torch.Size([5]))
    """

    def __init__(
        self, dim: int, num_components: int, num_classes: int, kernel: str = "norm", variant: str = "slim"
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.kernel = check_option("kernel", kernel, "norm", "gaussian")
        self.head = ClassificationByComponents(num_components, num_classes, variant)
        self.components = nn.Parameter(torch.empty(num_components, dim))
        self.log_sigma = nn.Parameter(torch.empty(num_components))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Components from N(0, 1), the widths' start, reasoning drawn anew."""
        dim = self.components.shape[1]
        nn.init.normal_(self.components)
        nn.init.constant_(self.log_sigma, math.log(dim) * (0.5 if self.kernel == "norm" else 1))
        self.head.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes and the kernel."""
        return f"dim={self.components.shape[1]}, kernel={self.kernel!r}"

    @property
    def sigma(self) -> Float[Tensor, " K"]:
        """Widths."""
        return self.log_sigma.exp()

    def forward(
        self, x: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Probabilities, detections and Euclidean distances."""
        detections, distances = rbf_detection(x, self.components, self.sigma, self.kernel)
        return self.head(detections), detections, distances

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "N D"], y: Int[Tensor, "N"]) -> ShallowPBN:
        """Make component k a random sample of class ``k % C``; none twice while its class has enough.

        Args:
            x: samples.
            y: classes.

        Raises:
            ValueError: shapes that do not fit, a class outside 0..C-1, a class without a sample that a component needs.
        """
        count, dim = self.components.shape
        classes = self.head.num_classes
        check_class_targets(x, y, "x", classes=classes)
        if x.shape[1] != dim:
            raise ValueError(f"x: found {x.shape[1]} features, needed {dim}")
        picked = torch.empty(count, dtype=torch.long, device=y.device)
        for c in range(min(classes, count)):
            rows, needed = (y == c).nonzero().flatten(), len(range(c, count, classes))
            if not len(rows):
                raise ValueError(f"y: found no sample of class {c}, needed one at least for its {needed} components")
            rounds = [rows[torch.randperm(len(rows)).to(rows.device)] for _ in range(-(-needed // len(rows)))]
            picked[c::classes] = torch.cat(rounds)[:needed]
        self.components.copy_(x[picked.to(x.device)])
        return self

    def certify(self, x: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Euclidean radius within which no perturbation changes the decision for the target; 0 where it is wrong.

        Raises:
            ValueError: the variant is ``"original"``, whose decision has no certificate; as
                :func:`~proto_core.prototypes.robustness_certificate`.
        """
        if self.head.variant != "slim":
            raise ValueError(f"variant: found {self.head.variant!r}, needed 'slim' for a certificate")
        _, detections, distances = self(x)
        return robustness_certificate(detections, distances, self.head.reasoning, self.sigma, targets, self.kernel)
