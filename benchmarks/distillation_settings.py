"""Which settings of distillation suit which student: batch, learning rate and schedule.

Students of benchmarks/beyond.py are distilled with each combination, all seeds; every result is a
line of WORK/settings.jsonl, and what is there is not repeated. `--report` puts the table
into docs/distillation.md.

    python benchmarks/distillation_settings.py WORK --corpus CORPUS --students do-acp both
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from beyond import LENGTH, load_float32, measure, read_data, teacher_states, train
from beyond_students import STUDENTS, make_student
from torch import Tensor

from m2d.artifacts import write_text
from m2d.distill.heads import head_of
from m2d.models.teacher import quiet

WARM_UP = 1 / 8  # of the steps
SCHEDULES = {
    "last 30 % linear to 0": (0.3, 0.0),
    "last 10 % linear to a tenth": (0.1, 0.1),  # the paper's
    "cosine to 0": (0.0, 0.0),
}
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
Row = dict[str, Any]


def rate(schedule: str, top: float, steps: int, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    share, floor = SCHEDULES[schedule]
    left = (steps - step) / steps
    fall = 0.5 * (1 - math.cos(math.pi * left))
    if share:
        fall = floor + (1 - floor) * min(1.0, left / share)
    return top * min(fall, (step + 1) / max(1, WARM_UP * steps))


def run(
    student: Any, seed: int, how: Row, data: dict[str, Tensor], states: Any, teacher: Any
) -> Row:
    batch, steps = how["batch"], how["tokens"] // (how["batch"] * LENGTH)
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(seed))

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        rows = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        return data["train"][rows], states["train"][rows]

    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    seconds = train(
        student, optimizer, range(steps),
        lambda step: rate(how["schedule"], how["learning_rate"], steps, step),
        batch_of, head_of(teacher),
    )  # fmt: skip
    return {"seconds": seconds, **measure(student, teacher, states["test"], data["test"])}


def report(rows: list[Row]) -> list[str]:
    """KL by student, tokens and schedule (lines), and batch and learning rate (columns)."""
    columns = sorted({(r["batch"], r["learning_rate"]) for r in rows})
    heads = " | ".join(f"{batch} x {top:g}" for batch, top in columns)
    lines = [f"| student | tokens | schedule | {heads} |", "|---|---:|---" + "|---:" * len(columns)]
    lines[1] += "|"
    for name, tokens, schedule in itertools.product(
        STUDENTS, sorted({r["tokens"] for r in rows}), SCHEDULES
    ):
        own = [r for r in rows if (r["student"], r["tokens"], r["schedule"]) ==
               (name, tokens, schedule)]  # fmt: skip
        cells = []
        for column in columns:
            found = [r["kl"] for r in own if (r["batch"], r["learning_rate"]) == column]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "")
        if own:
            lines.append(f"| {STUDENTS[name].name} | {tokens:,} | {schedule} | "
                         + " | ".join(cells) + " |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="as of benchmarks/beyond.py")
    parser.add_argument("--teacher", type=Path, default=Path("workflow/resources/demo-teacher"))
    parser.add_argument("--corpus", type=Path, default=Path("results/corpus"))
    parser.add_argument("--students", nargs="+", default=["do-acp", "both"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--document", type=Path, default=Path("docs/distillation.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "settings.jsonl"
    rows = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    if args.report:
        text = args.document.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        body = "\n".join(report(rows))
        write_text(args.document, f"{before}{BEGIN}\n{body}\n{END}{after}")
        return
    done = [{k: v for k, v in r.items() if k not in ("seconds", "perplexity", "kl")} for r in rows]
    with quiet():
        data = read_data(args)
        teacher = load_float32(args.teacher)
        states = teacher_states(args, teacher, data)
        for seed, name, schedule, batch, top in itertools.product(
            args.seeds, args.students, args.schedules, args.batches, args.rates
        ):
            how = {
                "student": name, "seed": seed, "tokens": args.tokens, "schedule": schedule,
                "batch": batch, "learning_rate": top,
            }  # fmt: skip
            if how in done:
                continue
            folder, _ = make_student(args, name, seed, data["calibration"])
            found = run(load_float32(folder).train(), seed, how, data, states, teacher)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**how, **found}) + "\n")
            print(how | found, flush=True)


if __name__ == "__main__":
    main()
