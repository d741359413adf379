"""Figures of the grid: every configuration, the best of each scoring, the effect of each axis."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from m2d.methods import TABLES, table
from m2d.report.plot_style import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    SEQUENTIAL,
    new_figure,
    plain_log,
)

AXIS_NAMES = {"scoring": "scoring", "grouping": "grouping", "scaling": "scaling", "keep": "K"}


def term_of(axis: str, value: object) -> str:
    """The paper's term of a value of an axis, else the value."""
    return table(axis).term(str(value)) if axis in TABLES else str(value)


def in_order(values: pd.Series, axis: str) -> list:
    """The values of an axis that occur, in order of presentation (K: ascending)."""
    found = list(dict.fromkeys(values))
    known = list(table(axis)) if axis in TABLES else []
    return sorted(found, key=lambda v: known.index(v) if v in known else v)


def luminance(colour: tuple[float, float, float, float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2), 0 for black to 1 for white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def heat_map(grid: pd.DataFrame) -> Figure:
    """All configurations of one teacher: scoring and grouping down, scaling and K across."""
    scorings, groupings = (
        in_order(grid["scoring"], "scoring"),
        in_order(grid["grouping"], "grouping"),
    )
    scalings, keeps = in_order(grid["scaling"], "scaling"), in_order(grid["keep"], "keep")
    rows = len(scorings) * len(groupings)
    columns = len(keeps)
    numbered = rows <= 60 and columns <= 8
    figure, axes = new_figure(
        1, len(scalings), height=max(2.6, 1.5 + 0.185 * rows), sharey=True, width=7.2
    )
    norm = LogNorm(grid["perplexity"].min(), grid["perplexity"].max())
    keys = ["scaling", "scoring", "grouping", "keep"]
    values = grid.set_index(keys)["perplexity"]
    best = list(grid[keys].iloc[int(grid["perplexity"].to_numpy().argmin())])
    image = None
    for panel, scaling in zip(axes, scalings, strict=True):
        table = np.full((rows, columns), np.nan)
        for i, scoring in enumerate(scorings):
            for j, grouping in enumerate(groupings):
                for k, keep in enumerate(keeps):
                    key = (scaling, scoring, grouping, keep)
                    table[i * len(groupings) + j, k] = values.get(key, np.nan)
        image = panel.imshow(table, cmap=f"{SEQUENTIAL}_r", norm=norm, aspect="auto")
        panel.set_title(f"{term_of('scaling', scaling)} scaling")
        panel.set_xticks(range(columns), [str(keep) for keep in keeps])
        panel.set_xlabel("experts kept, K")
        panel.grid(False)
        panel.tick_params(length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
        for i in range(1, len(scorings)):
            panel.axhline(i * len(groupings) - 0.5, color="white", linewidth=2.5)
        if numbered:
            for (row, column), value in np.ndenumerate(table):
                colour = INK if luminance(image.cmap(norm(value))) > 0.2 else "white"
                text = f"{value:.1f}" if value < 1000 else f"{value:.0f}"
                panel.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        if best[0] == scaling:
            row = scorings.index(best[1]) * len(groupings) + groupings.index(best[2])
            corner = (keeps.index(best[3]) - 0.5, row - 0.5)
            panel.add_patch(
                Rectangle(
                    corner,
                    1,
                    1,
                    fill=False,
                    edgecolor=COLOURS[1],
                    linewidth=2,
                    clip_on=False,
                    zorder=5,
                )
            )
    labels = [term_of("grouping", grouping) for _ in scorings for grouping in groupings]
    axes[0].set_yticks(range(rows), labels, fontsize=7)
    for i, scoring in enumerate(scorings):
        middle = (i + 0.5) * len(groupings) - 0.5
        axes[0].text(
            -0.155,
            middle,
            term_of("scoring", scoring),
            transform=axes[0].get_yaxis_transform(),
            ha="right",
            va="center",
            fontweight="bold",
        )
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.5 if rows > 12 else 0.9, pad=0.02, aspect=30)
    bar.set_label("perplexity before distillation" if rows > 12 else "perplexity")
    plain_log(bar.ax, "y")
    bar.outline.set_visible(False)
    figure.supxlabel("the framed cell is the best", fontsize=8, color=MUTED)
    return figure


def best_per_scoring(grid: pd.DataFrame) -> Figure:
    """Per scoring: the spread of its configurations and the best; and the best for every K."""
    figure, (left, right) = new_figure(1, 2, height=3.6, width=7.8)
    order = grid.groupby("scoring")["perplexity"].min().sort_values(ascending=False).index
    for place, scoring in enumerate(order):
        part = grid[grid["scoring"] == scoring]
        best = part.iloc[int(part["perplexity"].to_numpy().argmin())]
        left.plot(
            [part["perplexity"].min(), part["perplexity"].max()],
            [place, place],
            color=FAINT,
            linewidth=5,
            solid_capstyle="round",
            zorder=1,
        )
        left.plot(part["perplexity"].median(), place, "|", color=MUTED, markersize=11, zorder=2)
        left.plot(best["perplexity"], place, "o", color=COLOURS[0], zorder=3)
        # At K = top-k the groupings are the same, so naming one would say too much.
        alike = part[(part["plan"] == best["plan"])]["grouping"].nunique() > 1
        words = "" if alike else term_of("grouping", best["grouping"]) + ", "
        left.annotate(
            f"{best['perplexity']:.1f}  ({words}{best['scaling']}, K={best['keep']})",
            (best["perplexity"], place),
            xytext=(0, 6),
            textcoords="offset points",
            fontsize=7.5,
            color=MUTED,
        )
    left.set_yticks(range(len(order)), [term_of("scoring", s) for s in order], fontweight="bold")
    left.set_ylim(-0.6, len(order) - 0.2)
    left.grid(axis="y", visible=False)
    left.set_title("Best, median and range")
    left.set_xlabel("perplexity")
    plain_log(left, "x")
    keeps = in_order(grid["keep"], "keep")
    for place, scoring in enumerate(in_order(grid["scoring"], "scoring")):
        best_by_keep = grid[grid["scoring"] == scoring].groupby("keep")["perplexity"].min()
        right.plot(
            range(len(keeps)),
            best_by_keep.reindex(keeps),
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            label=term_of("scoring", scoring),
        )
    right.set_xticks(range(len(keeps)), [str(keep) for keep in keeps])
    right.set_title("Best for every K")
    right.set_xlabel("experts kept, K")
    right.set_ylabel("perplexity")
    plain_log(right, "y")
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def axis_effects(grid: pd.DataFrame, effects: pd.DataFrame) -> Figure:
    """How much each axis matters: its share of variance, and its values' mean perplexities."""
    figure, (left, right) = new_figure(1, 2, height=4.0, width=7.8, width_ratios=[1, 1.7])
    effects = effects.sort_values("share_of_variance", ignore_index=True)
    shares = 100 * effects["share_of_variance"].to_numpy(dtype=float)
    left.barh(range(len(effects)), shares, color=COLOURS[0], height=0.6)
    for place, share in enumerate(shares):
        left.text(share + 1.5, place, f"{share:.0f}%", va="center", fontsize=8.5)
    names = [AXIS_NAMES[axis] for axis in effects["axis"]]
    left.set_yticks(range(len(effects)), names, fontweight="bold")
    left.grid(axis="y", visible=False)
    left.set_xlim(0, max(100.0 if shares.max() > 80 else 1.25 * shares.max(), 1e-6))
    left.set_xlabel("% of the variance of log-perplexity")
    left.set_title("Explained by each axis alone")
    logs = np.log(grid["perplexity"])
    rows = [
        np.exp(logs.groupby(grid[axis].to_numpy()).mean()).sort_values() for axis in effects["axis"]
    ]
    for place, means in enumerate(rows):
        right.plot([means.min(), means.max()], [place, place], color=FAINT, linewidth=5, zorder=1)
        right.plot(means, [place] * len(means), "o", color=COLOURS[0], zorder=2)
    right.set_yticks(range(len(effects)), names, fontweight="bold")
    right.set_ylim(-0.6, len(effects) - 0.4)
    right.grid(axis="y", visible=False)
    right.set_xlabel("geometric mean perplexity over the grid")
    right.set_title("Mean of each value")
    right.margins(x=0.08)
    plain_log(right, "x")
    figure.draw_without_rendering()  # lays the axes out: where labels meet depends on their width
    for place, (axis, means) in enumerate(zip(effects["axis"], rows, strict=True)):
        labels = [term_of(axis, value) for value in means.index]
        pixels = right.transData.transform(np.c_[means, np.zeros(len(means))])[:, 0]
        levels = label_levels(list(pixels * 72 / figure.dpi), [5.0 * len(text) for text in labels])
        for mean, text, level in zip(means, labels, levels, strict=True):
            above, lines = level % 2 == 0, level // 2
            right.annotate(
                text,
                (mean, place),
                xytext=(0, (7 + 9 * lines) * (1 if above else -1)),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=7,
            )
    return figure


def label_levels(centres: Sequence[float], widths: Sequence[float]) -> list[int]:
    """Lines for labels of points on a row, ascending: 0 above it, 1 below, 2 above that of 0, ...

    Each the nearest line where it does not meet the label before it.
    """
    ends: list[float] = []
    levels = []
    for centre, width in zip(centres, widths, strict=True):
        start = centre - width / 2
        level = next((i for i, end in enumerate(ends) if start >= end), len(ends))
        ends[level : level + 1] = [start + width]
        levels.append(level)
    return levels
