"""Figure of what folding and alignment did to each layer."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from m2d.report.plot_style import COLOURS, MARKERS, MUTED, message_figure, new_figure

WIDE_LABEL = 40  # characters of a line


class LayerChange(NamedTuple):
    """A number of one layer, before and after."""

    layer: int
    before: float
    after: float


Changes = Mapping[str, Sequence[LayerChange]]
"""By what was changed: a student, or several with the same numbers."""


def layers(folds: Changes, aligned: Changes) -> Figure:
    """Left: R2 of single neurons, unfolded and folded. Right: the residual stream's error."""
    shown = [part for part in (folds, aligned) if part]
    if not shown:
        return message_figure("no student of this run was folded or aligned")
    figure, axes = new_figure(1, len(shown), height=3.6)
    for axis, part in zip(axes, shown, strict=True):
        _draw(axis, part)
        if part is folds:
            axis.set_title("Fold: R2 of single neurons")
            axis.set_ylim(0, 1.02)
        else:
            axis.set_title("Align: relative error of the stream")
            axis.set_ylim(bottom=0)
    return figure


def _draw(axis: Axes, changes: Changes) -> None:
    """A line before (hollow, dashed) and after (filled) for each; equal ones before stand once."""
    drawn: set[tuple[float, ...]] = set()
    for i, (name, rows) in enumerate(changes.items()):
        places = [row.layer for row in rows]
        before = tuple(row.before for row in rows)
        style: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)],
            "color": COLOURS[i % len(COLOURS)],
        }
        if before not in drawn:
            alone = {**style, "color": MUTED, "marker": "o"} if len(changes) == 1 else style
            axis.plot(places, before, linestyle="--", markerfacecolor="white", **alone)
            drawn.add(before)
        label = textwrap.fill(name, WIDE_LABEL)
        axis.plot(places, [row.after for row in rows], label=label, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer (dashed: before)")
    axis.legend()
