"""The demo's three tasks for students that benchmarks/beyond.py has distilled.

python benchmarks/beyond_tasks.py WORK TASKS --students do-acp both --budgets 0 65536 327680
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from beyond import load_float32
from beyond_students import STUDENTS

from m2d.evaluate.lm_eval import evaluate
from m2d.models.teacher import quiet
from m2d.students.files import WRITTEN_ANEW, copy_others

TASKS = ("demo_continuation", "demo_package", "demo_parameter")


def accuracy(folder: Path, tasks: Path, limit: int) -> dict[str, float]:
    """Mean accuracy over the tasks, and its standard error over the questions."""
    found = evaluate(
        str(folder), TASKS, shots=0, include=tasks, limit=limit, batch_size="32", device="cpu"
    )
    scores = []
    for task in TASKS:
        score = found[task]["results"][task]
        key = "acc_norm" if "acc_norm,none" in score else "acc"
        scores.append((score[f"{key},none"], score[f"{key}_stderr,none"]))
    error = math.sqrt(sum(e**2 for _, e in scores)) / len(scores)
    own = {task: score[0] for task, score in zip(TASKS, scores, strict=True)}
    return {"accuracy": sum(s for s, _ in scores) / len(scores), "stderr": error, **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("tasks", type=Path, help="from m2d demo tasks")
    parser.add_argument("--students", nargs="+", default=["do-acp", "both"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=int, default=[0, 65536, 327680])
    parser.add_argument("--limit", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = args.work / "tasks.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(r["student"], r["seed"], r["tokens"]) for r in map(json.loads, lines)}
    for seed in args.seeds:
        for budget in args.budgets:
            for name in args.students:
                rate = STUDENTS[name].learning_rate
                state = args.work / "kept" / f"{name}-{seed}-{rate:g}-4-{budget}.pt"
                if (name, seed, budget) in done or not state.exists():
                    continue
                student = args.work / "students" / f"{name}-{seed}"
                with quiet(), tempfile.TemporaryDirectory() as scratch:
                    model = load_float32(student)
                    model.load_state_dict(torch.load(state, weights_only=True))
                    model.save_pretrained(scratch)
                    copy_others(student, Path(scratch), (*WRITTEN_ANEW, "plan.json", "m2d.json"))
                    found = accuracy(Path(scratch), args.tasks, args.limit)
                row = {"student": name, "seed": seed, "tokens": budget, **found}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
