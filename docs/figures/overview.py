"""The picture at the top of README.md: python docs/figures/overview.py docs/figures/overview.png"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

DARK, IDLE, KEPT = "#1f2933", "#d9e0e6", "#2f6fb0"
KEPT_EXPERTS = {5, 19, 33, 46, 70, 88, 101, 119}  # any eight

figure, axes = plt.subplots(figsize=(9, 3.1), dpi=160)
axes.set_xlim(0, 90)
axes.set_ylim(-4, 27)
axes.axis("off")
for expert in range(128):
    row, column = divmod(expert, 16)
    colour = KEPT if expert in KEPT_EXPERTS else IDLE
    axes.add_patch(Rectangle((2 + column * 1.9, 17.5 - row * 2.2), 1.6, 1.8, color=colour))
for group in range(8):
    axes.add_patch(Rectangle((59 + group * 2.9, 2.1), 2.7, 17.2, color=KEPT))
text = {"color": DARK, "ha": "center"}
axes.text(17, 22.6, "Qwen3-30B-A3B: every layer has 128 experts", fontsize=9.5, **text)
axes.text(17, -1.8, "61 GB in memory; a token uses 8 experts", fontsize=9, **text)
axes.text(70.4, 22.6, "dense 3.34B: one feed-forward network", fontsize=9.5, **text)
axes.text(70.4, -1.8, "6.7 GB; an ordinary Qwen3 model", fontsize=9, **text)
arrow = {"arrowstyle": "-|>", "mutation_scale": 16, "color": DARK, "lw": 1.4}
axes.add_patch(FancyArrowPatch((35, 10.5), (57, 10.5), **arrow))
axes.text(46, 12.2, "score, select, merge,\nconcatenate", fontsize=8.5, va="bottom", **text)
axes.text(46, 8.8, "then distil from\nthe teacher", fontsize=8.5, va="top", **text)
figure.savefig(sys.argv[1], bbox_inches="tight", facecolor="white")
