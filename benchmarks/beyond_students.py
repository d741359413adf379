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
from m2d.refit.align import AlignSettings, align_student

BATCH = 16
CALIBRATION = 128  # sequences, of the first POOL of the calibration tokens
POOL = 384


@dataclass(frozen=True)
class Student:
    """name: in tables. options: of `m2d.convert`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-3
    aligned: int = 0
    """Sequences of alignment, those of calibration among them; 0 for none."""
    widths: int = 1
    """Times the width of the teacher's active path."""


GREEDY = {"granularity": "neurons", "choice": "greedy", "refit": "sequential"}
FOLD = {"fold": "neuron"}
STEPS = 160  # of alignment
STUDENTS = {
    "do-acp": Student("DO-ACP (the paper's best)", {}, 2e-3),
    "do-acp-fold": Student("DO-ACP + fold + refit", {"refit": "sequential", **FOLD}),
    "greedy": Student("greedy neurons + refit", GREEDY),
    "fold": Student("greedy + refit + fold", {**GREEDY, **FOLD}),
    "align": Student("greedy + refit + align", GREEDY, aligned=384),
    "both": Student("greedy + refit + fold + align", {**GREEDY, **FOLD}, aligned=384),
    "wide": Student("twice the width: fold + align", {**GREEDY, **FOLD}, aligned=384, widths=2),
}


def make_student(
    args: argparse.Namespace, name: str, seed: int, pool: Tensor
) -> tuple[Path, dict[str, float]]:
    """The student's folder, and the CPU seconds that it took: in all, and of alignment."""
    student = STUDENTS[name]
    out = args.work / "students" / f"{name}-{seed}"
    cost = out.with_suffix(".json")
    if not cost.exists():
        # The first CALIBRATION sequences are the same for all students of a seed.
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(POOL, generator=generator)[:CALIBRATION]
        more = POOL + torch.randperm(len(pool) - POOL, generator=generator)
        tokens = pool[torch.cat([chosen, more])]
        first = args.work / "students" / f"{name}-{seed}-unaligned" if student.aligned else out
        seconds = convert_student(args, student, tokens[:CALIBRATION], first)
        aligning = 0.0
        if student.aligned:
            shutil.rmtree(out, ignore_errors=True)
            start = time.process_time()
            align_student(
                open_teacher(args.teacher), first, out, tokens[: student.aligned],
                AlignSettings(STEPS), dtype=torch.float32, device=torch.device("cpu"), batch=BATCH,
            )  # fmt: skip
            aligning = time.process_time() - start
        cost.write_text(json.dumps({"seconds": seconds + aligning, "align": aligning}))
    return out, json.loads(cost.read_text())


def convert_student(args: argparse.Namespace, student: Student, tokens: Tensor, out: Path) -> float:
    """Make the student but for its alignment; CPU seconds."""
    shutil.rmtree(out, ignore_errors=True)
    file = out.with_suffix(".safetensors")
    file.parent.mkdir(exist_ok=True)
    save_file({"input_ids": tokens.contiguous()}, file)
    options: dict[str, Any] = {"tokens": file, "batch": BATCH, "dtype": "float32"}
    if student.widths > 1:
        teacher = open_teacher(args.teacher)
        options["width"] = student.widths * teacher.top_k * teacher.expert_width
    start = time.process_time()
    convert(args.teacher, out, **options, **student.options)
    return time.process_time() - start
