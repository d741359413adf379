"""A made-up run's result files, for tests of tables and figures (no model, no workflow)."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from m2d.choose.grouping import GROUPINGS
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS

TEACHER = "demo-teacher"
KEEPS = (4, 8, 16, 24, 32)
TASKS = {"demo_continuation": "acc_norm", "demo_package": "acc"}
LAYERS, EXPERTS = 4, 32


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def perplexity_of(scoring: str, grouping: str, scaling: str, keep: int) -> float:
    """A made-up effect of each axis; K = 4 leaves nothing to group."""
    value = 2.9 + 0.12 * SCORINGS.paper[::-1].index(scoring)
    value += 0.15 * KEEPS.index(keep) + 0.08 * SCALINGS.paper.index(scaling)
    return float(np.exp(value + (0.05 * GROUPINGS.paper.index(grouping) if keep > 4 else 0)))


def write_grid(folder: Path) -> list[Path]:
    files = []
    for scoring in SCORINGS.paper:
        rows = []
        for grouping, scaling, keep in itertools.product(GROUPINGS.paper, SCALINGS.paper, KEEPS):
            perplexity = perplexity_of(scoring, grouping, scaling, keep)
            plan = f"{scoring}-{scaling}-{keep}" + (f"-{grouping}" if keep > 4 else "")
            rows.append(
                {
                    "teacher": TEACHER,
                    "scoring": scoring,
                    "grouping": grouping,
                    "scaling": scaling,
                    "keep": keep,
                    "groups": 4,
                    "plan": plan,
                    "perplexity": perplexity,
                    "stderr": 0.02 * perplexity,
                    "nll": float(np.log(perplexity)),
                    "n_tokens": 10_000,
                    "seconds": 0.1,
                }
            )
        file = folder / TEACHER / "grid" / f"{scoring}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(file, index=False)
        files.append(file)
    return files


def evaluation(task: str, measure: str, value: float) -> dict:
    """The parts of lm-eval's results that matter."""
    error = (value * (1 - value) / 240) ** 0.5
    return {
        "results": {
            task: {
                "alias": task,
                "acc,none": value if measure == "acc" else value - 0.05,
                "acc_stderr,none": error,
                **(
                    {"acc_norm,none": value, "acc_norm_stderr,none": error}
                    if measure == "acc_norm"
                    else {}
                ),
            }
        },
        "n-shot": {task: 0},
        "config": {"model_num_parameters": 4_961_000, "model_dtype": "torch.float32"},
        "n-samples": {task: {"original": 240, "effective": 240}},
    }


def write_students(folder: Path) -> dict[str, list[Path]]:
    """The teacher, three students merged and distilled, and one refitted in between."""
    root = folder / TEACHER
    files: dict[str, list[Path]] = {"perplexity": [], "evaluation": [], "provenance": []}

    def variant(base: Path, name: str, perplexity: float, accuracy: float) -> None:
        file = base / ("perplexity.json" if name == "teacher" else f"{name}.perplexity.json")
        content = {"model": name, "perplexity": perplexity, "nll": 1.0, "n_tokens": 9000}
        content["stderr"] = 0.25
        files["perplexity"].append(write_json(file, content))
        for shift, (task, measure) in enumerate(TASKS.items()):
            content = evaluation(task, measure, accuracy + 0.05 * shift)
            files["evaluation"].append(write_json(base / f"{name}.eval" / f"{task}.json", content))

    variant(root, "teacher", 9.5, 0.8)
    for number, (scoring, keep) in enumerate(
        [("gld_reap", 4), ("selection_freq", 8), ("gld_reap", 16)]
    ):
        base = root / "students" / f"{scoring}-k{keep}"
        plan = {"scoring": scoring, "grouping": "round_robin", "scaling": "uniform"}
        provenance = {
            "teacher": {"name": TEACHER},
            "dtype": "bfloat16",
            "student": {"parameters": 2_000_000},
            "plan": {**plan, "keep": keep, "groups": 4},
        }
        files["provenance"].append(write_json(base / "merged" / "m2d.json", provenance))
        variant(base, "merged", 40.0 + 10 * number, 0.4)
        for recipe, top_k in (("short", 4), ("expanded", 8)):
            expanded = top_k if recipe == "expanded" else None
            distillation = {"tokens": 500_000, "steps": 100, "teacher_top_k": expanded}
            content = {**provenance, "distillation": distillation}
            files["provenance"].append(write_json(base / recipe / "m2d.json", content))
            variant(base, recipe, 14.0 + number + top_k / 8, 0.6 + top_k / 100)
            (base / recipe / "metrics.jsonl").write_text(metrics(number), encoding="utf-8")
    base = root / "students" / "solved"
    folded = [{"layer": i, "choice": "layer", "r2_before": 0.4, "r2_after": 0.6 + 0.1 * i}
              for i in range(2)]  # fmt: skip
    provenance = {**provenance, "fold": {"layers": folded}}
    refitted = {**provenance, "refit": {"variant": "layer"}}
    distilled = {**refitted, "distillation": {"tokens": 500_000, "steps": 100}}
    contents = {"merged": provenance, "refit": refitted, "short": distilled}
    for number, (name, content) in enumerate(contents.items()):
        files["provenance"].append(write_json(base / name / "m2d.json", content))
        variant(base, name, 50.0 - 15 * number, 0.4 + number / 10)
    return files


def metrics(seed: int) -> str:
    rng = random.Random(seed)
    lines = []
    for step in range(100):
        rate = 1e-3 * min(1.0, (step + 1) / 10, (100 - step) / 20)
        loss = 0.3 + 2.0 * np.exp(-step / 15) + rng.gauss(0, 0.03)
        lines.append(
            {
                "step": step,
                "tokens": step * 5000,
                "loss": loss,
                "lr": rate,
                "tokens_per_second": 9e3,
            }
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_statistics(folder: Path) -> tuple[Path, Path]:
    """statistics.parquet and gram.safetensors of the made-up teacher."""
    rng = np.random.default_rng(0)
    rows, tensors = [], {}
    for layer in range(LAYERS):
        share = rng.dirichlet(np.full(EXPERTS, 4.0))
        for expert in range(EXPERTS):
            selected = int(share[expert] * 4 * 10_000)
            rows.append({"layer": layer, "expert": expert, "n_tokens": 10_000})
            rows[-1] |= {"n_selected": selected, "prob_sum": share[expert] * 10_000}
        outputs = rng.normal(size=(EXPERTS, 64)) + 0.6 * rng.normal(size=64)
        tensors[f"layers.{layer}.gram"] = (outputs @ outputs.T).astype(np.float32)
    file = folder / TEACHER / "statistics.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(file, index=False)
    save_file(tensors, file.with_name("gram.safetensors"))
    return file, file.with_name("gram.safetensors")


def write_benchmarks(folder: Path) -> Path:
    jobs = [
        ("measure_grid", "t/a", 12.5),
        ("measure_grid", "t/b", 7.5),
        ("merge_student", f"{TEACHER}/solved", 3.0),
        ("refit_student", f"{TEACHER}/solved", 2.0),
        ("distill_student", f"{TEACHER}/solved/short", 5.0),
        ("measure_student", f"{TEACHER}/solved/short", 1.0),
        ("evaluate_student", f"{TEACHER}/solved/short/demo", 1.5),
        ("measure_teacher", TEACHER, 0.5),
    ]
    for rule, job, seconds in jobs:
        file = folder / "benchmarks" / rule / f"{job}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        header = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time"
        file.write_text(f"{header}\n{seconds}\t0:00:12\t512.5\t1\t1\t1\t0\t0\t90\t11\n")
    return folder / "benchmarks"
