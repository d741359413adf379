"""Align: every FFN of a student trained on the student's own stream, before end-to-end
distillation.

Not of the paper. Layer by layer, gate, up and down (and their biases) are trained so that the
student's residual stream after the layer comes to the teacher's, and the down projection is then
refitted in closed form. All else stays. docs/beyond.md has the mathematics and what it is worth.
Shapes: B sequences of T tokens, N tokens, H hidden size, W the student's intermediate size.
"""

import argparse
import copy
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from m2d.artifacts import atomic_path, require_absent, sha256_of, write_json
from m2d.devices import compute_dtype, pick_device
from m2d.errors import UserError
from m2d.models.checkpoint import shard_files
from m2d.models.experts import StackedExperts
from m2d.models.families import Family
from m2d.models.teacher import Teacher, locate, open_teacher
from m2d.options import above_zero, add_compute_options, positive
from m2d.progress import progress, say
from m2d.refit.halves import (
    SteppedModel,
    StudentFeedForward,
    block_path,
    open_student,
    residual_multiplier,
    run_halves,
)
from m2d.refit.muon import Muon
from m2d.refit.refit import Fitting, down_parts, student_dtype, teacher_half, wide
from m2d.refit.ridge import RIDGES
from m2d.refit.splits import HELD_OUT_EVERY, held_out_sequences
from m2d.students.rewrite import rewrite_student
from m2d.tokens.files import read_tokens

OPTIMISERS = ("muon", "adamw")
ORDER_SEED = 0


@dataclass(frozen=True)
class AlignSettings:
    """How each layer is trained."""

    steps: int = 120
    tokens: int = 4096
    """Tokens of a step."""
    learning_rate: float = 0.02
    """Root mean square of an update at its largest, as a share of that of the weights."""
    optimiser: str = "muon"
    warm_up: float = 0.05
    """Share of the steps."""
    last: float = 0.02
    """Share of the learning rate at the end of its linear fall."""

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            known = ", ".join(OPTIMISERS)
            raise UserError(f"unknown optimiser {self.optimiser!r}; known: {known}")
        if self.steps < 1 or self.tokens < 1 or not self.learning_rate > 0:
            raise UserError("align: steps, tokens and learning rate must be greater than 0")

    def rate(self, step: int) -> float:
        """Factor of the learning rate: linear warm-up, then linear fall."""
        warm = max(1.0, self.warm_up * self.steps)
        fall = 1 - (1 - self.last) * step / max(1, self.steps - 1)
        return min((step + 1) / warm, fall)


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


@dataclass(frozen=True)
class Examples:
    """What a layer's FFN is trained on: each [N, ...], and which tokens are held out."""

    inputs: Tensor
    """[N, H]: the block's input, in the computation's dtype."""
    wanted: Tensor
    """[N, H]: what it should put out, times m, so that the stream comes to the teacher's."""
    weights: Tensor
    """[N, 1]: inverse squared norms of the teacher's stream; float32."""
    held_out: Tensor
    """bool [N]."""


def feed_forward_parameters(block: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name within the block."""
    if not family.student_experts:
        return dict(block.named_parameters())
    name = family.experts.rpartition(".")[2]
    experts = block.get_submodule(name)
    return {f"{name}.{key}": value for key, value in experts.named_parameters()}


def feed_forward_parts(block: nn.Module, family: Family) -> dict[str, Tensor]:
    """The FFN's tensors under canonical names, [out, in] each."""
    if not family.student_experts:
        return {name: value.detach() for name, value in block.named_parameters()}
    experts = block.get_submodule(family.experts.rpartition(".")[2])
    assert isinstance(experts, StackedExperts)
    gate, up = experts.gate_up_proj[0].detach().chunk(2)
    parts = {"gate_proj.weight": gate, "up_proj.weight": up}
    parts["down_proj.weight"] = experts.down_proj[0].detach()
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        gate_bias, up_bias = experts.gate_up_bias[0].detach().chunk(2)
        parts |= {"gate_proj.bias": gate_bias, "up_proj.bias": up_bias}
        parts["down_proj.bias"] = experts.down_bias[0].detach()
    return parts


@torch.no_grad()
def load_parts(block: nn.Module, family: Family, parts: dict[str, Tensor]) -> None:
    """Put tensors into the block's FFN, in its own dtype and on its device."""
    for name, value in feed_forward_parts(block, family).items():
        value.copy_(parts[name])


def optimisers_for(
    parameters: dict[str, nn.Parameter], settings: AlignSettings
) -> list[torch.optim.Optimizer]:
    """Muon takes the matrices alone. Each parameter's rate is in proportion to the size of its
    numbers.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        size = float(parameter.detach().square().mean().sqrt()) or 1e-2
        group = {"params": [parameter], "size": size}
        if settings.optimiser == "muon" and name.endswith(("weight", "_proj")):
            matrices.append({**group, "scale": 1.0, "halves": 2 if "gate_up" in name else 1})
        else:
            others.append(group)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(Muon(matrices, settings.learning_rate))
    if others:
        rate = settings.learning_rate
        found.append(torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.0))
    return found


def train_block(
    block: nn.Module, family: Family, examples: Examples, settings: AlignSettings, multiplier: float
) -> nn.Module:
    """A float32 copy of the block, trained; products in the dtype of the examples' inputs."""
    dtype, device = examples.inputs.dtype, examples.inputs.device
    trained = copy.deepcopy(block).float().requires_grad_(False)
    parameters = feed_forward_parameters(trained, family)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimisers = optimisers_for(parameters, settings)
    fit = torch.nonzero(~examples.held_out)[:, 0]
    generator = torch.Generator().manual_seed(ORDER_SEED)
    order = torch.empty(0, dtype=torch.long)
    for step in range(settings.steps):
        while len(order) < min(settings.tokens, len(fit)):
            order = torch.cat([order, torch.randperm(len(fit), generator=generator)])
        rows = fit[order[: settings.tokens].to(fit.device)]
        order = order[settings.tokens :]
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = settings.learning_rate * group["size"] * settings.rate(step)
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2):
            found = block_output(trained, examples.inputs[rows].float())
        error = multiplier * found.float() - examples.wanted[rows].float()
        loss = (error.square().sum(-1, keepdim=True) * examples.weights[rows]).mean()
        if not torch.isfinite(loss):
            raise UserError("align: the loss is not finite; use --dtype float32 or a lower rate")
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return trained


def block_output(block: nn.Module, inputs: Tensor) -> Tensor:
    """The block's output [N, H] of its input [N, H]."""
    output = block(inputs[None])
    return (output[0] if isinstance(output, tuple) else output).view_as(inputs)


@torch.no_grad()
def held_out_error(block: nn.Module, examples: Examples, multiplier: float) -> float:
    """Mean relative error of the stream on the held-out tokens."""
    rows = torch.nonzero(examples.held_out)[:, 0]
    total = 0.0
    for part in rows.split(8192):
        found = block_output(block, examples.inputs[part])
        error = multiplier * wide(found) - wide(examples.wanted[part])
        total += float((error.square().sum(-1, keepdim=True) * examples.weights[part]).sum())
    return total / len(rows)


def align(
    teacher: Teacher,
    student_folder: Path,
    tokens: Tensor,
    settings: AlignSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    work: Path | None = None,
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
    if teacher.family.student_experts > 1:
        raise UserError(
            f"{student_folder}: alignment knows students with dense layers or one expert, not "
            f"{teacher.family.student_experts}"
        )
    disk = student_dtype(opened)
    source = SteppedModel(teacher, dtype, device)
    target = SteppedModel(opened, dtype, device)
    with torch.no_grad():
        source.start(tokens, batch)
        target.start(tokens, batch)
    held_out = held_out_sequences(len(tokens), held_out_every)
    layers: dict[int, dict[str, Tensor]] = {}
    reports: list[AlignReport] = []
    for index in progress(range(len(source.layers)), "align, layers"):
        theirs, ours = source.load(index), target.load(index)
        if index in teacher.moe_layers:
            kept = read_layer(work, index)
            parts, report = align_layer(
                source, theirs, target, ours, index, held_out, settings, disk, kept, not reports
            )
            if work is not None and kept is None:
                write_layer(work, parts, report)
            layers[index] = parts
            reports.append(report)
            say(describe(report))
        else:
            with torch.no_grad():
                source.advance(theirs, index)
                target.advance(ours, index)
        source.drop(theirs)
        target.drop(ours)
    return Aligned(layers, reports)


def align_layer(
    source: SteppedModel,
    theirs: nn.Module,
    target: SteppedModel,
    ours: nn.Module,
    index: int,
    held_out: Tensor,
    settings: AlignSettings,
    disk: torch.dtype,
    kept: tuple[dict[str, Tensor], AlignReport] | None,
    check: bool,
) -> tuple[dict[str, Tensor], AlignReport]:
    """The layer's new tensors, as `disk` rounds them; both models' streams then have passed it."""
    family = source.teacher.family
    path = block_path(family) if family.student_experts else family.dense
    block = ours.get_submodule(path)
    factor = residual_multiplier(ours)
    residuals, inputs, wanted, weights = [], [], [], []
    with torch.no_grad():
        for i in range(len(source.hidden)):
            teacher_half(source, theirs, index, i, check)
            halves = run_halves(ours, block, target.hidden[i], target.call(index, i))
            residuals.append(halves.residual)
            inputs.append(halves.block_input)
            if kept is None:
                wanted.append((wide(source.hidden[i]) - wide(halves.residual)).to(source.dtype))
                weights.append(1 / wide(source.hidden[i]).square().sum(-1, keepdim=True))
    if kept is None:
        examples = Examples(
            torch.cat([x.flatten(0, 1) for x in inputs]),
            torch.cat([x.flatten(0, 1) for x in wanted]),
            torch.cat([x.flatten(0, 1) for x in weights]),
            held_out.repeat_interleave(inputs[0].shape[1]).to(inputs[0].device),
        )
        parts, errors = fit_block(block, family, examples, settings, factor, disk)
        report = AlignReport(index, *errors)
        del examples, wanted, weights
    else:
        parts, report = kept
        load_parts(block, family, parts)
    with torch.no_grad():
        for i, residual in enumerate(residuals):
            output = block(inputs[i])
            output = output[0] if isinstance(output, tuple) else output
            target.hidden[i] = residual + factor * output
    return parts, report


def fit_block(
    block: nn.Module,
    family: Family,
    examples: Examples,
    settings: AlignSettings,
    factor: float,
    disk: torch.dtype,
) -> tuple[dict[str, Tensor], tuple[float, float, float, bool]]:
    """Train and refit one FFN in place; its tensors, and (before, trained, after, kept)."""
    original = {name: value.clone() for name, value in feed_forward_parts(block, family).items()}
    best = before = held_out_error(block, examples, factor)
    best_parts = original
    trained = feed_forward_parts(train_block(block, family, examples, settings, factor), family)

    def attempt(parts: dict[str, Tensor]) -> float:
        nonlocal best, best_parts
        rounded = {name: value.to(disk).to(original[name].dtype) for name, value in parts.items()}
        load_parts(block, family, rounded)
        error = held_out_error(block, examples, factor)
        if error < best:
            best, best_parts = error, rounded
        return error

    after_training = attempt(trained)
    load_parts(block, family, best_parts)
    attempt({**best_parts, **refitted_down(block, family, examples, factor)})
    load_parts(block, family, best_parts)
    kept = best_parts is not original and after_training < before
    parts = {name: value.to(disk).cpu().contiguous() for name, value in best_parts.items()}
    return parts, (before, after_training, best, kept)


@torch.no_grad()
def refitted_down(
    block: nn.Module, family: Family, examples: Examples, factor: float
) -> dict[str, Tensor]:
    """The block's down projection solved anew on the same tokens and weights."""
    # StudentFeedForward changes the layer that it is given, so it gets one of its own around the
    # block.
    layer = inner = nn.Module()
    *above, last = (block_path(family) if family.student_experts else family.dense).split(".")
    for name in above:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    own = copy.copy(block)
    own._modules = dict(block._modules)
    inner.add_module(last, own)
    feed_forward = StudentFeedForward(layer, family)
    fitting = Fitting(feed_forward, [examples.held_out])
    inputs, wanted = examples.inputs[:, None], wide(examples.wanted[:, None])  # "sequences" of 1
    base = feed_forward.base(inputs)
    fitting.add(0, wanted / factor - wide(base), examples.weights[:, None].sqrt())
    rows, _ = fitting.solve(0, RIDGES, torch.float32)
    return down_parts(rows.float(), feed_forward.bias is not None)


def describe(report: AlignReport) -> str:
    """One line on a layer."""
    note = "" if report.kept else ", training not kept"
    return (
        f"layer {report.layer}: relative error {report.before:.4f} -> {report.after:.4f} "
        f"(held-out{note})"
    )


# --- finished layers ------------------------------------------------------------------


def layer_file(work: Path, index: int) -> Path:
    return work / f"layer-{index:04d}.safetensors"


def read_layer(work: Path | None, index: int) -> tuple[dict[str, Tensor], AlignReport] | None:
    """A finished layer, or None."""
    if work is None or not layer_file(work, index).exists():
        return None
    with safe_open(layer_file(work, index), "pt") as file:
        report = AlignReport(**json.loads((file.metadata() or {})["report"]))
        return {name: file.get_tensor(name) for name in file.keys()}, report  # noqa: SIM118


def write_layer(work: Path, parts: dict[str, Tensor], report: AlignReport) -> None:
    """Keep a finished layer."""
    with atomic_path(layer_file(work, report.layer)) as temporary:
        save_file(parts, temporary, {"report": json.dumps(asdict(report))})


def open_work(work: Path, fingerprint: dict[str, Any]) -> None:
    """Make the folder of finished layers; one that was made from something else is emptied."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    mark = work / "made_from.json"
    if work.exists():
        same = mark.is_file() and json.loads(mark.read_text()).get("sha256") == digest
        done = len(list(work.glob("layer-*.safetensors")))
        if same and done:
            say(f"align: going on after {done} finished layers in {work}")
        elif not same:
            say(f"align: {work} is from other settings; beginning anew")
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"sha256": digest})


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
    record: dict[str, Any] | None = None,
) -> Path:
    """`align`, and the folder written. Finished layers lie in `<out>.layers` until then."""
    require_absent(out)
    work = Path(f"{out}.layers")
    upstream = {f.name: sha256_of(f) for f in shard_files(student_folder)}
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    about = {"settings": asdict(settings), "dtype": str(dtype), "tokens": digest}
    open_work(work, {**about, "student": upstream, "batch": batch})
    found = align(
        teacher, student_folder, tokens, settings,
        dtype=dtype, device=device, batch=batch, work=work,
    )  # fmt: skip
    section = {
        **asdict(settings),
        "sequences": tokens.shape[0],
        "length": tokens.shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "layers": [asdict(report) for report in found.reports],
        **(record or {}),
    }
    written = rewrite_student(student_folder, out, teacher.family, found.layers, align=section)
    shutil.rmtree(work)
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
    tokens = read_tokens(args.tokens, teacher.config.vocab_size)
    device = pick_device(args.device)
    dtype = compute_dtype(args.dtype, teacher.dtype, device)
    record = {
        "upstream_sha256": {
            "calibration": sha256_of(args.tokens),
            "student": {f.name: sha256_of(f) for f in shard_files(folder)},
        }
    }
    align_student(
        teacher, folder, args.out, tokens, settings,
        dtype=dtype, device=device, batch=args.batch, record=record,
    )  # fmt: skip
    say(f"{args.out}: aligned")
