"""Learning curves of two heads: accuracy by samples per class, where they cross, their table and their picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, Literal, NamedTuple

from jaxtyping import Float64
from torch import Tensor

__all__ = ["HEADS", "LearningCurves", "draw_learning_curves"]

HEADS = {"naive_bayes": "naive Bayes", "logistic_regression": "logistic regression"}
"""Name in tables -> name in pictures."""
_COLOURS = {"naive_bayes": "#b3541e", "logistic_regression": "#1f5fa8"}


class LearningCurves(NamedTuple):
    """Test accuracies of both heads on the same subsets of the training samples.

    Attributes:
        samples_per_class: S numbers, mean over the classes.
        samples: S numbers, in all.
        accuracy: of each head of :data:`HEADS`, ``[repeats, S]`` float64.

    Example:
        >>> import torch
        >>> from proto_vision.disc_vs_gen import LearningCurves
        >>> bayes = torch.tensor([[0.5, 0.6], [0.7, 0.6]]).double()
        >>> logistic = torch.tensor([[0.4, 0.9], [0.4, 0.7]]).double()
        >>> curves = LearningCurves([1, 8], [2, 16], {"naive_bayes": bayes, "logistic_regression": logistic})
        >>> curves.crossing()
        8
        >>> last = list(curves.summary())[-1]
        >>> last["samples"], round(last["logistic_regression"], 3), round(last["logistic_regression_std"], 3)
        (16, 0.8, 0.1)
    """

    samples_per_class: list[int]
    samples: list[int]
    accuracy: dict[str, Float64[Tensor, "repeats sizes"]]

    def crossing(self) -> int | None:
        """Samples per class from which on logistic regression's mean stays ahead; ``None`` if it is not in the end."""
        ahead = self.accuracy["logistic_regression"].mean(0) > self.accuracy["naive_bayes"].mean(0)
        behind = (~ahead).nonzero().flatten().tolist()
        first = behind[-1] + 1 if behind else 0
        return self.samples_per_class[first] if first < len(self.samples_per_class) else None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each head, size and repeat."""
        for name, found in self.accuracy.items():
            for place, (count, total) in enumerate(zip(self.samples_per_class, self.samples)):
                for repeat, value in enumerate(found[:, place].tolist()):
                    yield {
                        "head": name,
                        "samples_per_class": count,
                        "samples": total,
                        "repeat": repeat,
                        "accuracy": value,
                    }

    def summary(self) -> Iterator[dict[str, Any]]:
        """One row for each size: mean and standard deviation over the repeats of both heads."""
        for place, (count, total) in enumerate(zip(self.samples_per_class, self.samples)):
            row: dict[str, Any] = {"samples_per_class": count, "samples": total}
            for name, found in self.accuracy.items():
                row[name] = float(found[:, place].mean())
                row[f"{name}_std"] = float(found[:, place].std(correction=0))
            yield row


def draw_learning_curves(
    curves: LearningCurves, file: IO[Any], file_format: Literal["png", "svg"], title: str = ""
) -> None:
    """Draw mean accuracies, a band of one standard deviation, every repeat as a dot, and where the means cross.

    Args:
        curves: what is drawn.
        file: binary file to write to.
        file_format: ``"png"`` or ``"svg"``.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x = curves.samples_per_class
    for name, found in curves.accuracy.items():
        mean, deviation = found.mean(0), found.std(0, correction=0)
        colour = _COLOURS[name]
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=colour, marker="o", markersize=4, label=HEADS[name])
        for repeat in found:
            axes.plot(x, repeat, color=colour, linestyle="none", marker=".", markersize=3, alpha=0.5)
    crossing = curves.crossing()
    if crossing is not None and crossing != x[0]:
        axes.axvline(crossing, color="#6b7683", linewidth=0.9, linestyle="--")
        axes.annotate(
            f"logistic regression ahead\nfrom {crossing} per class",
            (crossing, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=8,
            color="#4a5561",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(x))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(x, [f"{count:g}" for count in x], fontsize=8)
    axes.set(xlabel="training samples per class", ylabel="test accuracy")
    axes.grid(color="#e3e7ec", linewidth=0.6)
    axes.legend(frameon=False, loc="upper left")
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(file, format=file_format)
