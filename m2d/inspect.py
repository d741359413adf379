"""Facts of a teacher and its students, from the config alone: no weights, no tokenizer."""

import argparse
import json
from typing import Any

from m2d.models.teacher import (
    Teacher,
    count_parameters,
    dtype_of,
    has_experts,
    layers_of,
    locate,
    make_skeleton,
    open_teacher,
    read_config,
)
from m2d.options import positive
from m2d.statistics.gram import CHUNK_BYTES
from m2d.students.grid import paper_keeps
from m2d.students.tensors import build_student_skeleton, student_width
from m2d.students.widths import add_width_options, chosen_width

# The interpreter and its libraries.
BASE_BYTES = 600_000_000


def inspect(
    teacher: Teacher, sequences: int = 512, length: int = 2048, width: int | None = None
) -> dict[str, Any]:
    """Sizes of the teacher, its students, and a conversion with so many calibration tokens.

    width: of a student of single neurons, which gets a row with keep None.

    Bytes are of the checkpoint's dtype. Every student has as many groups as the router's top-k, so
    that `student_parameters` holds for every K in `students`.
    """
    item = teacher.dtype.itemsize
    layers = [count_parameters(layer) for layer in layers_of(teacher.skeleton)]
    total = count_parameters(teacher.skeleton)
    expert = parameters_of_expert(teacher)
    idle = (teacher.num_experts - teacher.top_k) * expert * len(teacher.moe_layers)
    keeps = paper_keeps(teacher.top_k, teacher.num_experts)
    path = teacher.top_k * teacher.expert_width
    first = student_row(teacher, path, keeps[0])
    students = [first | {"keep": keep} for keep in keeps]
    if width is not None:
        students.append(student_row(teacher, width, None))
    activations = sequences * length * teacher.config.hidden_size * item
    trunk = total - sum(layers)
    return {
        "family": teacher.family.model_type,
        "num_layers": int(teacher.config.num_hidden_layers),
        "num_moe_layers": len(teacher.moe_layers),
        "num_experts": teacher.num_experts,
        "top_k": teacher.top_k,
        "expert_width": teacher.expert_width,
        "shared_width": teacher.shared_width,
        "hidden_size": int(teacher.config.hidden_size),
        "vocab_size": int(teacher.config.vocab_size),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "teacher_parameters": total,
        "active_parameters": total - idle,
        "expert_parameters": expert,
        "layer_parameters": max(layers),
        "trunk_parameters": trunk,
        "student_architecture": teacher.family.student_architecture,
        "student_parameters": students[0]["parameters"],
        "students": students,
        "conversion": {
            "calibration_tokens": sequences * length,
            "read_bytes": total * item + students[0]["parameters"] * item,
            "write_bytes": students[0]["parameters"] * item,
            "memory_bytes": BASE_BYTES
            + (2 * max(layers) + trunk) * item
            + activations
            + 2 * CHUNK_BYTES,
        },
    }


def inspect_dense(model: str) -> dict[str, Any]:
    """Sizes of a dense model, such as one whose layers are to be pruned: the same keys, fewer."""
    folder = locate(model, config_only=True)
    _, config = read_config(folder)
    skeleton = make_skeleton(config, folder)
    layers = [count_parameters(layer) for layer in layers_of(skeleton)]
    total = count_parameters(skeleton)
    return {
        "family": config.model_type,
        "num_layers": len(layers),
        "hidden_size": int(config.hidden_size),
        "head_dim": int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ),
        "vocab_size": int(config.vocab_size),
        "dtype": str(dtype_of(config, folder)).removeprefix("torch."),
        "teacher_parameters": total,
        "active_parameters": total,
        "layer_parameters": max(layers),
        "trunk_parameters": total - sum(layers),
    }


def parameters_of_expert(teacher: Teacher) -> int:
    """Parameters of one routed expert; packed ones, on the meta device, are counted unpacked."""
    layer = layers_of(teacher.skeleton)[teacher.moe_layers[0]]
    experts = count_parameters(layer.get_submodule(teacher.family.experts))
    return experts // (teacher.num_experts + teacher.shared_in_experts)


def student_row(teacher: Teacher, width: int, keep: int | None) -> dict[str, Any]:
    """One line of `students`. keep: None for single neurons, which form no k groups."""
    _, skeleton = build_student_skeleton(teacher, width)
    return {
        "keep": keep,
        "groups": teacher.top_k if keep else None,
        "intermediate_size": student_width(teacher, width),
        "parameters": count_parameters(skeleton),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same, to read."""
    if "students" not in facts:
        return "\n".join(f"{key.replace('_', ' '):20} {value}" for key, value in facts.items())
    work = facts["conversion"]
    lines = [
        f"family               {facts['family']}",
        f"layers               {facts['num_layers']}, {facts['num_moe_layers']} with experts",
        f"experts              {facts['num_experts']} of width {facts['expert_width']}, "
        f"top-{facts['top_k']}" + shared_text(facts["shared_width"]),
        f"teacher parameters   {facts['teacher_parameters']:,}",
        f"student              {facts['student_architecture']}",
        "     K  groups  intermediate size   parameters",
        *(
            f"  {row['keep'] or '-':>4}  {row['groups'] or '-':>6}  {row['intermediate_size']:17d}"
            f"   {row['parameters']:,}"
            for row in facts["students"]
        ),
        f"a conversion with {work['calibration_tokens']:,} calibration tokens",
        f"  reads              {size(work['read_bytes'])} (the teacher, the kept experts again)",
        f"  writes             {size(work['write_bytes'])}",
        f"  needs in memory    {size(work['memory_bytes'])} (two layers, activations, a chunk)",
    ]
    return "\n".join(lines)


def shared_text(width: int) -> str:
    """What a dense student's FFN has besides its groups."""
    return f"; shared experts of width {width}" if width else ""


def size(count: float) -> str:
    """Bytes to read: 61.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder, config.json or hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sequences", type=positive, default=512, help="of calibration")
    parser.add_argument("--length", type=positive, default=2048, help="tokens each")
    add_width_options(parser)


def main(args: argparse.Namespace) -> None:
    if has_experts(args.teacher):
        teacher = open_teacher(args.teacher, config_only=True)
        asked = args.width is not None or args.params is not None
        width = None
        if asked:
            width = chosen_width(teacher, args.width, args.params, args.multiple)
        facts = inspect(teacher, args.sequences, args.length, width)
    else:
        facts = inspect_dense(args.teacher)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))
