"""One figure of a phenotype study: which associations stand out, how large the strongest are, and what rivals reach."""

from __future__ import annotations

from typing import IO, Any

import numpy as np
import pandas as pd

__all__ = ["draw_associations"]

_TOP, _SHOWN_OUTCOMES = 15, 40
_FLOOR = 1e-300
_SCORES = (("#b3261e", "o"), ("#1f5fa8", "s"), ("#5f8f3a", "^"), ("#8a5a9e", "D"))


def draw_associations(
    table: pd.DataFrame,
    comparison: pd.DataFrame,
    alpha: float,
    correction: str,
    fitted: int,
    file: IO[Any],
    file_format: str,
) -> None:
    """Draw ``-log10 p`` by outcome, the odds ratios of the strongest associations, and the best AUC of each score.

    Args:
        table: long table of associations, by rising p.
        comparison: per outcome and kind of score, with ``best_auc``.
        alpha: significance level of the adjusted p.
        correction: its name, for the legend.
        fitted: number of fitted cells.
        file: binary file to write to.
        file_format: "svg" or "png".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = table[np.isfinite(table["p_value"])]
    best = cells.groupby("phecode", sort=False)["p_value"].min().sort_values(kind="stable")
    outcomes = sorted(best.index[:_SHOWN_OUTCOMES])
    shown = cells[cells["phecode"].isin(outcomes)]
    place = {name: k for k, name in enumerate(outcomes)}
    top = cells.head(_TOP)

    width = 6.0 + 0.22 * len(outcomes)
    figure = Figure(figsize=(width + 6.5, 5.6 + 0.34 * max(len(top), 8)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(width, 6.5), height_ratios=(1.0 + 0.34 * max(len(top), 8), 3.8))
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    below = figure.add_subplot(grid[1, 0], sharex=left)

    height = -np.log10(shown["p_value"].clip(lower=_FLOOR))
    x = shown["phecode"].map(place).to_numpy(dtype=float)
    spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(shown))
    flag = shown["significant"].to_numpy(dtype=bool)
    left.scatter(x[~flag] + spread[~flag], height[~flag], s=12, color="#9aa5b1", label="not significant", linewidths=0)
    left.scatter(x[flag] + spread[flag], height[flag], s=18, color="#b3261e", label="significant", linewidths=0)
    if correction == "bonferroni" and fitted:
        line = -np.log10(alpha / fitted)
        left.axhline(line, color="#333333", linewidth=0.8, linestyle="--", label=f"{alpha:g} / {fitted} tests")
    left.set_ylabel("−log10 p, one dot per prototype")
    left.set_title("Associations by outcome", loc="left", fontsize=11)
    left.set_ylim(bottom=-0.04 * height.max())
    left.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderpad=0)
    left.tick_params(labelbottom=False)

    rows = comparison[comparison["phecode"].isin(outcomes)]
    for number, (kind, part) in enumerate(rows.groupby("score", sort=False)):
        at = part["phecode"].map(place).to_numpy(dtype=float) + 0.14 * (number - 1)
        color, marker = _SCORES[number % len(_SCORES)]
        below.scatter(at, part["best_auc"], s=26, color=color, marker=marker, label=str(kind), linewidths=0)
    below.axhline(0.5, color="#333333", linewidth=0.8)
    below.set_xticks(range(len(outcomes)), [_short(name) for name in outcomes], rotation=60, ha="right", fontsize=8)
    below.set_ylabel("AUC")
    below.set_title("Best AUC", loc="left", fontsize=11)
    below.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderpad=0)

    order = np.arange(len(top))[::-1]
    ratio = top["odds_ratio"].to_numpy()
    low, high = top["ci_low"].to_numpy(), top["ci_high"].to_numpy()
    colors = ["#b3261e" if flag else "#9aa5b1" for flag in top["significant"]]
    right.hlines(order, low, high, colors=colors, linewidth=1.6)
    right.scatter(ratio, order, color=colors, s=26, zorder=3)
    right.axvline(1.0, color="#333333", linewidth=0.8)
    right.set_xscale("log")
    right.set_yticks(
        order, [f"{_short(p)} → {_short(k)}" for p, k in zip(top["prototype"], top["phecode"])], fontsize=8
    )
    right.set_xlabel("odds ratio per standard deviation, 95 % interval")
    right.set_title("Strongest associations", loc="left", fontsize=11)
    ends = np.concatenate([low[np.isfinite(low)], high[np.isfinite(high)], [1.0]])
    right.set_xlim(ends.min() / 1.15, ends.max() * 1.15)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if ends.min() / 1.15 <= t <= ends.max() * 1.15]
    right.set_xticks(ticks, [f"{t:g}" for t in ticks])
    right.minorticks_off()
    for axes in (left, right, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is right else "y", color="#e5e8eb", linewidth=0.6)
        axes.set_axisbelow(True)
    metadata = {"Date": None} if file_format == "svg" else None
    figure.savefig(file, format=file_format, metadata=metadata)


def _short(name: Any, most: int = 28) -> str:
    text = str(name)
    return text if len(text) <= most else text[: most - 1] + "…"
