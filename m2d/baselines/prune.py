"""Structured pruning of a dense teacher: the dense-to-dense baseline (D2D).

One streamed calibration pass measures what every layer, channel, head and neuron does; the most
important ones stay (m2d/baselines/importance.py). The student is then written tensor by tensor,
so that a teacher of any size passes through little memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2d.artifacts import require_absent, sha256_of
from m2d.baselines.dense import (
    KEYS,
    head_dim,
    open_dense,
    pruned_config,
    pruned_skeleton,
    pruned_tensors,
    shape_of,
)
from m2d.baselines.importance import Importance, Shape, check_shape, choose_cut
from m2d.devices import compute_dtype, dtype_name, pick_device
from m2d.errors import UserError
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import Teacher, count_parameters
from m2d.options import add_compute_options, positive
from m2d.progress import say
from m2d.students.merge import about_models, write_folder
from m2d.tokens.files import read_token_notes, read_tokens


def sums_over_tokens(values: Tensor) -> Tensor:
    """sum_t |values| of [B, T, N]: float64 [N]. A sequence at a time, since N may be large."""
    total = torch.zeros(values.shape[-1], dtype=torch.float64, device=values.device)
    for row in values:
        total += row.float().abs().sum(0).double()
    return total


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """Sum over tokens of 1 - cosine of [B, T, H] and [B, T, H], float64."""
    cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return (1 - cosine.double()).sum()


def measure_importance(stream: StreamedTeacher, tokens: Tensor, batch: int) -> Importance:
    """Importances of a dense model's parts, from one pass of tokens [S, T]."""
    teacher = stream.teacher
    shape, size = shape_of(teacher), head_dim(teacher)
    layers = torch.zeros(shape.layers, dtype=torch.float64)
    hidden = torch.zeros(shape.hidden_size, dtype=torch.float64)
    heads = torch.zeros(shape.layers, shape.heads, dtype=torch.float64)
    neurons = torch.zeros(shape.layers, shape.intermediate_size, dtype=torch.float64)

    def watch(index: int, layer: nn.Module) -> list[Any]:
        def whole(_: nn.Module, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            layers[index] += cosine_distance(args[0], after).cpu()

        def norm(_: nn.Module, args: Any, output: Tensor) -> None:
            hidden.add_(sums_over_tokens(output).cpu())

        def attention(_: nn.Module, args: Any) -> None:
            norms = args[0].unflatten(-1, (shape.heads, size)).float().norm(dim=-1)
            heads[index] += sums_over_tokens(norms).cpu()

        def inner(_: nn.Module, args: Any) -> None:
            neurons[index] += sums_over_tokens(args[0]).cpu()

        part = layer.get_submodule
        return [
            layer.register_forward_hook(whole),
            part("input_layernorm").register_forward_hook(norm),
            part("post_attention_layernorm").register_forward_hook(norm),
            part("self_attn.o_proj").register_forward_pre_hook(attention),
            part("mlp.down_proj").register_forward_pre_hook(inner),
        ]

    handles = [handle for i, layer in enumerate(stream.layers) for handle in watch(i, layer)]
    try:
        stream.run(tokens, batch, title="importances, layers")
    finally:
        for handle in handles:
            handle.remove()
    found = (total.numpy() / tokens.numel() for total in (layers, hidden, heads, neurons))
    return Importance(*found)


def prune(
    teacher: Teacher,
    out: Path,
    shape: Shape,
    calibration: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
) -> None:
    """Write the teacher pruned to `shape`, in its own dtype.

    dtype, device and batch are of the calibration pass.
    """
    tokens = read_tokens(calibration, teacher.config.vocab_size)
    importance = measure_importance(StreamedTeacher(teacher, dtype, device), tokens, batch)
    cut = choose_cut(importance, shape_of(teacher), shape)
    raw = pruned_config(teacher, shape, cut.layers)
    skeleton = pruned_skeleton(teacher, raw)
    specs, read = pruned_tensors(teacher, cut, skeleton)
    record = about_models(teacher, skeleton).having(
        baseline={"kind": "d2d", **vars(shape), "of": vars(shape_of(teacher))},
        calibration={
            "source": read_token_notes(calibration).get("source"),
            "sequences": tokens.shape[0],
            "length": tokens.shape[1],
            "sha256": sha256_of(calibration),
            "compute_dtype": dtype_name(dtype),
        },
        dtype=dtype_name(teacher.dtype),
    )
    write_folder(out, teacher.folder, raw, specs, read, record, {"pruning.json": cut.to_dict()})


def wanted_shape(teacher: Teacher, args: argparse.Namespace) -> Shape:
    """The shape that the options ask for; the teacher's own sizes where they do not."""
    own = shape_of(teacher)
    shape = Shape(**{name: getattr(args, name) or getattr(own, name) for name in KEYS})
    check_shape(own, shape)
    return shape


def sizes(teacher: Teacher, shape: Shape) -> dict[str, Any]:
    """What pruning to `shape` would give, from the config alone."""
    student = pruned_skeleton(teacher, pruned_config(teacher, shape, list(range(shape.layers))))
    return {
        "teacher_parameters": count_parameters(teacher.skeleton),
        "architecture": teacher.family.student_architecture,
        **vars(shape),
        "head_dim": head_dim(teacher),
        "parameters": count_parameters(student),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id of a dense model")
    parser.add_argument("out", type=Path, nargs="?", help="the folder to write")
    parser.add_argument("--tokens", type=Path, help="token file from m2d tokenize")
    for name in KEYS:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, metavar="N", help="(default: the teacher's)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the sizes, from the config alone"
    )
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    teacher = open_dense(args.teacher, config_only=args.dry_run)
    shape = wanted_shape(teacher, args)
    facts = sizes(teacher, shape)
    if args.dry_run:
        print(json.dumps(facts, indent=1))
        return
    if args.out is None or args.tokens is None:
        raise UserError("give the folder to write and --tokens, or --dry-run for sizes alone")
    require_absent(args.out)
    device = pick_device(args.device)
    prune(
        teacher,
        args.out,
        shape,
        args.tokens,
        dtype=compute_dtype(args.dtype, teacher.dtype, device),
        device=device,
        batch=args.batch,
    )
    say(f"{args.out}: {facts['architecture']}, {facts['parameters']:,} parameters")
