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

BATCH = 16
CALIBRATION = 128  # sequences, of a pool three times as large


@dataclass(frozen=True)
class Student:
    """name: in tables. options: of `m2d.convert`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-3
    sequences: int = CALIBRATION


GREEDY = {"granularity": "neurons", "choice": "greedy", "refit": "sequential"}
STUDENTS = {
    "do-acp": Student("DO-ACP (the paper's best)", {}, 2e-3),
    "greedy": Student("greedy neurons, refit", GREEDY),
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
        chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        tokens = out.with_suffix(".safetensors")
        tokens.parent.mkdir(exist_ok=True)
        save_file({"input_ids": pool[chosen[: student.sequences]]}, tokens)
        start = time.process_time()
        convert(args.teacher, out, tokens=tokens, batch=BATCH, dtype="float32", **student.options)
        cost.write_text(json.dumps({"seconds": time.process_time() - start}))
    return out, json.loads(cost.read_text())
