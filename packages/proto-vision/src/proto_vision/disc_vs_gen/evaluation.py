"""Linear evaluation of frozen features: learning curves of naive Bayes and of logistic regression.

Source: "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications", ICML 2023, arXiv 2302.02334.
Differences from the authors' code: logistic regression is fitted to its optimum (L-BFGS, scikit-learn's objective)
instead of by SGD whose best epoch the test set chooses; both heads see the same subsets; a subset holds every class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proto_core.checks import check_option, check_positive
from proto_core.classifiers import GaussianNaiveBayes, LogisticRegressionHead, sample_complexity_curve
from proto_core.systems import Paper
from proto_vision.disc_vs_gen.curves import LearningCurves

__all__ = ["LinearEvaluation", "RangeScaled"]

Scaling = Literal["none", "minmax"]
Progress = Callable[[Iterable[int], str], Iterable[int]]


class LinearEvaluation:
    """Test accuracies of Gaussian naive Bayes and logistic regression by the number of samples they are fitted on.

    Naive Bayes has one variance per feature for all classes, hence is linear too. Both heads are fitted on the same
    random subsets, which hold every class.

    Args:
        samples_per_class: sizes of the subsets, mean over the classes; ``None``: 1, 2, 5, 10, 20, 50, ... as far as the
            training samples go, and all of them.
        repeats: subsets of each size.
        seed: of the subsets.
        eps: added to naive Bayes' variances, in squared units of a feature. A feature that is constant in a subset has
            this variance and rules wherever a test value differs: for features on a scale of 1, 1e-2 is a good guard.
        C: inverse strength of logistic regression's penalty.
        max_iter: of L-BFGS.
        scaling: ``"minmax"`` brings each feature to [0, 1] by the range that it has in the subset.

    Raises:
        ValueError: a size or a number of repeats below 1, sizes that do not rise, a negative eps, an unknown word.

    Source:
        arXiv 2302.02334, section 6.

    Example:
        >>> import torch
        >>> from proto_core.classifiers import make_gaussian_mixture
        >>> from proto_vision.disc_vs_gen import LinearEvaluation
        >>> train, test = make_gaussian_mixture(100, 2, 300, seed=0), make_gaussian_mixture(100, 2, 300, seed=1)
        >>> curves = LinearEvaluation([4, 300])(*train, *test)
        >>> {name: found.mean(0).round(decimals=1).tolist() for name, found in curves.accuracy.items()}
        {'naive_bayes': [1.0, 1.0], 'logistic_regression': [0.6, 1.0]}
    """

    paper: ClassVar[Paper] = GaussianNaiveBayes.paper

    def __init__(
        self,
        samples_per_class: Sequence[int] | None = None,
        *,
        repeats: int = 5,
        seed: int = 0,
        eps: float = 1e-9,
        C: float = 1.0,
        max_iter: int = 1000,
        scaling: Scaling = "none",
    ) -> None:
        sizes = None if samples_per_class is None else [int(count) for count in samples_per_class]
        if sizes is not None and (not sizes or sizes[0] < 1 or sorted(set(sizes)) != sizes):
            raise ValueError(f"samples_per_class: found {sizes}, needed rising numbers from 1 on")
        check_positive(repeats=repeats, C=C, max_iter=max_iter)
        if eps < 0:
            raise ValueError(f"eps: found {eps}, needed at least 0")
        self.samples_per_class, self.repeats, self.seed = sizes, repeats, seed
        self.eps, self.C, self.max_iter = eps, C, max_iter
        self.scaling = check_option("scaling", scaling, "none", "minmax")

    def settings(self) -> dict[str, Any]:
        """The arguments that make it again."""
        names = ("samples_per_class", "repeats", "seed", "eps", "C", "max_iter", "scaling")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def sizes(self, samples: int, classes: int) -> list[int]:
        """Samples per class that are measured, of so many training samples of so many classes.

        Raises:
            ValueError: more samples per class than there are.
        """
        most = samples // classes
        if self.samples_per_class is None:
            steps = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
            return [count for count in steps if count < most] + [most]
        if self.samples_per_class[-1] > most:
            found = f"{self.samples_per_class[-1]} for {samples} training samples of {classes} classes"
            raise ValueError(f"samples_per_class: found {found}, needed {most} at most")
        return self.samples_per_class

    def heads(self, features: int, classes: int, device: torch.device) -> dict[str, Callable[[], Any]]:
        """What makes each head anew, by its name."""

        def naive_bayes() -> Any:
            return self._scaled(GaussianNaiveBayes(features, classes, eps=self.eps).to(device))

        def logistic_regression() -> Any:
            head = LogisticRegressionHead(features, classes, C=self.C, max_iter=self.max_iter)
            return self._scaled(head.to(device))

        return {"naive_bayes": naive_bayes, "logistic_regression": logistic_regression}

    def _scaled(self, head: Any) -> Any:
        return head if self.scaling == "none" else RangeScaled(head)

    def __call__(
        self,
        x_train: Float[Tensor, "N D"],
        y_train: Int[Tensor, "N"],
        x_test: Float[Tensor, "M D"],
        y_test: Int[Tensor, "M"],
        *,
        progress: Progress = lambda steps, text: steps,
    ) -> LearningCurves:
        """Fit and test both heads on all subsets, on the features' device.

        Args:
            x_train: features that subsets are drawn from.
            y_train: their classes, numbers from 0.
            x_test: features that accuracy is measured on.
            y_test: their classes.
            progress: called with the sizes and what is done, gives the sizes back one by one.

        Raises:
            ValueError: shapes or types that do not fit, NaN, fewer than two classes to train on, a class in the test
                that training has not, sizes above the number of samples.
        """
        for name, x, y in (("x_train, y_train", x_train, y_train), ("x_test, y_test", x_test, y_test)):
            if x.ndim != 2 or y.shape != x.shape[:1] or not len(y) or x.shape[1] != x_train.shape[1]:
                shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
                raise ValueError(f"{name}: found shapes {shapes}, needed [N, D] and [N], one D, N at least 1")
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name}: found NaN or infinite features, needed numbers")
        trained = y_train.unique()
        if len(trained) < 2 or int(trained[0]) < 0:
            raise ValueError(f"y_train: found classes {trained.tolist()}, needed two at least, from 0 on")
        strange = y_test[~torch.isin(y_test, trained)].unique()
        if len(strange):
            raise ValueError(f"y_test: found classes that training has not, such as {strange[:5].tolist()}")
        counts = self.sizes(len(y_train), len(trained))
        totals = [count * len(trained) for count in counts]
        heads = self.heads(x_train.shape[1], int(trained[-1]) + 1, x_train.device)
        errors: dict[str, list[Tensor]] = {name: [] for name in heads}
        for total in progress(totals, "heads"):
            for name, make in heads.items():
                pool, test = (x_train, y_train), (x_test, y_test)
                errors[name].append(
                    sample_complexity_curve(make, *pool, *test, [total], repeats=self.repeats, seed=self.seed)
                )
        return LearningCurves(counts, totals, {name: 1 - torch.cat(found, dim=1) for name, found in errors.items()})


class RangeScaled:
    """A head on features that are brought to [0, 1] by the range of those that it is fitted on.

    Args:
        head: with ``fit(x, y)`` and ``predict(x)``.
    """

    def __init__(self, head: Any) -> None:
        self.head = head

    def fit(self, x: Float[Tensor, "N D"], y: Int[Tensor, "N"]) -> RangeScaled:
        """Take the range, then fit the head; a constant feature becomes 0."""
        self.low, high = x.amin(0), x.amax(0)
        self.span = torch.where(high > self.low, high - self.low, 1)
        self.head.fit(self._scaled(x), y)
        return self

    def predict(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """The head's answer; values outside the range stay outside."""
        return self.head.predict(self._scaled(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - self.low) / self.span
