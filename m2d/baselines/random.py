"""Baselines with new weights: a student's architecture, its FFNs or all of it untrained.

`random_ffn` keeps the teacher's attention, norms and embeddings, so that what the experts are worth
shows; `random_init` keeps nothing, so that what the teacher's weights are worth shows.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from m2d.artifacts import require_absent
from m2d.baselines.fresh import fresh_tensor
from m2d.choose.plan import Plan
from m2d.devices import dtype_name, pick_dtype
from m2d.models.checkpoint import Checkpoint, Spec
from m2d.models.families import Family
from m2d.models.student import build_student_skeleton, stored_shapes
from m2d.models.teacher import Teacher, count_parameters, open_teacher
from m2d.options import DTYPES, add_student_options, seed
from m2d.progress import say
from m2d.students.merge import about_models, write_folder
from m2d.students.tensors import StudentTensors

KINDS = ("random_ffn", "random_init")


def feed_forward(family: Family) -> re.Pattern[str]:
    """Matches the names of a student's parameters below its FFNs, but for a router."""
    block = family.block if family.student_experts else family.dense
    layer = re.escape(f"{family.student_layers or family.layers}.") + r"\d+\."
    router = re.escape(f"{family.router}.") if family.student_experts else "(?!)"
    return re.compile(f"{layer}(?!{router}){re.escape(block)}\\..+")


def student_tensors(
    teacher: Teacher, skeleton: PreTrainedModel, kind: str, seed: int
) -> Callable[[str], Tensor]:
    """name -> tensor of the student: the teacher's, or a new one."""
    fresh_names = feed_forward(teacher.family).fullmatch

    def fresh(name: str) -> Tensor:
        return fresh_tensor(skeleton, name, seed)

    if kind == "random_init":
        return fresh
    tensors = StudentTensors(teacher.family, Checkpoint(teacher.folder), skeleton)
    nothing = Plan("", "", "", 0, ())
    return lambda name: fresh(name) if fresh_names(name) else tensors.make(name, nothing)


def write_baseline(teacher: Teacher, out: Path, kind: str, seed: int, dtype: str | None) -> int:
    """Write the student's folder, in the teacher's dtype by default; returns its parameters.

    Its sizes are those of a student of whole experts: FFNs as wide as the router's top-k.
    """
    raw, skeleton = build_student_skeleton(teacher, teacher.top_k * teacher.expert_width)
    assert isinstance(skeleton, PreTrainedModel)
    chosen = pick_dtype(dtype, teacher.dtype)
    named = dtype_name(chosen)
    raw = {k: v for k, v in raw.items() if k != "torch_dtype"} | {"dtype": named}
    specs: dict[str, Spec] = {n: (chosen, shape) for n, shape in stored_shapes(skeleton).items()}
    make = student_tensors(teacher, skeleton, kind, seed)
    record = about_models(teacher, skeleton).having(
        baseline={"kind": kind, "seed": seed},
        dtype=named,
    )
    write_folder(out, teacher.folder, raw, specs, lambda n: make(n).to(chosen), record, {})
    return count_parameters(skeleton)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id of a Mixture-of-Experts model")
    parser.add_argument("out", type=Path, help="the folder to write")
    add_student_options(parser)
    parser.add_argument("--kind", choices=KINDS, required=True, help="what is new")
    parser.add_argument("--seed", type=seed, default=0, help="of the new weights (0)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the student (default: as on disk)")


def main(args: argparse.Namespace) -> None:
    require_absent(args.out)
    teacher = open_teacher(args.teacher, student_class=args.student_class, text_only=args.text_only)
    parameters = write_baseline(teacher, args.out, args.kind, args.seed, args.dtype)
    say(f"{args.out}: {teacher.family.student_architecture}, {parameters:,} parameters")
