"""The tables and the figure of benchmarks/beyond.py, put into docs/beyond.md.

python benchmarks/beyond_report.py WORK [--second WORK2]
"""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from beyond_students import CALIBRATION, STUDENTS

from m2d.artifacts import write_text
from m2d.report.plot_style import COLOURS, INK, MARKERS, new_figure, plain_log, save

BEGIN, END = "<!-- beyond: begin -->", "<!-- beyond: end -->"
REFERENCE = "do-acp"
Row = dict[str, Any]
TICKS = {
    "perplexity": (15, 20, 25, 30, 40, 50, 70, 100, 150, 200),
    "kl": (0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5),
}


def read_rows(work: Path, name: str = "results.jsonl") -> list[Row]:
    file = work / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def own_rates(rows: list[Row]) -> list[Row]:
    """The rows with each student's own settings, without trials of others."""
    return [
        row
        for row in rows
        if row["student"] in STUDENTS
        and row["learning_rate"] == STUDENTS[row["student"]].learning_rate
        and row["batch"] == 4
    ]


def spread(numbers: list[float], digits: int) -> str:
    """Mean and, of several, their standard deviation."""
    if not numbers:
        return ""
    text = f"{statistics.mean(numbers):.{digits}f}"
    return text + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def by_student(rows: list[Row], key: str) -> dict[str, dict[int, list[float]]]:
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["student"]][row["tokens"]].append(row[key])
    return found


def table(rows: list[Row], key: str, digits: int) -> list[str]:
    values = by_student(rows, key)
    budgets = sorted({row["tokens"] for row in rows})
    names = [name for name in STUDENTS if name in values]
    lines = ["| student | seeds | " + " | ".join(f"{b:,}" for b in budgets) + " |"]
    lines.append("|---" + "|---:" * (len(budgets) + 1) + "|")
    for name in names:
        seeds = max(map(len, values[name].values()))
        cells = " | ".join(spread(values[name].get(b, []), digits) for b in budgets)
        lines.append(f"| {STUDENTS[name].name} | {seeds} | {cells} |")
    return lines


def tokens_for(curve: dict[int, list[float]], goal: float) -> float | None:
    """Tokens at which a mean curve comes down to `goal`; log-linear between points, None beyond."""
    points = sorted((tokens, statistics.mean(values)) for tokens, values in curve.items())
    for (before, high), (after, low) in itertools.pairwise(points):
        if high <= goal:
            return before
        if low <= goal:
            share = (math.log(high) - math.log(goal)) / (math.log(high) - math.log(low))
            if before == 0:
                return share * after
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return points[-1][0] if points and points[-1][1] <= goal else None


def share_table(rows: list[Row]) -> list[str]:
    """Tokens to the reference's KL, as shares of the reference's."""
    curves = by_student(rows, "kl")
    budgets = [b for b in sorted(curves[REFERENCE]) if b]
    lines = ["| student | " + " | ".join(f"{b:,}" for b in budgets) + " |"]
    lines.append("|---" + "|---:" * len(budgets) + "|")
    for name in STUDENTS:
        if name == REFERENCE or name not in curves:
            continue
        cells = []
        for budget in budgets:
            goal = statistics.mean(curves[REFERENCE][budget])
            needed = tokens_for(curves[name], goal)
            cells.append("" if needed is None else f"{needed / budget:.2f}")
        lines.append(f"| {STUDENTS[name].name} | " + " | ".join(cells) + " |")
    return lines


def cost_table(rows: list[Row]) -> list[str]:
    """CPU seconds of making a student and of distilling it."""
    lines = ["| student | parameters | calibration tokens | making it | distillation, 65,536 |"]
    lines[0] += " 327,680 |"
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, student in STUDENTS.items():
        own = [row for row in rows if row["student"] == name]
        if not own:
            continue
        made = spread([r["cost"]["seconds"] for r in own if r["tokens"] == 0], 0)
        seconds = [spread([r["seconds"] for r in own if r["tokens"] == b], 0)
                   for b in (65536, 327680)]  # fmt: skip
        sizes = f"{own[0]['parameters']:,} | {max(CALIBRATION, student.aligned) * 256:,}"
        lines.append(f"| {student.name} | {sizes} | {made} | {' | '.join(seconds)} |")
    return lines


def task_table(rows: list[Row]) -> list[str]:
    """Mean accuracy over the three demo tasks, with its standard error over the questions."""
    if not rows:
        return []
    budgets = sorted({row["tokens"] for row in rows})
    lines = ["| student | seeds | " + " | ".join(f"{b:,}" for b in budgets) + " |"]
    lines.append("|---" + "|---:" * (len(budgets) + 1) + "|")
    for name in STUDENTS:
        own = [row for row in rows if row["student"] == name]
        if not own:
            continue
        cells, seeds = [], 0
        for budget in budgets:
            found = [row for row in own if row["tokens"] == budget]
            seeds = max(seeds, len(found))
            if found:
                mean = statistics.mean(row["accuracy"] for row in found)
                error = statistics.mean(row["stderr"] for row in found)
                cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
            else:
                cells.append("")
        lines.append(f"| {STUDENTS[name].name} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[Row], folder: Path) -> None:
    """Perplexity and KL against distillation tokens; 0 stands at the left of the log axis."""
    figure, axes = new_figure(1, 2, width=11, height=4.2)
    budgets = sorted({row["tokens"] for row in rows})
    zero = min(b for b in budgets if b) / 2.5
    for axis, key, title in zip(axes, ("perplexity", "kl"), ("Perplexity", "KL"), strict=True):
        for i, (name, student) in enumerate(STUDENTS.items()):
            curve = by_student(rows, key).get(name)
            if not curve:
                continue
            points = sorted((b or zero, statistics.mean(v)) for b, v in curve.items())
            axis.plot(
                *zip(*points, strict=True), label=student.name, color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.4,
            )  # fmt: skip
        axis.set_xscale("log")
        labels = [f"{b // 1000}k" if b else "0" for b in budgets]
        axis.set_xticks([b or zero for b in budgets], labels)
        axis.minorticks_off()
        axis.set_xlabel("distillation tokens", color=INK)
        axis.set_title(title, color=INK, loc="left")
        plain_log(axis, "y")
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in TICKS[key] if low <= tick <= high])
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, folder, "beyond")


def section(work: Path) -> list[str]:
    """Everything about one teacher. Students of fewer seeds than others were not finished."""
    rows = own_rates(read_rows(work))
    lines = ["Perplexity after so many distillation tokens:", "", *table(rows, "perplexity", 1), ""]
    lines += ["KL(teacher || student), nats a token:", "", *table(rows, "kl", 3), ""]
    if len({row["tokens"] for row in rows if row["student"] == REFERENCE}) > 1:
        name = STUDENTS[REFERENCE].name
        lines += [f"Tokens to the KL of *{name}* after so many, as a share of these:", ""]
        lines += [*share_table(rows), ""]
    tasks = task_table(read_rows(work, "tasks.jsonl"))
    if tasks:
        lines += [
            "Accuracy in percent, mean of the three demo tasks (chance: 25), ± the standard error "
            "over the questions:", "", *tasks, "",
        ]  # fmt: skip
    return [*lines, "CPU seconds of one thread:", "", *cost_table(rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--second", type=Path, help="the second teacher's")
    parser.add_argument("--document", type=Path, default=Path("docs/beyond.md"))
    args = parser.parse_args()
    draw(own_rates(read_rows(args.work)), args.document.parent)
    lines = ["### On the demo teacher", "", *section(args.work)]
    lines += ["![Perplexity and KL against distillation tokens](beyond.svg)", ""]
    if args.second:
        lines += ["### On a second teacher", "", *section(args.second)]
    kept = {"demo": read_rows(args.work), "tasks": read_rows(args.work, "tasks.jsonl")}
    if args.second:
        kept["second"] = read_rows(args.second)
    write_text(args.document.with_suffix(".json"), json.dumps(kept, indent=0) + "\n")
    text = args.document.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    body = "\n".join(lines).rstrip()
    write_text(args.document, f"{before}{BEGIN}\n{body}\n{END}{after}")


if __name__ == "__main__":
    main()
