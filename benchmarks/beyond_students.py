"""The students of benchmarks/beyond.py: how each is made, once per seed, and what that costs."""

import argparse
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from m2d.conversion import convert
from m2d.models.teacher import open_teacher

BATCH = 16
CALIBRATION = 128  # sequences, of the first POOL of the calibration tokens
POOL = 384


@dataclass(frozen=True)
class Student:
    """name: in tables. options: of `m2d.convert`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-3
    sequences: int = CALIBRATION
    widths: int = 1
    """Times the width of the teacher's active path."""


GREEDY = {"granularity": "neurons", "choice": "greedy", "refit": "sequential"}
FOLD = {"fold": "neuron"}
ALIGN = {"align": 160}
STUDENTS = {
    "do-acp": Student("DO-ACP (the paper's best)", {}, 2e-3),
    "do-acp-fold": Student("DO-ACP + fold + refit", {"refit": "sequential", **FOLD}),
    "greedy": Student("greedy neurons + refit", GREEDY),
    "fold": Student("greedy + refit + fold", {**GREEDY, **FOLD}),
    "align": Student("greedy + refit + align", {**GREEDY, **ALIGN}, sequences=384),
    "both": Student("greedy + refit + fold + align", {**GREEDY, **FOLD, **ALIGN}, sequences=384),
    "wide": Student(
        "twice the width: fold + align", {**GREEDY, **FOLD, **ALIGN}, sequences=384, widths=2
    ),
}


def make_student(
    args: argparse.Namespace, name: str, seed: int, pool: Tensor
) -> tuple[Path, dict[str, float]]:
    """The student's folder, and the CPU seconds that it took."""
    student = STUDENTS[name]
    out = args.work / "students" / f"{name}-{seed}"
    cost = out.with_suffix(".json")
    if not cost.exists():
        shutil.rmtree(out, ignore_errors=True)
        # The first CALIBRATION sequences are the same for all students of a seed.
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(POOL, generator=generator)[:CALIBRATION]
        more = POOL + torch.randperm(len(pool) - POOL, generator=generator)
        chosen = torch.cat([chosen, more])[: student.sequences]
        tokens = out.with_suffix(".safetensors")
        tokens.parent.mkdir(exist_ok=True)
        save_file({"input_ids": pool[chosen]}, tokens)
        options: dict[str, Any] = {"tokens": tokens, "batch": BATCH, "dtype": "float32"}
        if student.widths > 1:
            teacher = open_teacher(args.teacher)
            options["width"] = student.widths * teacher.top_k * teacher.expert_width
        start = time.process_time()
        convert(args.teacher, out, **options, **student.options)
        cost.write_text(json.dumps({"seconds": time.process_time() - start}))
    return out, json.loads(cost.read_text())
