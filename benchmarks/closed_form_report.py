"""The tables and the figure of benchmarks/closed_form.py, put into its document."""

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from m2d.artifacts import write_text
from m2d.report.plot_style import COLOURS, INK, MARKERS, new_figure, plain_log, save

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Curve = list[dict[str, float]]


def values(seeds: list[dict[str, Any]], name: str, key: str) -> list[float]:
    return [seed[name][key] for seed in seeds if key in seed[name]]


def with_chosen_rate(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seeds with one `curve` and `rate` per distilled student in place of its `curves`.

    The rate is that of the lowest mean KL at the end, over the seeds.
    """
    chosen = {}
    for name, row in seeds[0].items():
        if "curves" in row:
            means = {
                rate: statistics.mean(seed[name]["curves"][rate][-1]["kl"] for seed in seeds)
                for rate in row["curves"]
            }
            chosen[name] = min(means, key=means.__getitem__)
    return [
        {
            name: row | {"curve": row["curves"][chosen[name]], "rate": chosen[name]}
            if name in chosen
            else row
            for name, row in seed.items()
        }
        for seed in seeds
    ]


def spread(numbers: list[float], digits: int = 1) -> str:
    """Mean and, of several, their standard deviation."""
    if not numbers:
        return "-"
    text = f"{statistics.mean(numbers):.{digits}f}"
    return text + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def tokens_to(curve: Curve, perplexity: float) -> float:
    """Distillation tokens after which a curve is at or below this; log-linear between points.

    Infinite where it never is.
    """
    for before, after in itertools.pairwise(curve):
        if before["perplexity"] <= perplexity:
            return before["tokens"]
        if after["perplexity"] <= perplexity:
            high, low = math.log(before["perplexity"]), math.log(after["perplexity"])
            share = (high - math.log(perplexity)) / (high - low)
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return curve[-1]["tokens"] if curve[-1]["perplexity"] <= perplexity else math.inf


def before_table(seeds: list[dict[str, Any]], reference: str) -> list[str]:
    """Perplexity before distillation, and what it took."""
    lines = [
        "| student | parameters | perplexity | refit, CPU seconds |",
        "|---|---:|---:|---:|",
    ]
    for name, row in seeds[0].items():
        perplexity = spread(values(seeds, name, "perplexity"))
        seconds = spread(values(seeds, name, "refit_seconds"))
        label = f"**{name}**" if name == reference else name
        lines.append(f"| {label} | {row['parameters']:,} | {perplexity} | {seconds} |")
    return lines


def curves_of(seeds: list[dict[str, Any]]) -> dict[str, list[Curve]]:
    """The curves of every distilled student, one a seed."""
    return {name: values(seeds, name, "curve") for name, row in seeds[0].items() if "curve" in row}  # type: ignore


def curve_table(seeds: list[dict[str, Any]]) -> list[str]:
    """Perplexity against distillation tokens."""
    curves = curves_of(seeds)
    tokens = [int(point["tokens"]) for point in next(iter(curves.values()))[0]]
    lines = [
        f"| student | learning rate | {' | '.join(f'{count:,}' for count in tokens)} |",
        "|---|" + "---:|" * (len(tokens) + 1),
    ]
    for name, found in curves.items():
        cells = [spread([curve[i]["perplexity"] for curve in found]) for i in range(len(tokens))]
        lines.append(f"| {name} | {seeds[0][name]['rate']} | {' | '.join(cells)} |")
    return lines


def share_table(seeds: list[dict[str, Any]], reference: str) -> list[str]:
    """The tokens that equal the reference after each budget, as a share of the budget."""
    curves = curves_of(seeds)
    goals = curves.pop(reference)
    budgets = range(1, len(goals[0]))
    heads = " | ".join(f"{int(goals[0][i]['tokens']):,}" for i in budgets)
    lines = [f"| student | {heads} |", "|---|" + "---:|" * len(budgets)]
    for name, found in curves.items():
        cells = []
        for i in budgets:
            shares = [
                tokens_to(curve, goal[i]["perplexity"]) / goal[i]["tokens"]
                for curve, goal in zip(found, goals, strict=True)
            ]
            cells.append("not reached" if math.inf in shares else spread(shares, 2))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def saving_table(seeds: list[dict[str, Any]], reference: str) -> list[str]:
    """Seconds of refit against the seconds of distillation that bring the reference as far."""
    lines = [
        "| student | refit, CPU seconds | as far by distilling: tokens | CPU seconds |",
        "|---|---:|---:|---:|",
    ]
    for name, row in seeds[0].items():
        if "refit_seconds" not in row or row["parameters"] != seeds[0][reference]["parameters"]:
            continue
        counts, seconds = [], []
        for seed in seeds:
            curve = seed[reference]["curve"]
            count = tokens_to(curve, seed[name]["perplexity"])
            counts.append(count)
            seconds.append(count * curve[-1]["seconds"] / curve[-1]["tokens"])
        taken = spread(values(seeds, name, "refit_seconds"))
        if math.inf in counts:
            lines.append(f"| {name} | {taken} | not reached | - |")
        else:
            mean = round(statistics.mean(counts))
            lines.append(f"| {name} | {taken} | {mean:,} | {spread(seconds)} |")
    return lines


def draw(found: dict[str, Any], folder: Path, name: str) -> None:
    """Perplexity against distillation tokens, every seed a thin line, their mean a thick one."""
    seeds = found["seeds"]
    figure, (axes,) = new_figure(height=3.8)
    distilled = [n for n in seeds[0] if "curve" in seeds[0][n]]
    first = min(p["tokens"] for p in seeds[0][distilled[0]]["curve"] if p["tokens"])
    for number, variant in enumerate(distilled):
        curves = values(seeds, variant, "curve")
        tokens = [max(point["tokens"], first / 2) for point in curves[0]]  # type: ignore
        for curve in curves:
            line = [point["perplexity"] for point in curve]  # type: ignore
            axes.plot(tokens, line, color=COLOURS[number], linewidth=0.6, alpha=0.5)
        mean = [
            statistics.mean(curve[i]["perplexity"] for curve in curves)  # type: ignore
            for i in range(len(tokens))
        ]
        look = {"color": COLOURS[number], "marker": MARKERS[number]}
        axes.plot(tokens, mean, label=variant, **look)
    axes.axhline(
        found["teacher_perplexity"], color=INK, linestyle="--", linewidth=1, label="teacher"
    )
    axes.set_xscale("log", base=2)
    ticks = [max(point["tokens"], first / 2) for point in seeds[0][distilled[0]]["curve"]]
    labels = [f"{point['tokens']:,}" for point in seeds[0][distilled[0]]["curve"]]
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    plain_log(axes, "y")
    axes.set_xlabel("distillation tokens")
    axes.set_ylabel("perplexity")
    axes.legend()
    save(figure, folder, name)


def text_of(found: dict[str, Any], image: str) -> str:
    """What stands between the document's markers."""
    seeds, settings = found["seeds"], found["settings"]
    reference = next(iter(seeds[0]))
    calibration = settings["calibration_sequences"] * settings["length"]
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    parts = [
        f"Teacher's perplexity: {found['teacher_perplexity']:.2f}. Mean ± standard deviation of "
        f"{len(seeds)} seeds; {calibration:,} calibration tokens, "
        f"{settings['test_sequences'] * settings['length']:,} test tokens; distillation by forward "
        f"KL, AdamW, {settings['batch'] * settings['length']:,} tokens a step, at that learning "
        f"rate of {rates} which gives the student the lowest KL over the last quarter of the "
        "steps. Seconds are CPU seconds, of all threads together.\n",
        "Before distillation:\n",
        "\n".join(before_table(seeds, reference)) + "\n",
        "Perplexity after so many distillation tokens:\n",
        "\n".join(curve_table(seeds)) + "\n",
        f"Tokens after which a student equals *{reference}* after so many, as a share of these (0: "
        "before any):\n",
        "\n".join(share_table(seeds, reference)) + "\n",
        f"![Perplexity against distillation tokens]({image})\n",
        f"Time spent on refit, and what *{reference}* needs to come as far by distillation:\n",
        "\n".join(saving_table(seeds, reference)) + "\n",
    ]
    return "\n".join(parts)


def write_report(measured: Path, document: Path) -> None:
    """Put the measurements' tables between the document's markers, and the figure beside it."""
    found = json.loads(measured.read_text(encoding="utf-8"))
    found["seeds"] = with_chosen_rate(found["seeds"])
    name = document.stem
    draw(found, document.parent, name)
    text = document.read_text(encoding="utf-8") if document.exists() else f"{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    write_text(document, f"{head}{BEGIN}\n{text_of(found, f'{name}.svg')}{END}{tail}")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]), Path(sys.argv[2]))
