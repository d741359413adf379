"""Facts of a teacher and its students, from the config alone: no weights, no tokenizer."""

import argparse
import json
from typing import Any

from m2d.choose.plan import paper_keeps
from m2d.devices import CHUNK_BYTES, dtype_name
from m2d.errors import UserError
from m2d.footprint import as_lines, footprint, size
from m2d.models.skeleton import reached_by_text, text_key
from m2d.models.student import build_student_skeleton, stored_shapes, student_width
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
from m2d.models.widths import add_width_options, chosen_width
from m2d.options import add_student_options, positive

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
    idle += total - count_parameters(reached_by_text(teacher.skeleton))
    keeps = paper_keeps(teacher.top_k, teacher.num_experts)
    path = teacher.top_k * teacher.expert_width
    first, student = student_row(teacher, path, keeps[0])
    students = [first | {"keep": keep} for keep in keeps]
    if width is not None:
        row, student = student_row(teacher, width, None)
        students.append(row)
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
        "dtype": dtype_name(teacher.dtype),
        "teacher_parameters": total,
        "active_parameters": total - idle,
        "expert_parameters": expert,
        "layer_parameters": max(layers),
        "trunk_parameters": trunk,
        "student_architecture": teacher.family.student_architecture,
        "approximated": teacher.family.approximated,
        "left_out": teacher.family.left_out,
        "student_parameters": students[0]["parameters"],
        "students": students,
        "footprint": footprint(
            stored_shapes(teacher.skeleton, whole=True), teacher.config, total - idle
        ),
        "student_footprint": student,
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
    _, whole = read_config(folder)
    config = whole.get_text_config()
    skeleton = make_skeleton(whole, folder)
    layers = [count_parameters(layer) for layer in layers_of(skeleton)]
    total = count_parameters(skeleton)
    return {
        "family": whole.model_type,
        "num_layers": len(layers),
        "hidden_size": int(config.hidden_size),
        "head_dim": int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ),
        "num_heads": int(config.num_attention_heads),
        "num_kv_heads": int(
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        ),
        "vocab_size": int(config.vocab_size),
        "dtype": dtype_name(dtype_of(whole, folder)),
        "teacher_parameters": total,
        "active_parameters": total,
        "layer_parameters": max(layers),
        "trunk_parameters": total - sum(layers),
        "footprint": footprint(stored_shapes(skeleton, whole=True), config, total),
    }


def parameters_of_expert(teacher: Teacher) -> int:
    """Parameters of one routed expert; packed ones, on the meta device, are counted unpacked."""
    layer = layers_of(teacher.skeleton)[teacher.moe_layers[0]]
    experts = count_parameters(layer.get_submodule(teacher.family.experts))
    return experts // (teacher.num_experts + teacher.shared_in_experts)


def student_row(
    teacher: Teacher, width: int, keep: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One line of `students`, and the student's footprint.

    keep: None for single neurons, which form no k groups.
    """
    _, skeleton = build_student_skeleton(teacher, width)
    count = count_parameters(skeleton)
    row = {
        "keep": keep,
        "groups": teacher.top_k if keep else None,
        "intermediate_size": student_width(teacher, width),
        "parameters": count,
    }
    config = skeleton.config.get_text_config()
    return row, footprint(stored_shapes(skeleton, whole=True), config, count)


def as_text(facts: dict[str, Any]) -> str:
    """The same, to read."""
    if "students" not in facts:
        plain = {key: value for key, value in facts.items() if key != "footprint"}
        lines = [f"{key.replace('_', ' '):20} {value}" for key, value in plain.items()]
        return "\n".join([*lines, *as_lines(facts["footprint"], "to serve")])
    work = facts["conversion"]
    lines = [
        f"family               {facts['family']}",
        f"layers               {facts['num_layers']}, {facts['num_moe_layers']} with experts",
        f"experts              {facts['num_experts']} of width {facts['expert_width']}, "
        f"top-{facts['top_k']}" + shared_text(facts["shared_width"]),
        f"teacher parameters   {facts['teacher_parameters']:,}",
        f"student              {facts['student_architecture']}"
        + (f" (approximated: {facts['approximated']})" if facts["approximated"] else "")
        + (f" ({facts['left_out']})" if facts["left_out"] else ""),
        "     K  groups  intermediate size   parameters",
        *(
            f"  {row['keep'] or '-':>4}  {row['groups'] or '-':>6}  {row['intermediate_size']:17d}"
            f"   {row['parameters']:,}"
            for row in facts["students"]
        ),
        *text_lines(facts.get("text_student")),
        *as_lines(facts["footprint"], "to serve the teacher"),
        *as_lines(facts["student_footprint"], "to serve the student"),
        f"a conversion with {work['calibration_tokens']:,} calibration tokens",
        f"  reads              {size(work['read_bytes'])} (the teacher, the kept experts again)",
        f"  writes             {size(work['write_bytes'])}",
        f"  needs in memory    {size(work['memory_bytes'])} (two layers, activations, a chunk)",
    ]
    return "\n".join(lines)


def text_lines(facts: dict[str, Any] | None) -> list[str]:
    """What there is to say of the text student."""
    if not facts or not facts.get("architecture"):
        return []
    about = f"{facts['architecture']}, {facts['parameters']:,} parameters"
    return [f"  with --text-only   {about}"]


def text_student(model: str) -> dict[str, Any]:
    """Class and parameters of a composite teacher's student with --text-only."""
    try:
        teacher = open_teacher(model, True, text_only=True)
    except UserError as error:
        return {"architecture": None, "reason": str(error)}
    row, _ = student_row(teacher, teacher.top_k * teacher.expert_width, teacher.top_k)
    return {
        "architecture": teacher.family.student_architecture,
        "parameters": row["parameters"],
        "intermediate_size": row["intermediate_size"],
    }


def shared_text(width: int) -> str:
    """What a dense student's FFN has besides its groups."""
    return f"; shared experts of width {width}" if width else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder, config.json or hub id")
    add_student_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sequences", type=positive, default=512, help="of calibration")
    parser.add_argument("--length", type=positive, default=2048, help="tokens each")
    add_width_options(parser)


def main(args: argparse.Namespace) -> None:
    if has_experts(args.teacher):
        teacher = open_teacher(args.teacher, True, args.student_class, args.text_only)
        asked = args.width is not None or args.params is not None
        width = None
        if asked:
            width = chosen_width(teacher, args.width, args.params, args.multiple)
        facts = inspect(teacher, args.sequences, args.length, width)
        if text_key(teacher.skeleton.config) is not None and not teacher.family.text_only:
            facts["text_student"] = text_student(args.teacher)
    else:
        facts = inspect_dense(args.teacher)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))
