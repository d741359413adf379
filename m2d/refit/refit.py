"""Refit: a student's down projections anew by ridge regression on calibration tokens.

Not of the paper. Only the down projections (and their biases) change; the student keeps its
architecture and size. docs/beyond.md has the mathematics and what it is worth.
Shapes: B sequences of T tokens, N = B T, H hidden size, W the student's intermediate size.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m2d.artifacts import require_absent, sha256_of
from m2d.devices import dtype_name
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint
from m2d.models.digests import weight_digests
from m2d.models.families import Family
from m2d.models.resume import Arrays, Kept, identity, remove_kept
from m2d.models.teacher import Teacher, locate, open_teacher
from m2d.options import add_compute_options
from m2d.progress import say
from m2d.refit.halves import (
    Halves,
    SteppedModel,
    StudentFeedForward,
    block_path,
    check_halves,
    check_sum,
    kept_layers,
    open_student,
    residual_multiplier,
    run_halves,
)
from m2d.refit.ridge import RIDGES, refit_down, squared_error
from m2d.refit.splits import HELD_OUT_EVERY, held_out_sequences
from m2d.statistics.moments import Moments
from m2d.students.rewrite import FeedForward, rewrite_student
from m2d.tokens.calibration import calibration

VARIANTS = ("layer", "sequential")
WEIGHTINGS = ("equal", "relative")


@dataclass(frozen=True)
class LayerReport:
    """What a refit did to one layer; errors are mean squared ones per token."""

    layer: int
    ridge: float | None
    """None where no ridge improved on the held-out tokens; the layer is then as it was."""
    target: float
    """Mean squared norm of what the FFN should put out."""
    before: float
    """Error on all calibration tokens before."""
    after: float
    held_out_before: float
    """Error on the held-out sequences before, and with the ridge fitted on the others."""
    held_out_after: float


@dataclass(frozen=True)
class Refitted:
    """New down projections by layer: [W (+ 1), H], the last row the bias where there is one."""

    rows: dict[int, Tensor]
    layers: list[LayerReport]

    def state(self, layer: int) -> Arrays:
        """A layer's rows and report (m2d.models.resume.Results)."""
        (report,) = (one for one in self.layers if one.layer == layer)
        written = np.frombuffer(json.dumps(asdict(report)).encode(), np.uint8)
        return {"rows": self.rows[layer].cpu().contiguous().numpy(), "report": written}

    def restore(self, layer: int, state: Arrays) -> None:
        """The layer as `state` gave it."""
        self.rows[layer] = torch.from_numpy(state["rows"])
        self.layers.append(LayerReport(**json.loads(state["report"].tobytes())))


@torch.no_grad()
def refit(
    teacher: Teacher,
    student_folder: Path,
    tokens: Tensor,
    variant: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    ridges: Sequence[float] = RIDGES,
    held_out_every: int = HELD_OUT_EVERY,
    weighting: str = "equal",
    keep: Callable[["Refitted"], Kept["Refitted"]] | None = None,
) -> Refitted:
    """Solve the down projection of every converted layer, one layer after the other.

    tokens [sequences, length]; variant: "layer" fits the teacher's block on the teacher's own
    inputs; "sequential" fits, on the student's own stream, what brings its residual stream to the
    teacher's. weighting: "equal" counts every token alike; "relative" divides its error by the
    squared norm of the teacher's residual stream after the layer (weights of mean 1), since the
    next norm sees errors relative to that. dtype: of both models' computation. keep: where the
    finished layers are kept, to go on after a kill.
    Memory: one layer of each model, W^2 float64 numbers a few times, and hidden states of every
    token (one of the teacher's; for "sequential" three more).
    Raises UserError where student and teacher do not belong together, or tokens are too few.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown refit {variant!r}; known: {', '.join(VARIANTS)}")
    if weighting not in WEIGHTINGS:
        raise UserError(f"unknown weighting {weighting!r}; known: {', '.join(WEIGHTINGS)}")
    if len(tokens) < 2:
        raise UserError("refit needs at least 2 sequences: some to fit, some to hold out")
    opened = open_student(student_folder, teacher)
    disk = student_dtype(opened)
    source = SteppedModel(teacher, dtype, device)
    target = SteppedModel(opened, dtype, device)
    source.start(tokens, batch)
    if variant == "sequential":
        target.start(tokens, batch)
    held_out = held_out_sequences(len(tokens), held_out_every).split(batch)
    found = Refitted({}, [])
    streams = [source, target] if variant == "sequential" else [source]
    for index in kept_layers(keep and keep(found), source, streams, f"refit ({variant}), layers"):
        converted = index in teacher.moe_layers
        theirs = source.load(index)
        ours = target.load(index) if converted or variant == "sequential" else None
        if converted:
            assert ours is not None
            known = found.rows.get(index)  # of an earlier run
            found.rows[index], report = refit_layer(
                source, theirs, target, ours, index, held_out, disk,
                sequential=variant == "sequential", relative=weighting == "relative",
                ridges=ridges, check=not found.layers, known=known,
            )  # fmt: skip
            if report is not None:
                found.layers.append(report)
        else:
            source.advance(theirs, index)
            if ours is not None:
                target.advance(ours, index)
        source.drop(theirs)
        if ours is not None:
            target.drop(ours)
    return found


def refit_layer(
    source: SteppedModel,
    theirs: nn.Module,
    target: SteppedModel,
    ours: nn.Module,
    index: int,
    held_out: Sequence[Tensor],
    disk: torch.dtype,
    *,
    sequential: bool,
    relative: bool,
    ridges: Sequence[float],
    check: bool,
    known: Tensor | None = None,
) -> tuple[Tensor, LayerReport | None]:
    """The layer's rows, as `disk` rounds them; the streams then have passed it.

    known: rows that were found before; then there is no report.
    """
    feed_forward = StudentFeedForward(ours, source.teacher.family)
    fitting = Fitting(feed_forward, held_out) if known is None else None
    caught: list[Halves] = []
    for i in range(len(source.hidden)):
        expected = teacher_half(source, theirs, index, i, check)
        root = token_weights(source.hidden[i]).sqrt() if relative else None
        if sequential:
            halves = run_halves(target, ours, feed_forward.block, index, i)
            # r_T + m y_T is where the teacher's stream goes on; m times what the FFN puts out,
            # and r_S, must add up to it.
            drift = wide(expected.residual) - wide(halves.residual)
            wanted = wide(expected.block_output) + drift / residual_multiplier(ours)
            if fitting is not None:
                fitting.add(i, wanted - wide(halves.block_output), root)
            halves.block_output = halves.block_output[:0]
            caught.append(halves)
        elif fitting is not None:
            base = feed_forward.base(expected.block_input)
            fitting.add(i, wide(expected.block_output) - wide(base), root)
    rows, report = (known, None) if fitting is None else fitting.solve(index, ridges, disk)
    assert rows is not None
    feed_forward.replace(rows, disk)
    for i, halves in enumerate(caught):
        out = feed_forward.output(halves.block_input)
        target.hidden[i] = halves.residual + residual_multiplier(ours) * out
    return rows, report


def teacher_half(source: SteppedModel, layer: nn.Module, index: int, i: int, check: bool) -> Halves:
    """Halves of the teacher's layer on batch i, whose hidden states then have passed the layer."""
    block = layer.get_submodule(block_path(source.teacher.family))
    call = source.call(index, i)  # before the layer hands on to the next one
    halves = run_halves(source, layer, block, index, i)
    if check and i == 0:
        check_halves(layer, halves, source.hidden[i], call, source.teacher.name)
        if source.teacher.family.student_experts:
            check_sum(layer, source.teacher.family, source.hidden[i], call, source.teacher.name)
    source.hidden[i] = halves.residual + residual_multiplier(layer) * halves.block_output
    return halves


@torch.no_grad()
def require_halves(
    teacher: Teacher, tokens: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises UserError where the teacher's layers do not just add an FFN to the residual stream.

    By its first layer with experts, on the first of tokens [sequences, length].
    """
    model, first = SteppedModel(teacher, dtype, device), teacher.moe_layers[0]
    model.start(tokens[:1], 1)
    model.advance_to(first)
    teacher_half(model, model.load(first), first, 0, check=True)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def token_weights(stream: Tensor) -> Tensor:
    """Weights [B, T, 1] of mean 1, inverse to the squared norms of the stream [B, T, H]."""
    weights = 1.0 / wide(stream).square().sum(-1, keepdim=True)
    return weights / weights.mean()


class Fitting:
    """Moments of one layer, batch by batch, apart for the held-out sequences."""

    def __init__(self, feed_forward: StudentFeedForward, held_out: Sequence[Tensor]):
        self.feed_forward, self.held_out = feed_forward, held_out
        self.rows = feed_forward.rows().double()
        sizes = (*self.rows.shape, self.rows.device)
        self.parts = (Moments.zero(*sizes), Moments.zero(*sizes))  # to fit, held out

    def add(self, i: int, wanted: Tensor, root: Tensor | None = None) -> None:
        """The FFN's last call, of batch i, should have put out `wanted` [B, T, H].

        root [B, T, 1]: square roots of the tokens' weights, 1 if None.
        """
        columns = self.feed_forward.columns().view(*wanted.shape[:2], -1)
        if root is not None:
            columns, wanted = wide(columns) * root, wanted * root
        for part, chosen in zip(self.parts, (~self.held_out[i], self.held_out[i]), strict=True):
            if chosen.any():
                where = chosen.to(columns.device)
                part.add(columns[where].flatten(0, 1), wanted[where].flatten(0, 1))

    def solve(
        self, index: int, ridges: Sequence[float], disk: torch.dtype
    ) -> tuple[Tensor, LayerReport]:
        """The rows, as `disk` rounds them, and the report."""
        fit, held_out = self.parts
        free = 0 if self.feed_forward.bias is None else 1
        found, choice = refit_down(fit, held_out, self.rows, ridges, free)
        both = fit + held_out
        before = squared_error(both, self.rows)
        found = found.to(disk).double()
        after = squared_error(both, found)
        if not after < before:  # rounding took what there was to gain
            found, after = self.rows, before
        target = float(both.yty / both.n_tokens)
        errors = (before, after, choice.before, choice.after)
        return found, LayerReport(index, choice.ridge, target, *errors)


def student_dtype(student: Teacher) -> torch.dtype:
    """The dtype of the student's first converted layer on disk."""
    return student.dtype


def down_parts(rows: Tensor, biases: bool) -> dict[str, Tensor]:
    """A down projection's tensors of its rows [W (+ 1), H], the last one a bias if there is one."""
    if biases:
        return {"down_proj.weight": rows[:-1].T, "down_proj.bias": rows[-1]}
    return {"down_proj.weight": rows.T}


def write_refitted(
    student_folder: Path, out: str | Path, family: Family, found: Refitted, record: dict[str, Any]
) -> Path:
    """Write the student's folder anew with its new down projections; all else is copied.

    record: the "refit" section of m2d.json.
    """
    checkpoint = Checkpoint(student_folder)
    template = family.down_proj if family.student_experts else family.dense_down_proj
    layers: dict[int, FeedForward] = {}
    for layer, rows in found.rows.items():
        name = template.format(layer=layer, expert=0).removesuffix("weight") + "bias"
        layers[layer] = down_parts(rows, name in checkpoint)
    return rewrite_student(student_folder, out, family, layers, refit=record)


def refit_record(
    variant: str, tokens: Tensor, found: Refitted, dtype: torch.dtype, weighting: str = "equal"
) -> dict[str, Any]:
    """What m2d.json says of a refit."""
    return {
        "variant": variant,
        "weighting": weighting,
        "sequences": tokens.shape[0],
        "length": tokens.shape[1],
        "dtype": dtype_name(dtype),
        "layers": [asdict(layer) for layer in found.layers],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", type=Path, help="the student's folder")
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--tokens", required=True, help="token file from m2d tokenize")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="sequential",
        help="layer: on the teacher's inputs; sequential: on the student's own (sequential)",
    )
    parser.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        default="equal",
        help="of tokens; relative: by the size of the teacher's residual stream (equal)",
    )
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    require_absent(args.out)
    folder = locate(args.student)
    teacher = open_teacher(args.teacher, student=args.student)
    tokens, dtype, device = calibration(args, teacher)
    made_from = weight_digests(folder)
    what = identity(teacher.folder, tokens, args.batch, dtype) | {
        "refit": args.variant, "weighting": args.weighting, "student": made_from,
    }  # fmt: skip
    found = refit(
        teacher, folder, tokens, args.variant, weighting=args.weighting,
        dtype=dtype, device=device, batch=args.batch,
        keep=lambda found: Kept(args.out, found, what),
    )  # fmt: skip
    record = refit_record(args.variant, tokens, found, dtype, args.weighting)
    record["upstream_sha256"] = {"calibration": sha256_of(args.tokens), "student": made_from}
    write_refitted(folder, args.out, teacher.family, found, record)
    remove_kept(args.out)
    for layer in found.layers:
        say(describe(layer))


def describe(layer: LayerReport) -> str:
    """One line on a layer."""
    ridge = "kept as it was" if layer.ridge is None else f"ridge {layer.ridge:g}"
    before, after = (value / layer.target for value in (layer.before, layer.after))
    return f"layer {layer.layer}: squared error {before:.3f} -> {after:.3f} of the target, {ridge}"
