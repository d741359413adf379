"""The tables and the figure of benchmarks/beyond.py, put into docs/beyond.md.

python benchmarks/beyond_report.py WORK [--second WORK2 --second-teacher FOLDER]
"""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from beyond_cost import Cost, count
from beyond_students import STUDENTS

from m2d.artifacts import write_text
from m2d.models.teacher import open_teacher
from m2d.report.plot_style import COLOURS, INK, MARKERS, new_figure, plain_log, save

BEGIN, END = "<!-- beyond: begin -->", "<!-- beyond: end -->"
REFERENCE = "do-acp"
Row = dict[str, Any]
TITLES = ("Perplexity", "KL", "KL, the cost of the student counted")
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


def costs(teacher: Path, rows: list[Row]) -> dict[str, Cost]:
    """What each student takes, in operations."""
    opened = open_teacher(teacher)
    sizes = {row["student"]: row["parameters"] for row in rows}
    return {n: count(opened, STUDENTS[n], sizes[n]) for n in STUDENTS if n in sizes}


def cost_table(rows: list[Row], cost: dict[str, Cost]) -> list[str]:
    """Operations of making and of distilling each student, and CPU seconds where they were timed
    on one thread.
    """
    heads = ["parameters", "choosing", "refit", "align", "distilling 65,536", "327,680 tokens",
             "CPU seconds: making it", "distilling 65,536", "327,680 tokens"]  # fmt: skip
    lines = ["| student | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
    for name, one in cost.items():
        own = [row for row in rows if row["student"] == name]
        parts = (one.choosing, one.refit, one.align, 65536 * one.token, 327680 * one.token)
        cells = [f"{own[0]['parameters']:,}", *(f"{x / 1e12:.2f}" if x else "" for x in parts)]
        timed = [row for row in own if row.get("device", "cpu") == "cpu"]
        cells.append(spread([r["cost"]["seconds"] for r in timed if r["tokens"] == 0], 0))
        cells += [spread([r["seconds"] for r in timed if r["tokens"] == b], 0)
                  for b in (65536, 327680)]  # fmt: skip
        lines.append(f"| {STUDENTS[name].name} | " + " | ".join(cells) + " |")
    return lines


def all_in_table(rows: list[Row], cost: dict[str, Cost]) -> list[str]:
    """KL after so many operations, all that a student takes counted."""
    goals = [1e12, 2e12, 5e12, 9e12]
    lines = ["| student | " + " | ".join(f"{goal / 1e12:g}" for goal in goals) + " |"]
    lines.append("|---" + "|---:" * len(goals) + "|")
    for name, one in cost.items():
        curve = sorted(
            (one.after(tokens), statistics.mean(values))
            for tokens, values in by_student(rows, "kl")[name].items()
        )
        cells = [interpolated(curve, goal) for goal in goals]
        text = ("" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"| {STUDENTS[name].name} | " + " | ".join(text) + " |")
    return lines


def interpolated(curve: list[tuple[float, float]], at: float) -> float | None:
    """A curve's value, log-linear between its points; None outside of them."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if before <= at <= after:
            share = math.log(at / before) / math.log(after / before)
            return math.exp((1 - share) * math.log(high) + share * math.log(low))
    return None


BEST = "both"
PAPER_AFTER = (
    28.0  # perplexity of the paper's student after 327,680 tokens, by the paper's settings
)


def targets(rows: list[Row], tasks: list[Row]) -> list[str]:
    """What issue 16 asks for, and whether it is met."""
    perplexity, kl = by_student(rows, "perplexity"), by_student(rows, "kl")
    best, kls, theirs = perplexity[BEST], kl[BEST], kl[REFERENCE]
    lines = ["| target, three seeds | measured | |", "|---|---:|---|"]

    def add(target: str, measured: str, met: bool) -> None:
        lines.append(f"| {target} | {measured} | {'met' if met else '**missed**'} |")

    for budget, most in ((0, 29.0), (327680, 22.2)):
        found = best.get(budget, [])
        if found:
            add(f"perplexity after {budget:,} tokens at most {most}", spread(found, 1),
                max(found) <= most)  # fmt: skip
    small = statistics.mean(perplexity[REFERENCE][327680])
    for text, goal in (
        (f"{PAPER_AFTER} (the paper's after 327,680 tokens, 16 sequences a step)", PAPER_AFTER),
        (f"{small:.1f} (the same with the smaller steps of this table)", small),
    ):  # fmt: skip
        needed = tokens_for(best, goal)
        if needed is not None:
            share = needed / 327680
            add(f"perplexity {text} with a tenth of the tokens", f"{share:.2f}", share <= 0.1)
    for budget in (65536, 131072, 327680):
        goal = statistics.mean(theirs[budget])
        needed = tokens_for(kls, goal)
        if needed is not None:
            add(f"the paper's KL after {budget:,} tokens with a quarter of them",
                f"{needed / budget:.2f}", needed <= 0.25 * budget)  # fmt: skip
    for budget in sorted({row["tokens"] for row in tasks}):
        ours, other = (
            [r for r in tasks if r["student"] == name and r["tokens"] == budget]
            for name in (BEST, REFERENCE)
        )
        if ours and other:
            means = [statistics.mean(r["accuracy"] for r in part) for part in (ours, other)]
            texts = [f"{100 * mean:.1f}" for mean in means]
            error = 100 * statistics.mean(r["stderr"] for r in ours + other)
            add(f"tasks after {budget:,} tokens at least the paper's, percent",
                f"{texts[0]} beside {texts[1]} (± {error:.1f} each)",
                means[0] >= means[1])  # fmt: skip
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


def draw(rows: list[Row], cost: dict[str, Cost], folder: Path) -> None:
    """Perplexity and KL against distillation tokens, 0 at the left of the log axis, and KL against
    operations, those of making the student counted.
    """
    figure, axes = new_figure(1, 3, width=15, height=4.4)
    budgets = sorted({row["tokens"] for row in rows})
    zero = min(b for b in budgets if b) / 2.5
    for axis, key, title in zip(axes, ("perplexity", "kl", "kl"), TITLES, strict=True):
        for i, (name, student) in enumerate(STUDENTS.items()):
            curve = by_student(rows, key).get(name)
            if not curve:
                continue
            points = sorted((b, statistics.mean(v)) for b, v in curve.items())
            across = [cost[name].after(b) if axis is axes[2] else b or zero for b, _ in points]
            axis.plot(
                across, [value for _, value in points], label=student.name,
                color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5,
                linewidth=1.4,
            )  # fmt: skip
        axis.set_xscale("log")
        if axis is axes[2]:
            axis.set_xticks([3e11, 1e12, 3e12, 1e13], ["0.3", "1", "3", "10"])
        else:
            labels = [f"{b // 1000}k" if b else "0" for b in budgets]
            axis.set_xticks([b or zero for b in budgets], labels)
        axis.minorticks_off()
        across = "10\u00b9\u00b2 operations" if axis is axes[2] else "distillation tokens"
        axis.set_xlabel(across, color=INK)
        axis.set_title(title, color=INK, loc="left")
        plain_log(axis, "y")
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in TICKS[key] if low <= tick <= high])
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, folder, "beyond")


def section(rows: list[Row], tasks: list[Row], cost: dict[str, Cost], first: bool) -> list[str]:
    """Everything about one teacher. Students of fewer seeds than others were not finished."""
    lines = ["Perplexity after so many distillation tokens:", "", *table(rows, "perplexity", 1), ""]
    lines += ["KL(teacher || student), nats a token:", "", *table(rows, "kl", 3), ""]
    if len({row["tokens"] for row in rows if row["student"] == REFERENCE}) > 1:
        name = STUDENTS[REFERENCE].name
        lines += [f"Tokens to the KL of *{name}* after so many, as a share of these:", ""]
        lines += [*share_table(rows), ""]
    found = task_table(tasks)
    if found:
        lines += [
            "Accuracy in percent, mean of the three demo tasks (chance: 25), ± the standard error "
            "over the questions, which all students share:", "", *found, "",
        ]  # fmt: skip
    lines += ["Cost, in 10¹² operations (`benchmarks/beyond_cost.py` counts them from the sizes)"]
    lines[-1] += " and in CPU seconds of one thread:"
    lines += ["", *cost_table(rows, cost), ""]
    if not first:
        return lines
    lines += ["KL after so many 10¹² operations, all of these counted:", ""]
    return [*lines, *all_in_table(rows, cost), "", *targets(rows, tasks), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("workflow/resources/demo-teacher"))
    parser.add_argument("--second", type=Path, help="the work folder of the second teacher")
    parser.add_argument("--second-teacher", type=Path)
    parser.add_argument("--document", type=Path, default=Path("docs/beyond.md"))
    args = parser.parse_args()
    rows, tasks = own_rates(read_rows(args.work)), read_rows(args.work, "tasks.jsonl")
    cost = costs(args.teacher, rows)
    draw(rows, cost, args.document.parent)
    lines = ["### On the demo teacher", "", *section(rows, tasks, cost, True)]
    lines += ["![Perplexity and KL against distillation tokens, and KL against operations]"]
    lines[-1] += "(beyond.svg)"
    kept = {"demo": rows, "tasks": tasks}
    if args.second:
        more = own_rates(read_rows(args.second))
        cost = costs(args.second_teacher, more)
        lines += ["", "### On a second teacher", "", *section(more, [], cost, False)]
        kept["second"] = more
    write_text(args.document.with_suffix(".json"), json.dumps(kept, indent=0) + "\n")
    text = args.document.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    body = "\n".join(lines).rstrip()
    write_text(args.document, f"{before}{BEGIN}\n{body}\n{END}{after}")


if __name__ == "__main__":
    main()
