"""One look for every figure: readable when small, safe for colour-blind readers, reproducible."""

import math
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullFormatter

from m2d.artifacts import atomic_path

matplotlib.use("Agg")

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/); the yellow, too faint on white, last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, MUTED, FAINT = "#1b1f24", "#57606a", "#d8dee4"
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
LEAST_GAP = {"x": 0.13, "y": 0.1}  # between labelled ticks, as a share of the axis
WIDTH = 7.2  # inches, the text width of a page

RULES: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "m2d",  # the same figure gives the same file
    "svg.fonttype": "path",
}


def new_figure(
    rows: int = 1, columns: int = 1, width: float = WIDTH, height: float = 3.4, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in this style and its axes, row by row."""
    matplotlib.rcParams.update(RULES)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def message_figure(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure, (axes,) = new_figure(height=1.4)
    axes.axis("off")
    axes.text(0.5, 0.5, textwrap.fill(text, 70), ha="center", va="center", color=MUTED)
    return figure


def plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis ("x" or "y") with a few round numbers, written out."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    inside = log_ticks(low, high, LEAST_GAP[which])
    axis.set_ticks(inside)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def log_ticks(low: float, high: float, gap: float) -> list[float]:
    """Round numbers between `low` and `high`, as many as stand `gap` of a log axis apart."""
    width = math.log(high / low)
    scales = [step * 10.0**power for power in range(-7, 12) for step in (1, 2, 5)]
    even = [
        MultipleLocator(s).tick_values(low, high) for s in scales if (high - low) / 50 < s < high
    ]
    decades = [scales, [10.0**power for power in range(-7, 12)]]
    chosen: list[float] = []
    for ticks in [*decades, *even]:
        inside = [float(tick) for tick in ticks if low <= tick <= high and tick > 0]
        apart = [math.log(after / before) for before, after in pairwise(inside)]
        if len(inside) > len(chosen) and min(apart, default=width) >= gap * width:
            chosen = inside
    if len(chosen) < 2:  # too narrow for those
        chosen = [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    return chosen


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.svg and NAME.png; the same figure gives the same bytes."""
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        with atomic_path(folder / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata, facecolor="white")
