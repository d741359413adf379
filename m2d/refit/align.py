"""Align: every FFN of a student trained on the student's own stream, before end-to-end
distillation.

Not of the paper. Layer by layer, gate, up and down (and their biases) are trained so that the
student's residual stream after the layer comes to the teacher's, and the down projection is then
refitted in closed form. All else stays. docs/beyond.md has the mathematics and what it is worth.
Shapes: B sequences of T tokens, N tokens, H hidden size, W the student's intermediate size.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m2d.artifacts import require_absent, sha256_of
from m2d.devices import dtype_name
from m2d.errors import UserError
from m2d.models.digests import weight_digests
from m2d.models.resume import Arrays, Kept, identity, remove_kept
from m2d.models.teacher import Teacher, locate, open_teacher
from m2d.options import above_zero, add_compute_options, positive
from m2d.progress import say
from m2d.refit.halves import (
    SteppedModel,
    kept_layers,
    open_student,
    residual_multiplier,
    run_halves,
    student_block_path,
)
from m2d.refit.refit import student_dtype, teacher_half, wide
from m2d.refit.splits import HELD_OUT_EVERY, held_out_sequences
from m2d.refit.training import OPTIMISERS, AlignSettings, Examples, fit_block, load_parts
from m2d.students.rewrite import rewrite_student
from m2d.tokens.calibration import calibration


@dataclass(frozen=True)
class AlignReport:
    """What alignment did to one layer: relative errors on the held-out tokens, |z_S - z_T|^2 /
    |z_T|^2 of the residual stream after the layer.
    """

    layer: int
    before: float
    trained: float
    """After the training alone."""
    after: float
    kept: bool
    """Whether the trained layer was taken; if not, the layer is at most refitted."""


@dataclass(frozen=True)
class Aligned:
    """New FFN tensors by layer, as `rewrite_student` takes them."""

    layers: dict[int, dict[str, Tensor]]
    reports: list[AlignReport]
    dtype: torch.dtype
    """Of the tensors."""

    def state(self, layer: int) -> Arrays:
        """A layer's tensors and report (m2d.models.resume.Results)."""
        (report,) = (one for one in self.reports if one.layer == layer)
        written = np.frombuffer(json.dumps(asdict(report)).encode(), np.uint8)
        parts = {name: wide(part).numpy() for name, part in self.layers[layer].items()}
        return {**parts, "report": written}

    def restore(self, layer: int, state: Arrays) -> None:
        """The layer as `state` gave it."""
        parts = {name: torch.from_numpy(value) for name, value in state.items() if name != "report"}
        self.layers[layer] = {name: part.to(self.dtype) for name, part in parts.items()}
        self.reports.append(AlignReport(**json.loads(state["report"].tobytes())))


def align(
    teacher: Teacher,
    student_folder: Path,
    tokens: Tensor,
    settings: AlignSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    keep: Callable[[Aligned], Kept[Aligned]] | None = None,
    held_out_every: int = HELD_OUT_EVERY,
) -> Aligned:
    """Train and refit the FFN of every converted layer, one layer after the other.

    tokens [sequences, length]; every n-th sequence is held out, and no layer is changed to what is
    worse on these. dtype: of both models' computation; the trained weights are float32 until they
    are rounded to the student's dtype. work: a folder to keep finished layers in; those that are
    there are not done again. Memory: one layer of each model, the student's FFN four times in
    float32, and hidden states of every token (one of the teacher's, four of the student's). Raises
    UserError where student and teacher do not belong together, or tokens are too few.
    """
    if len(tokens) < 2:
        raise UserError("align needs at least 2 sequences: some to fit, some to hold out")
    opened = open_student(student_folder, teacher)
    disk = student_dtype(opened)
    source = SteppedModel(teacher, dtype, device)
    target = SteppedModel(opened, dtype, device)
    with torch.no_grad():
        source.start(tokens, batch)
        target.start(tokens, batch)
    held_out = held_out_sequences(len(tokens), held_out_every)
    found = Aligned({}, [], disk)
    streams = [source, target]
    for index in kept_layers(keep and keep(found), source, streams, "align, layers"):
        theirs, ours = source.load(index), target.load(index)
        known = found.layers.get(index)  # of an earlier run
        if index in teacher.moe_layers and known is None:
            found.layers[index], report = align_layer(
                source, theirs, target, ours, index, held_out, settings, disk, not found.reports
            )
            found.reports.append(report)
            say(describe(report))
        else:
            if known is not None:
                block = ours.get_submodule(student_block_path(teacher.family))
                load_parts(block, teacher.family, known)
            with torch.no_grad():
                source.advance(theirs, index)
                target.advance(ours, index)
        source.drop(theirs)
        target.drop(ours)
    return found


def align_layer(
    source: SteppedModel,
    theirs: nn.Module,
    target: SteppedModel,
    ours: nn.Module,
    index: int,
    held_out: Tensor,
    settings: AlignSettings,
    disk: torch.dtype,
    check: bool,
) -> tuple[dict[str, Tensor], AlignReport]:
    """The layer's new tensors, as `disk` rounds them; both models' streams then have passed it."""
    family = source.teacher.family
    block = ours.get_submodule(student_block_path(family))
    factor = residual_multiplier(ours)
    residuals, inputs, wanted, weights = [], [], [], []
    with torch.no_grad():
        for i in range(len(source.hidden)):
            teacher_half(source, theirs, index, i, check)
            halves = run_halves(target, ours, block, index, i)
            residuals.append(halves.residual)
            inputs.append(halves.block_input)
            wanted.append((wide(source.hidden[i]) - wide(halves.residual)).to(source.dtype))
            weights.append(1 / wide(source.hidden[i]).square().sum(-1, keepdim=True))
    examples = Examples(
        torch.cat([x.flatten(0, 1) for x in inputs]),
        torch.cat([x.flatten(0, 1) for x in wanted]),
        torch.cat([x.flatten(0, 1) for x in weights]),
        held_out.repeat_interleave(inputs[0].shape[1]).to(inputs[0].device),
    )
    parts, errors = fit_block(block, family, examples, settings, factor, disk)
    del examples, wanted, weights
    with torch.no_grad():
        for i, residual in enumerate(residuals):
            output = block(inputs[i])
            output = output[0] if isinstance(output, tuple) else output
            target.hidden[i] = residual + factor * output
    return parts, AlignReport(index, *errors)


def describe(report: AlignReport) -> str:
    """One line on a layer."""
    note = "" if report.kept else ", training not kept"
    return (
        f"layer {report.layer}: relative error {report.before:.4f} -> {report.after:.4f} "
        f"(held-out{note})"
    )


def align_student(
    teacher: Teacher,
    student_folder: Path,
    out: str | Path,
    tokens: Tensor,
    settings: AlignSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    calibration_sha256: str | None = None,
) -> Path:
    """`align`, and the folder written. Finished layers are kept beside it until then.

    calibration_sha256: of the token file, where the record is to say what the student came from.
    """
    require_absent(out)
    made_from = weight_digests(student_folder)
    what = identity(teacher.folder, tokens, batch, dtype) | {
        "align": asdict(settings), "student": made_from,
    }  # fmt: skip
    found = align(
        teacher, student_folder, tokens, settings, dtype=dtype, device=device, batch=batch,
        keep=lambda found: Kept(out, found, what),
    )  # fmt: skip
    section: dict[str, Any] = {
        **asdict(settings),
        "sequences": tokens.shape[0],
        "length": tokens.shape[1],
        "dtype": dtype_name(dtype),
        "layers": [asdict(report) for report in found.reports],
    }
    if calibration_sha256 is not None:
        section["upstream_sha256"] = {"calibration": calibration_sha256, "student": made_from}
    written = rewrite_student(student_folder, out, teacher.family, found.layers, align=section)
    remove_kept(out)
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = AlignSettings()
    parser.add_argument("student", type=Path, help="the student's folder")
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--tokens", required=True, help="token file from m2d tokenize")
    add_align_options(parser, default)
    add_compute_options(parser)


def add_align_options(parser: argparse.ArgumentParser, default: AlignSettings) -> None:
    """How each layer is trained."""
    parser.add_argument("--steps", type=positive, default=default.steps, help="(%(default)s)")
    parser.add_argument(
        "--step-tokens", type=positive, default=default.tokens, help="of a step (%(default)s)"
    )
    parser.add_argument(
        "--learning-rate",
        type=above_zero,
        default=default.learning_rate,
        help="an update's size as a share of the weights' (%(default)s)",
    )
    parser.add_argument(
        "--optimiser", choices=OPTIMISERS, default=default.optimiser, help="(%(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    require_absent(args.out)
    settings = AlignSettings(args.steps, args.step_tokens, args.learning_rate, args.optimiser)
    folder = locate(args.student)
    teacher = open_teacher(args.teacher, student=args.student)
    tokens, dtype, device = calibration(args, teacher)
    align_student(
        teacher, folder, args.out, tokens, settings, dtype=dtype, device=device, batch=args.batch,
        calibration_sha256=sha256_of(args.tokens),
    )  # fmt: skip
    say(f"{args.out}: aligned")
