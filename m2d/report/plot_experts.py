"""Figures of the statistics: how experts are used, and how alike their outputs are."""

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from m2d.report.plot_style import COLOURS, DIVERGING, MUTED, SEQUENTIAL, new_figure

Matrix = npt.NDArray[np.float64]
MOST_PANELS = 8


def usage(statistics: pd.DataFrame) -> Figure:
    """Share of tokens that select each expert, per layer, and how many experts that amounts to.

    The effective number is exp(entropy) of the selections: E when all are used alike.
    """
    layers = sorted(set(statistics["layer"]))
    table = statistics.assign(share=statistics["n_selected"] / statistics["n_tokens"])
    shares = table.pivot(index="layer", columns="expert", values="share").loc[layers].to_numpy()
    experts = shares.shape[1]
    ordered = -np.sort(-shares, axis=1)
    height = 1.6 + min(0.3 * len(layers), 5)
    figure, (left, right) = new_figure(1, 2, height=height, width_ratios=[3, 1])
    image = left.imshow(ordered, cmap=SEQUENTIAL, vmin=0, aspect="auto", interpolation="nearest")
    left.grid(False)
    left.tick_params(length=0)
    left.set_xlabel("expert, by usage in its layer")
    left.set_ylabel("layer")
    step = max(1, len(layers) // 12)
    left.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ticks = [0, *range(max(1, experts // 4) - 1, experts, max(1, experts // 4))]
    left.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    left.set_title("Share of tokens that select an expert")
    bar = figure.colorbar(image, ax=left, pad=0.02, aspect=15)
    uniform = shares.sum(axis=1).mean() / experts
    bar.ax.axhline(uniform, color="white", linewidth=1.5)
    bar.set_label("white: if all were used alike", fontsize=7.5)
    bar.outline.set_visible(False)
    probabilities = shares / shares.sum(axis=1, keepdims=True)
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    effective = np.exp(-(probabilities * logs).sum(axis=1))
    right.barh(range(len(layers)), effective, color=COLOURS[0], height=0.65)
    if len(layers) <= 12:
        for place, number in enumerate(effective):
            right.text(
                number - 0.03 * experts,
                place,
                f"{number:.1f}",
                ha="right",
                va="center",
                color="white",
            )
    right.axvline(experts, color=MUTED, linestyle="--", linewidth=1)
    right.set_ylim(len(layers) - 0.5, -0.5)
    right.set_yticks([])
    right.grid(axis="y", visible=False)
    right.set_xlim(0, 1.08 * experts)
    right.set_xlabel(f"effective experts of {experts}")
    right.set_title("Balance")
    return figure


def cosines(gram: Matrix) -> Matrix:
    """Cosines [E, E] from inner products [E, E]; 0 where an expert has no output."""
    norms = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.zeros_like(gram, dtype=np.float64), where=scale > 0)


def similarity(grams: dict[int, Matrix]) -> Figure:
    """Cosine similarity of expert outputs over all tokens, experts ordered so that alike ones
    stand together. Of many layers, eight evenly spaced ones.
    """
    layers = sorted(grams)
    shown = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, MOST_PANELS).astype(int))]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(rows, columns, height=0.3 + 1.9 * rows)
    off_diagonals = {}
    for layer in layers:
        matrix = cosines(grams[layer].astype(np.float64))
        off_diagonals[layer] = matrix[~np.eye(len(matrix), dtype=bool)]
    limit = max(0.1, *(float(np.abs(values).max()) for values in off_diagonals.values()))
    image = None
    for panel, layer in zip(axes, shown, strict=False):
        matrix = cosines(grams[layer].astype(np.float64))
        distances = np.clip(1 - matrix, 0, None)
        np.fill_diagonal(distances, 0)
        if len(matrix) > 2:
            pairs = squareform(distances, checks=False)
            order = leaves_list(linkage(pairs, "average", optimal_ordering=len(matrix) <= 64))
            matrix = matrix[np.ix_(order, order)]
        np.fill_diagonal(matrix, np.nan)
        image = panel.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit)
        panel.set_title(f"Layer {layer}", fontsize=9)
        panel.set_xlabel(f"mean {off_diagonals[layer].mean():+.2f}", fontsize=8)
        panel.grid(False)
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_visible(False)
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, aspect=18)
    bar.set_label("cosine of expert outputs")
    bar.outline.set_visible(False)
    return figure
