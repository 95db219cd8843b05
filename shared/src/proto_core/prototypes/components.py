"""Classification by components: which parts must be there, and which must not (arXiv 2412.15499; CBC 2019).

A component is detected or not; for each class a distribution over positive and negative reasoning says how its presence
or absence speaks. With RBF detections the class probabilities have a certified radius: no perturbation shorter than it
changes the decision. Probability model as in the authors' code; root and certificate are derived from the triangle
inequality, ``d / t <= d(x + e) <= d t`` with ``t = exp(|e| / sigma_min)``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import check_class_targets, check_option, check_positive, readable
from proto_core.precision import full_precision, no_autocast

__all__ = ["ClassificationByComponents", "cbc_margin_root", "rbf_detection", "robustness_certificate"]


class ClassificationByComponents(nn.Module):
    """Class probabilities from detections, by learned reasoning.

    ``slim``: for each class one softmax over all 2K entries of its column gives positive reasoning r+ and negative r-:
    ``p_c = sum_k [r+ d_k + r- (1 - d_k)]``. ``original``: with a, b the clamped parameters, ``r+ = a``,
    ``r- = (1 - a) b``, the rest is indefinite; ``p_c = sum_k [r+ d_k + r- (1 - d_k)] / (sum_k [r+ + r-] + eps)``.
    Probabilities of different classes need not add up to 1.

    Args:
        num_components: K.
        num_classes: C, at least 2.
        variant: ``"slim"`` or ``"original"``.
        eps: of the original's denominator.

    Attributes:
        reasoning_logits: Parameter ``[2K, C]`` (slim), from ``0.6 - 0.2 N(0, 1)``.
        reasonings: Parameter ``[K, C, 2]`` (original), from U[0, 1).

    Raises:
        ValueError: fewer than two classes or one component, an unknown variant, eps not positive; detections that do
            not fit, or outside [0, 1] (looked at on the CPU only).

    Shapes:
        detections ``[N, K]`` -> probabilities ``[N, C]``.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import ClassificationByComponents
        >>> head = ClassificationByComponents(num_components=4, num_classes=3)
        >>> head(torch.rand(5, 4)).shape, head.reasoning.shape
        (torch.Size([5, 3]), torch.Size([2, 4, 3]))
    """

    def __init__(self, num_components: int, num_classes: int, variant: str = "slim", eps: float = 1e-8) -> None:
        super().__init__()
        check_positive(num_components=num_components, eps=eps)
        if num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, needed at least 2")
        self.num_components = num_components
        self.num_classes = num_classes
        self.variant = check_option("variant", variant, "slim", "original")
        self.eps = eps
        if variant == "slim":
            self.reasoning_logits = nn.Parameter(torch.empty(2 * num_components, num_classes))
        else:
            self.reasonings = nn.Parameter(torch.empty(num_components, num_classes, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the reasoning anew."""
        with torch.no_grad():
            if self.variant == "slim":
                self.reasoning_logits.copy_(0.6 - 0.2 * torch.randn_like(self.reasoning_logits))
            else:
                self.reasonings.uniform_()

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return f"{self.num_components}, {self.num_classes}, variant={self.variant!r}"

    @property
    def reasoning(self) -> Float[Tensor, "kinds K C"]:
        """``[2, K, C]`` positive and negative (slim), or ``[3, K, C]`` positive, indefinite and negative."""
        if self.variant == "slim":
            share = full_precision(self.reasoning_logits).softmax(dim=0)
            return share.unflatten(0, (2, self.num_components))
        a, b = _inside(full_precision(self.reasonings)).unbind(dim=-1)
        return torch.stack([a, (1 - a) * (1 - b), (1 - a) * b])

    def forward(self, detections: Float[Tensor, "N K"]) -> Float[Tensor, "N C"]:
        """Probability of every class."""
        if detections.ndim != 2 or detections.shape[1] != self.num_components:
            raise ValueError(f"detections: found shape {tuple(detections.shape)}, needed [N, {self.num_components}]")
        d = _detections(detections)
        reasoning = self.reasoning.to(torch.promote_types(d.dtype, self.reasoning.dtype))
        positive, negative = reasoning[0], reasoning[-1]
        with no_autocast(d):
            evidence = d.to(positive) @ (positive - negative) + negative.sum(dim=0)
        if self.variant == "slim":
            return evidence
        return evidence / ((positive + negative).sum(dim=0) + self.eps)


def rbf_detection(
    x: Float[Tensor, "N D"], components: Float[Tensor, "K D"], sigma: Float[Tensor, "K"], kernel: str = "norm"
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """``exp(-|x - w| / sigma)`` (``"norm"``) or ``exp(-|x - w|^2 / sigma)`` (``"gaussian"``).

    Args:
        x: inputs.
        components: w.
        sigma: widths, positive.
        kernel: ``"norm"`` or ``"gaussian"``.

    Returns:
        Detections, and Euclidean distances (not squared) for both kernels; their gradient at distance 0 is 0.

    Raises:
        ValueError: shapes that do not fit, an unknown kernel, a sigma that is not positive (looked at on the CPU only).

    Example:
        >>> import torch
        >>> from proto_core.prototypes import rbf_detection
        >>> rbf_detection(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]))[0].log()
        tensor([[-1.]])
    """
    check_option("kernel", kernel, "norm", "gaussian")
    _check_sigma(sigma, components.shape[:1])
    distances = _exact_distances(x, components)
    power = distances if kernel == "norm" else distances.square()
    return (-power / sigma.to(distances)).exp(), distances


def cbc_margin_root(
    detections: Float[Tensor, "N K"], reasoning: Float[Tensor, "2 K C"], targets: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """Smallest factor t on the detections at which another class may catch up; above 1 exactly where x is right.

    For every other class c the difference of probabilities is at least ``A / t + B - G t`` with
    ``A = sum (r+_y + r-_c) d``, ``B = sum (r-_y - r-_c)``, ``G = sum (r-_y + r+_c) d``; its zero is
    ``t = (B + sqrt(B^2 + 4 A G)) / (2 G)``. At least 1e-12.

    Args:
        detections: in [0, 1].
        reasoning: positive and negative, of the slim variant.
        targets: classes.

    Raises:
        ValueError: shapes that do not fit, no sample, fewer than two classes, detections outside [0, 1], a target
            outside 0..C-1.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import cbc_margin_root
        >>> reasoning = torch.stack([torch.eye(2), torch.zeros(2, 2)])
        >>> cbc_margin_root(torch.tensor([[0.8, 0.2]]), reasoning, torch.tensor([0]))
        tensor([2.])
    """
    if reasoning.ndim != 3 or reasoning.shape[0] != 2 or detections.ndim != 2:
        shapes = f"{tuple(detections.shape)} and {tuple(reasoning.shape)}"
        raise ValueError(f"detections, reasoning: found shapes {shapes}, needed [N, K] and [2, K, C]")
    if detections.shape[1] != reasoning.shape[1]:
        raise ValueError(f"detections: found {detections.shape[1]} components, needed {reasoning.shape[1]}")
    classes = reasoning.shape[2]
    if classes < 2:
        raise ValueError(f"reasoning: found {classes} class, needed at least 2")
    check_class_targets(detections, targets, "detections", classes=classes)
    d, targets = _detections(detections), targets.long()
    positive, negative = full_precision(reasoning).to(torch.promote_types(d.dtype, reasoning.dtype))
    d = d.to(positive)
    with no_autocast(d):
        by_positive, by_negative = d @ positive, d @ negative
    column = targets.unsqueeze(1)
    absent = negative.sum(dim=0)
    a = by_positive.gather(1, column) + by_negative
    b = absent[targets].unsqueeze(1) - absent
    g = (by_negative.gather(1, column) + by_positive).clamp_min(1e-12)
    root = (b.square() + 4 * a * g).clamp_min(1e-24).sqrt()
    # two forms of one zero, each where nothing cancels; the other branch is kept finite for the gradient
    rising = b > 0
    direct = (torch.where(rising, b, 0) + root) / (2 * g)
    turned = 2 * a / torch.where(rising, 1, root - b)
    t = torch.where(rising, direct, turned).clamp_min(1e-12)
    own = torch.zeros_like(t, dtype=torch.bool).scatter_(1, column, True)
    return t.masked_fill(own, torch.inf).amin(dim=1)


def robustness_certificate(
    detections: Float[Tensor, "N K"],
    distances: Float[Tensor, "N K"],
    reasoning: Float[Tensor, "2 K C"],
    sigma: Float[Tensor, "K"],
    targets: Int[Tensor, "N"],
    kernel: str = "norm",
) -> Float[Tensor, "N"]:
    """Euclidean radius within which no perturbation changes the decision; 0 where it is wrong.

    With ``L = sigma_min ln t``: ``L`` for ``"norm"``; ``sqrt(beta^2 + L) - beta`` for ``"gaussian"``, beta the largest
    distance to a component, computed as ``L / (beta + sqrt(beta^2 + L))``.

    Args:
        detections: of :func:`rbf_detection`.
        distances: of :func:`rbf_detection`.
        reasoning: positive and negative, of the slim variant.
        sigma: widths.
        targets: classes.
        kernel: of the detections.

    Raises:
        ValueError: as :func:`cbc_margin_root`; distances that do not fit, a sigma that is not positive.

    Example:
        >>> import torch
        >>> from proto_core.prototypes import robustness_certificate
        >>> reasoning, sigma = torch.stack([torch.eye(2), torch.zeros(2, 2)]), torch.ones(2)
        >>> detections = torch.tensor([[0.8, 0.2]])
        >>> robustness_certificate(detections, -detections.log(), reasoning, sigma, torch.tensor([0]))
        tensor([0.6931])
    """
    check_option("kernel", kernel, "norm", "gaussian")
    _check_sigma(sigma, detections.shape[1:])
    if distances.shape != detections.shape:
        raise ValueError(f"distances: found shape {tuple(distances.shape)}, needed {tuple(detections.shape)}")
    root = cbc_margin_root(detections, reasoning, targets)
    reach = full_precision(sigma).to(root).amin() * root.log().clamp_min(0)
    if kernel == "norm":
        return reach
    beta = full_precision(distances).to(root).amax(dim=1)
    total = beta + (beta.square() + reach).sqrt()
    return reach / torch.where(total > 0, total, 1)


def _inside(values: Tensor) -> Tensor:
    """Clamp to [0, 1] whose gradient is 0 outside AND on the border, written out: clamp's own differs by version."""
    return torch.where((values > 0) & (values < 1), values, values.detach().clamp(0, 1))


def _detections(detections: Tensor) -> Tensor:
    if readable(detections) and not bool(((detections >= 0) & (detections <= 1)).all()):
        raise ValueError("detections: found numbers outside [0, 1] or NaN, needed detections in [0, 1]")
    return full_precision(detections)


def _exact_distances(x: Tensor, components: Tensor) -> Tensor:
    if x.ndim != 2 or components.ndim != 2 or x.shape[1] != components.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(components.shape)}"
        raise ValueError(f"x, components: found shapes {shapes}, needed [N, D] and [K, D]")
    x, components = full_precision(x), full_precision(components)
    dtype = torch.promote_types(x.dtype, components.dtype)
    # by differences: a sample on a component has distance 0, not the root of a cancellation
    return torch.cdist(x.to(dtype), components.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")


def _check_sigma(sigma: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(sigma.shape) != tuple(shape):
        raise ValueError(f"sigma: found shape {tuple(sigma.shape)}, needed {tuple(shape)}")
    if readable(sigma) and not bool((sigma > 0).all()):
        raise ValueError(f"sigma: found {float(sigma.min())}, needed positive widths")
