"""Figures of the students: perplexity and accuracy before and after distillation, and training."""

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2d.report.plot_style import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    message_figure,
    new_figure,
    plain_log,
)
from m2d.report.results import CHANCE
from m2d.students.variants import UNDISTILLED

UNITS = {"B": 1e9, "M": 1e6, "K": 1e3}
BYTES = {" GB": 1e9, " MB": 1e6, " kB": 1e3}
LINES = ("--", "-.", (0, (6, 1, 1, 1, 1, 1)))  # of teachers; dots are chance
LABELS = {name: f"{name}, not distilled" for name in UNDISTILLED} | {
    "refit": "refitted, not distilled",
    "align": "aligned, not distilled",
}


def variants_of(table: pd.DataFrame) -> list[str]:
    """The variants of students: those before distillation first, then the recipes by name."""
    found = set(table["variant"]) - {"teacher"}
    before = [name for name in UNDISTILLED if name in found]
    return before + sorted(found - set(before))


def look(variant: str, variants: list[str]) -> dict[str, Any]:
    """Marker and colour of a variant; a student that was not distilled is hollow."""
    if variant in UNDISTILLED:
        marker, colour, face = MARKERS[UNDISTILLED.index(variant)], MUTED, "white"
    else:
        number = [name for name in variants if name not in UNDISTILLED].index(variant)
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        face = colour
    return {
        "marker": marker,
        "color": colour,
        "markerfacecolor": face,
        "markeredgecolor": colour,
        "linestyle": "none",
        "zorder": 3,
    }


def perplexities(students: pd.DataFrame) -> Figure:
    """Every student's perplexity before and after distillation, and its teacher's."""
    table = students.dropna(subset=["perplexity"])
    dense = table[table["student"].notna()]
    if dense.empty:
        return message_figure("no student has a perplexity in this run")
    variants = variants_of(dense)
    order = dense.groupby("student")["perplexity"].min().sort_values(ascending=False).index
    figure, (axes,) = new_figure(height=1.5 + 0.34 * len(order))
    for place, student in enumerate(order):
        part = dense[dense["student"] == student]
        ends = [part["perplexity"].min(), part["perplexity"].max()]
        axes.plot(ends, [place, place], color=FAINT, linewidth=4, zorder=1)
        for variant, value in zip(part["variant"], part["perplexity"], strict=True):
            axes.plot(value, place, **look(variant, variants))
            below = value == ends[0]
            axes.annotate(
                f"{value:.1f}",
                (value, place),
                xytext=(-7 if below else 7, 0),
                textcoords="offset points",
                ha="right" if below else "left",
                va="center",
                fontsize=7.5,
                color=MUTED,
            ) if value in ends else None
    for variant in variants:
        axes.plot([], [], label=LABELS.get(variant, variant), **look(variant, variants))
    for (teacher, value), line in zip(_teachers(table, "perplexity").items(), cycle(LINES)):
        axes.axvline(value, color=INK, linestyle=line, linewidth=1.2)
        axes.plot([], [], color=INK, linestyle=line, label=f"teacher {teacher}: {value:.1f}")
    axes.set_yticks(range(len(order)), list(order))
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("perplexity on the test text (log scale)")
    axes.set_title("Perplexity before and after distillation")
    plain_log(axes, "x")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def accuracies(students: pd.DataFrame) -> Figure:
    """Every student's accuracy in each task, with standard errors, chance and the teacher's."""
    errors = [str(c) for c in students.dropna(axis="columns", how="all") if str(c).endswith(" ±")]
    tasks = [c.removesuffix(" ±") for c in errors if c != "perplexity ±"]
    dense = students[students["student"].notna()]
    dense = dense.dropna(subset=tasks, how="all") if tasks else dense.iloc[:0]
    if dense.empty:
        return message_figure("no student was evaluated on a task in this run")
    variants = variants_of(dense)
    order = dense.groupby("student")[tasks[-1]].max().sort_values().index
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = new_figure(
        rows,
        columns,
        width=max(4.0, 1.5 + 1.9 * columns),
        height=1.1 + rows * (0.7 + 0.3 * len(order)),
        sharey=True,
        sharex=True,
    )
    for number, (panel, task) in enumerate(zip(axes, tasks, strict=False)):
        for place, student in enumerate(order):
            part = dense[dense["student"] == student].dropna(subset=[task])
            for _, row in part.iterrows():
                error = row[f"{task} ±"]
                panel.errorbar(
                    row[task],
                    place + 0.09 * (variants.index(row["variant"]) - (len(variants) - 1) / 2),
                    xerr=None if pd.isna(error) else error,
                    elinewidth=1,
                    **look(row["variant"], variants),
                )
        for value, line in zip(_teachers(students, task).values(), cycle(LINES)):
            panel.axvline(value, color=INK, linestyle=line, linewidth=1.2)
        if task in CHANCE:
            panel.axvline(100 * CHANCE[task], color=MUTED, linestyle=":", linewidth=1.2)
        panel.set_title(task.replace("_", " "), fontsize=9)
        panel.set_yticks(range(len(order)), list(order))
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.grid(axis="y", visible=False)
        if number >= len(tasks) - columns:
            panel.set_xlabel("accuracy, %")
    for panel in axes[len(tasks) :]:
        panel.set_visible(False)
    for variant in variants:
        axes[0].plot([], [], label=LABELS.get(variant, variant), **look(variant, variants))
    for teacher, line in zip(_teachers(students, tasks[0]), cycle(LINES)):
        axes[0].plot([], [], color=INK, linestyle=line, label=f"teacher {teacher}")
    if any(task in CHANCE for task in tasks):
        axes[0].plot([], [], color=MUTED, linestyle=":", label="chance")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def accuracy_and_size(students: pd.DataFrame) -> Figure:
    """Average accuracy (or, without tasks, perplexity) against parameters and against memory."""
    measure = "average" if students["average"].notna().any() else "perplexity"
    table = students.dropna(subset=[measure, "parameters"])
    if table.empty:
        return message_figure("no model in this run has both a score and a number of parameters")
    variants = variants_of(table)
    figure, axes = new_figure(1, 2, height=3.4, sharey=True)
    names = {"parameters": "parameters", "bytes": "memory of the weights"}
    for panel, column in zip(axes, names, strict=True):
        part = table.dropna(subset=[column])
        for _, row in part[part["student"].notna()].iterrows():
            panel.plot(row[column], row[measure], **look(row["variant"], variants))
        for _, row in part[part["student"].isna()].iterrows():
            panel.plot(row[column], row[measure], "*", color=INK, markersize=11, zorder=4)
        panel.set_xlabel(names[column])
        panel.set_xscale("log")
        panel.margins(0.15)
        sizes = part[column].astype(float).to_numpy()
        _size_ticks(panel, sizes, UNITS if column == "parameters" else BYTES)
    axes[0].set_ylabel("average accuracy, %" if measure == "average" else "perplexity")
    for variant in variants:
        axes[0].plot([], [], label=LABELS.get(variant, variant), **look(variant, variants))
    if table["student"].isna().any():
        axes[0].plot([], [], "*", color=INK, markersize=11, label="teacher")
    figure.suptitle("Scores and sizes", x=0.01, ha="left", fontweight="bold", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _size_ticks(axes: Axes, values: np.ndarray, units: dict[str, float]) -> None:
    """Ticks of a size axis: a few round sizes with their unit."""
    if not len(values):
        return
    low, high = values.min() / 1.6, values.max() * 1.6
    axes.set_xlim(low, high)
    steps = [s * 10.0**p for p in range(3, 14) for s in (1, 2, 5)]
    inside = [step for step in steps if low <= step <= high]
    axes.set_xticks(inside, [with_unit(step, units) for step in inside])
    axes.set_xticks([], minor=True)


def with_unit(value: float, units: dict[str, float]) -> str:
    """A number in the largest unit that leaves at least 1."""
    unit = next((unit for unit, size in units.items() if value >= size), "")
    return f"{value / units.get(unit, 1):g}{unit}"


def distillation(curves: dict[str, pd.DataFrame]) -> Figure:
    """KL and learning rate over the tokens of each distillation; thin lines are single steps."""
    curves = {name: table for name, table in curves.items() if len(table)}
    if not curves:
        return message_figure("no student was distilled in this run")
    figure, (upper, lower) = new_figure(2, 1, height=4.6, sharex=True, height_ratios=[2.4, 1])
    highest = max(table["tokens"].max() for table in curves.values())
    words, size = next(
        ((w, s) for w, s in ((" (billions)", 1e9), (" (millions)", 1e6)) if highest >= s), ("", 1)
    )
    for number, (name, table) in enumerate(sorted(curves.items())):
        colour = COLOURS[number % len(COLOURS)]
        style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        tokens = table["tokens"] / size
        smooth = table["loss"].ewm(span=max(2, len(table) // 25)).mean()
        upper.plot(tokens, table["loss"], color=colour, linewidth=0.5, alpha=0.25)
        upper.plot(tokens, smooth, style, color=colour, label=f"{name}: {smooth.iloc[-1]:.3f}")
        lower.plot(tokens, table["lr"], style, color=colour)
    upper.set_title("Distillation: forward KL to the teacher")
    upper.set_ylabel("KL, nats per token (log)")
    plain_log(upper, "y")
    columns = 1 if len(curves) <= 6 else 2
    upper.legend(ncols=columns, fontsize=7.5, title="last value", title_fontsize=7.5)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    lower.set_ylim(bottom=0)
    lower.set_xlabel(f"tokens{words}")
    if not words:
        lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.align_ylabels()
    return figure


def _teachers(table: pd.DataFrame, column: str) -> dict[str, float]:
    rows = table[(table["variant"] == "teacher") & table[column].notna()]
    return dict(zip(rows["teacher"], rows[column].astype(float), strict=True))
