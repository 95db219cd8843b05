"""Naive Bayes against logistic regression on frozen features (ICML 2023, arXiv 2302.02334).

Both are linear: naive Bayes with one diagonal covariance for all classes, and multinomial logistic regression. With n
features the first needs O(log n) samples to come near its asymptotic error, the second O(n) but is better in the limit.
Unlike the authors' code, batches may lack classes, statistics are float64 whatever comes in, and no constant of the
likelihood is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, check_positive
from proto_core.systems import Paper

__all__ = [
    "GaussianNaiveBayes",
    "LogisticRegressionHead",
]

BLOCK = 2**23
"""Entries ``samples x classes x features`` of one pass."""


class GaussianNaiveBayes(nn.Module):
    """Gaussian classes with a diagonal covariance, fitted from a stream of batches exactly.

    ``log p(x | k) = -1/2 sum_f [(x_f - m_kf)^2 / s2_f + log(2 pi s2_f)]`` with the within-class variance
    ``s2 = sum_k pi_k v_k + eps``; logits are ``log pi_k + log p(x | k)``. The statistics do not depend on how the data
    are split or ordered. A class without a sample has logit minus infinity and is never predicted.

    A feature that is constant in training has variance eps: a test value that differs then rules the decision. For
    features on a scale of 1 an eps of 1e-2 is a good guard.

    Args:
        in_features: D.
        num_classes: C.
        variance: ``"pooled"`` or ``"per_class"`` (each class its own variance + eps, then the classifier is quadratic).
        eps: added to variances, absolute.
        prior: ``"empirical"`` or ``"uniform"``.

    Attributes:
        counts: buffer ``[C]`` int64.
        means: buffer ``[C, D]`` float64.
        variances: buffer ``[C, D]`` float64, population variance per class, without eps.

    Raises:
        ValueError: sizes below 1, a negative eps, an unknown word.

    Example:
        >>> import torch
        >>> from proto_core.classifiers import GaussianNaiveBayes
        >>> x, y = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 0, 1, 1])
        >>> GaussianNaiveBayes(1, 2).fit(x, y).predict(torch.tensor([[2.0], [9.0]]))
        tensor([0, 1])
    """

    paper: ClassVar[Paper] = Paper(
        title="Revisiting Discriminative vs. Generative Classifiers: Theory and Implications",
        year=2023,
        arxiv="2302.02334",
        code="ML-GSAI/Revisiting-Dis-vs-Gen-Classifiers@86a0bcc",
        evidence="code",
        summary="naive Bayes and logistic regression as heads on frozen features",
        claim="naive Bayes needs far fewer samples, logistic regression is better with many",
    )
    counts: Tensor
    means: Tensor
    variances: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        variance: str = "pooled",
        eps: float = 1e-9,
        prior: str = "empirical",
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, num_classes=num_classes)
        if eps < 0:
            raise ValueError(f"eps: found {eps}, needed at least 0")
        self.variance = check_option("variance", variance, "pooled", "per_class")
        self.prior = check_option("prior", prior, "empirical", "uniform")
        self.eps = eps
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("means", torch.zeros(num_classes, in_features, dtype=torch.float64))
        self.register_buffer("variances", torch.zeros(num_classes, in_features, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianNaiveBayes:
        """Move to another device; statistics stay float64 (``.half()`` would ruin them)."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and settings."""
        classes, features = self.means.shape
        return f"{features}, {classes}, variance={self.variance!r}, eps={self.eps}, prior={self.prior!r}"

    def reset(self) -> GaussianNaiveBayes:
        """Forget all samples."""
        for buffer in (self.counts, self.means, self.variances):
            buffer.zero_()
        return self

    def fit(self, x: Float[Tensor, "N D"], y: Int[Tensor, "N"]) -> GaussianNaiveBayes:
        """Forget all samples, then :meth:`partial_fit`."""
        return self.reset().partial_fit(x, y)

    @torch.no_grad()
    def partial_fit(self, x: Float[Tensor, "N D"], y: Int[Tensor, "N"]) -> GaussianNaiveBayes:
        """Add a batch, which may be empty or lack classes.

        Raises:
            ValueError: shapes or types that do not fit, a class outside 0..C-1, NaN.
        """
        check_class_targets(x, y, "x", classes=len(self.counts), empty=True)
        self._check_features(x)
        x, y = x.to(self.means), y.long()
        counts = torch.bincount(y, minlength=len(self.counts))
        size = counts.clamp_min(1).unsqueeze(1)
        means = torch.zeros_like(self.means).index_add_(0, y, x) / size
        variances = torch.zeros_like(self.means).index_add_(0, y, (x - means[y]).square()) / size
        return self._add(counts, means, variances)

    @torch.no_grad()
    def merge(self, other: GaussianNaiveBayes) -> GaussianNaiveBayes:
        """Add the samples that another one of the same sizes has seen, as ranks do.

        Raises:
            ValueError: other sizes.
        """
        if other.means.shape != self.means.shape:
            raise ValueError(f"other: found sizes {tuple(other.means.shape)}, needed {tuple(self.means.shape)}")
        return self._add(*(part.to(self.means.device) for part in (other.counts, other.means, other.variances)))

    def _add(self, counts: Tensor, means: Tensor, variances: Tensor) -> GaussianNaiveBayes:
        before, added = self.counts.double().unsqueeze(1), counts.double().unsqueeze(1)
        total = (before + added).clamp_min(1)
        between = (self.means - means).square() * before * added / total
        self.variances.copy_((before * self.variances + added * variances + between) / total)
        self.means.copy_((before * self.means + added * means) / total)
        self.counts.add_(counts)
        return self

    @property
    def class_prior(self) -> Float[Tensor, "C"]:
        """Prior probabilities of the classes."""
        if self.prior == "uniform":
            return torch.full_like(self.means[:, 0], 1 / len(self.counts))
        return self.counts.double() / self.counts.sum().clamp_min(1)

    @property
    def pooled_variance(self) -> Float[Tensor, "D"]:
        """Variance within the classes, with eps."""
        weight = self.counts.double() / self.counts.sum().clamp_min(1)
        return weight @ self.variances + self.eps

    def log_likelihood(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """``log p(x | k)`` in float64; minus infinity for a class without a sample.

        Raises:
            ValueError: nothing fitted yet, shapes that do not fit, NaN, a variance of 0 (give an eps).
        """
        self._check_features(x)
        if not bool(self.counts.any()):
            raise ValueError("found no sample, needed fit or partial_fit before")
        pooled = self.variance == "pooled"
        spread = self.pooled_variance.expand_as(self.means) if pooled else self.variances + self.eps
        seen = self.counts > 0
        if not bool((spread[seen] > 0).all()):
            raise ValueError("variance: found 0 for a feature, needed an eps above 0")
        spread = torch.where(seen.unsqueeze(1), spread, 1)
        constant = (2 * math.pi * spread).log().sum(dim=1)
        x = x.to(self.means)
        rows = max(1, BLOCK // self.means.numel())
        blocks = []
        for block in x.split(rows):
            # by differences: the matrix product's cancellation would show where a variance is tiny
            square = ((block.unsqueeze(1) - self.means).square() / spread).sum(dim=-1)
            blocks.append(-0.5 * (square + constant))
        found = torch.cat(blocks) if blocks else x.new_empty(0, len(self.counts))
        return torch.where(seen, found, -torch.inf)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """``log p(x, k)`` in float64."""
        return self.log_likelihood(x) + self.class_prior.log()

    def predict(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """Most probable class."""
        return self(x).argmax(dim=1)

    def predict_log_proba(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """``log p(k | x)``."""
        return self(x).log_softmax(dim=1)

    def _check_features(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [N, {self.means.shape[1]}]")
        if not bool(x.isfinite().all()):
            raise ValueError("x: found NaN or infinite values, needed numbers")


class LogisticRegressionHead(nn.Module):
    """Multinomial logistic regression: ``sum_i cross entropy_i + |W|^2 / (2 C)``, the intercept free, by L-BFGS.

    The objective of scikit-learn's ``LogisticRegression`` (one weight row per class). The same module can be trained
    by SGD instead: ``linear`` is an ordinary layer.

    Args:
        in_features: D.
        num_classes: number of classes, at least 2.
        C: inverse strength of the penalty.
        max_iter: L-BFGS iterations.
        tol: stop at a largest gradient entry, per sample, of this size.
        fit_intercept: whether there is an intercept.

    Raises:
        ValueError: C, max_iter or tol not positive, fewer than 2 classes.

    Example:
        >>> import torch
        >>> from proto_core.classifiers import LogisticRegressionHead
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> LogisticRegressionHead(1, 2).fit(x, y).predict(torch.tensor([[-0.1], [0.1]]))
        tensor([0, 1])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        C: float = 1.0,
        max_iter: int = 1000,
        tol: float = 1e-6,
        fit_intercept: bool = True,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, C=C, max_iter=max_iter, tol=tol)
        if num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, needed at least 2")
        self.C = C
        self.max_iter = max_iter
        self.tol = tol
        self.fit_intercept = fit_intercept
        self.linear = nn.Linear(in_features, num_classes, bias=fit_intercept)

    def reset_parameters(self) -> None:
        """Start as a linear layer does."""
        self.linear.reset_parameters()

    def extra_repr(self) -> str:
        """Settings."""
        return f"C={self.C}, max_iter={self.max_iter}, tol={self.tol}, fit_intercept={self.fit_intercept}"

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits, in the layer's precision whatever comes in."""
        return self.linear(x.to(self.linear.weight.dtype))

    def predict(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """Most probable class."""
        return self(x).argmax(dim=1)

    def objective(self, x: Float[Tensor, "N D"], y: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """What ``fit`` minimises."""
        return F.cross_entropy(self(x), y.long(), reduction="sum") + self.linear.weight.square().sum() / (2 * self.C)

    def fit(self, x: Float[Tensor, "N D"], y: Int[Tensor, "N"]) -> LogisticRegressionHead:
        """Minimise the objective in float64 from weights of 0; the layer keeps its own precision.

        Raises:
            ValueError: shapes or types that do not fit, a class outside 0..C-1, NaN.
        """
        check_class_targets(x, y, "x", classes=self.linear.out_features)
        if x.shape[1] != self.linear.in_features:
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [N, {self.linear.in_features}]")
        if not bool(x.isfinite().all()):
            raise ValueError("x: found NaN or infinite values, needed numbers")
        place = self.linear.weight.device
        x, y = x.detach().to(place, torch.float64), y.to(place, torch.long)
        weight = torch.zeros_like(self.linear.weight, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(weight), dtype=torch.float64, device=place, requires_grad=self.fit_intercept)
        wanted = [weight, bias] if self.fit_intercept else [weight]
        optimizer = torch.optim.LBFGS(
            wanted,
            max_iter=self.max_iter,
            max_eval=10 * self.max_iter,
            tolerance_grad=self.tol * 0.1,
            tolerance_change=0.0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            # per sample, so that the tolerance means the same for any number of them
            loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2 * self.C * len(x))
            for parameter, gradient in zip(wanted, torch.autograd.grad(loss, wanted)):
                parameter.grad = gradient
            return loss.detach()

        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if self.fit_intercept:
                self.linear.bias.copy_(bias)
        return self
