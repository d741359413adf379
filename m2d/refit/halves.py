"""Decoder layers in two halves, attention and feed-forward, so that an FFN can be fitted between.

Every layer here computes z = r + m FFN(norm(r)): r the residual stream after attention, m a
constant of the family (1 but for Granite). Shapes: B sequences of T tokens, H hidden size, W the
student's intermediate size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2d.errors import UserError
from m2d.models.experts import StackedExperts
from m2d.models.families import Family
from m2d.models.fingerprint import noted_teacher, require_teacher
from m2d.models.hidden import HiddenStates, SeveralStates
from m2d.models.resume import Kept
from m2d.models.stream import StreamedTeacher, drop_weights
from m2d.models.student_config import number
from m2d.models.teacher import Teacher, check_weights, make_skeleton, read_config
from m2d.progress import progress

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative; else 2e-2


def open_student(folder: Path, teacher: Teacher) -> Teacher:
    """What is known of a student of `teacher` before any weight is read, in a Teacher's form.

    Raises UserError where it cannot be a student of that teacher.
    """
    raw, whole = read_config(folder)
    config = whole.get_text_config()
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    for key in sizes:
        ours, theirs = getattr(config, key, None), getattr(teacher.config, key, None)
        if ours != theirs:
            raise UserError(
                f"{folder}: {key} is {ours}, the teacher's is {theirs}; give the teacher that "
                "the student was made from"
            )
    family = teacher.family
    if config.model_type != family.student_model_type:
        raise UserError(
            f"{folder}: model_type is {config.model_type!r}; students of {teacher.name} are "
            f"{family.student_model_type!r}"
        )
    if family.student_experts and (found := number(config, family.num_experts)) != (
        family.student_experts
    ):
        raise UserError(
            f"{folder}: has {found} experts; students of {teacher.name} have "
            f"{family.student_experts}"
        )
    require_teacher(
        [(str(folder), noted_teacher(folder).get("fingerprint"))], teacher.fingerprint, teacher.name
    )
    moe_layers = teacher.moe_layers if family.student_experts else []
    family = replace(
        family,
        layers=family.student_layers or family.layers,
        head=family.student_head or family.head,
    )
    skeleton = make_skeleton(whole, folder)
    student = Teacher(folder, folder.name, raw, config, family, skeleton, moe_layers)
    check_weights(student)
    return student


@dataclass
class Halves:
    """What happened between the halves of a layer; each [B, T, H]."""

    residual: Tensor
    """r, before the FFN's output is added."""
    block_input: Tensor
    """norm(r)."""
    block_output: Tensor
    """FFN(norm(r)), routed and shared experts together."""


def run_halves(
    model: "SteppedModel", layer: nn.Module, block: nn.Module, index: int, i: int
) -> Halves:
    """Run layer `index` on batch i with its FFN's output kept out of the residual stream.

    The batch's hidden states stay as they are; what the layer hands on beside them is noted.
    """
    caught: list[tuple[Tensor, Tensor]] = []

    def keep_out(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        caught.append((args[0], first.view_as(args[0])))  # some flatten the tokens
        zeros = torch.zeros_like(first)
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    handle = block.register_forward_hook(keep_out)
    try:
        residual = model.calls.run(layer, index, i, model.hidden[i])
    finally:
        handle.remove()
    ((block_input, block_output),) = caught
    return Halves(residual, block_input, block_output)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def residual_multiplier(layer: nn.Module) -> float:
    """m: what the FFN's output is multiplied by before it is added."""
    return float(getattr(layer, "residual_multiplier", 1.0))


def check_halves(
    layer: nn.Module, halves: Halves, hidden: Tensor, call: dict[str, Any], name: str
) -> None:
    """Raise a UserError unless r + m FFN is what the layer itself gives."""
    own = _first(layer(hidden, **call)).float()
    tolerance = TOLERANCE.get(hidden.dtype, 2e-2) * float(own.abs().max())
    same = halves.residual.shape == halves.block_output.shape  # not of several streams
    if same:
        ours = halves.residual + residual_multiplier(layer) * halves.block_output
        same = torch.allclose(ours.float(), own, rtol=0, atol=tolerance)
    if not same:
        raise UserError(
            f"{name}: its layers do not just add the FFN's output to the residual stream "
            f"({type(layer).__name__}), so a refit in closed form does not apply"
        )


def check_sum(
    layer: nn.Module, family: Family, hidden: Tensor, call: dict[str, Any], name: str
) -> None:
    """Raise a UserError unless the block adds what its experts give to what else it computes.

    A student of the same class then does so too, which the closed form takes for granted; with a
    norm over both it does not hold. The experts' output counts 0, 1 and 2 times.
    """
    outputs: list[Tensor] = []
    block, experts = layer.get_submodule(block_path(family)), layer.get_submodule(family.experts)
    seen = block.register_forward_hook(lambda _, __, out: outputs.append(_first(out).float()))
    try:
        for times in (0, 1, 2):
            scaled = experts.register_forward_hook(lambda _, __, out, times=times: times * out)
            try:
                layer(hidden, **call)
            finally:
                scaled.remove()
    finally:
        seen.remove()
    none, once, twice = outputs
    tolerance = TOLERANCE.get(hidden.dtype, 2e-2) * float(twice.abs().max())
    if not torch.allclose(twice - once, once - none, rtol=0, atol=tolerance):
        raise UserError(
            f"{name}: its blocks do not just add up their experts' output "
            f"({type(block).__name__}), so a refit in closed form does not apply"
        )


class SteppedModel(StreamedTeacher):
    """A model whose layers the caller runs one by one; it keeps the hidden states between them."""

    def start(self, input_ids: Tensor, batch: int) -> None:
        """Embed input_ids [sequences, length], in batches of `batch` sequences."""
        batches = input_ids.split(batch)
        self.hidden = HiddenStates(len(batches), self.device)
        self.calls = self._begin(batches, self.hidden)

    def load(self, index: int) -> nn.Module:
        """The layer with its weights."""
        return self._load_layer(index)

    def advance_to(self, index: int) -> None:
        """Push every batch through the layers before `index`."""
        for before in range(index):
            layer = self.load(before)
            self.advance(layer, before)
            self.drop(layer)

    def drop(self, layer: nn.Module) -> None:
        """Free a layer's weights."""
        drop_weights(layer)

    def call(self, index: int, i: int) -> dict[str, Any]:
        """The arguments that layer `index` has besides the hidden states of batch i."""
        return self.calls.of(index, i)

    def advance(self, layer: nn.Module, index: int) -> None:
        """Push every batch through the whole layer."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = self.calls.run(layer, index, i, hidden)


def kept_layers(
    kept: Kept[Any] | None, source: SteppedModel, streams: Sequence[SteppedModel], title: str
) -> Iterator[int]:
    """The layers in turn, from where `kept` goes on; what the streams leave in each is kept.

    What layers hand on beside hidden states is not: where they do, all layers come in turn, and the
    caller runs those of which `kept.totals` has a result without finding it anew.
    """
    start, total = 0, len(source.layers)
    states = SeveralStates()
    if kept is not None:
        kept.open(source.teacher.moe_layers)
        if not any(stream.calls.between_layers for stream in streams):
            states = SeveralStates(kept.folder, [stream.hidden for stream in streams])
            start = kept.finished
        if start:
            states.restore(kept.file)
    for index in progress(range(start, total), title, total):
        yield index
        if kept is not None and index >= kept.finished:
            kept.done(index, states, index == total - 1)
    states.close()


class _DenseStub(nn.Module):
    """In the place of a dense FFN's down projection: keeps its input, gives zeros."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.inner: Tensor | None = None

    def forward(self, inner: Tensor) -> Tensor:
        self.inner = inner.flatten(0, -2)
        return inner.new_zeros(*inner.shape[:-1], self.size)


class _ExpertStub(nn.Module):
    """In the place of experts that are always taken: keeps what their down projections take."""

    def __init__(self, experts: StackedExperts):
        super().__init__()
        self.experts = experts
        self.inner: Tensor | None = None
        self.weight: Tensor | None = None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        count, flat = self.experts.num_experts, hidden.reshape(-1, hidden.shape[-1])
        if count == 1:
            self.inner, self.weight = self.experts.inner(0, flat), top_k_weights
            return torch.zeros_like(hidden)
        weights = torch.zeros_like(top_k_weights).scatter(1, top_k_index, top_k_weights)
        inner = [self.experts.inner(e, flat) for e in range(count)]
        self.inner = torch.cat([h * weights[:, [e]].to(h) for e, h in enumerate(inner)], dim=1)
        self.weight = None
        return torch.zeros_like(hidden)


class StudentFeedForward:
    """A student's FFN as base(x) + w (h(x) D + bias): w the weight of its one expert, else 1.

    Where a student has several experts, h is that of all of them, each times its weight. base is
    what does not pass through the down projection D, such as a gated shared expert; zero in a dense
    FFN. The layer given is changed: its block gives base alone from now on.
    """

    def __init__(self, layer: nn.Module, family: Family):
        self.weight: Tensor  # D^T [H, W]
        self.bias: Tensor | None  # [H]
        self.stub: _ExpertStub | _DenseStub
        if family.student_experts:
            self.block = layer.get_submodule(block_path(family))
            experts = layer.get_submodule(family.experts)
            assert isinstance(experts, StackedExperts)
            self.weight = torch.cat(list(experts.down_proj), dim=1)
            self.bias = None if experts.down_bias is None else experts.down_bias[0]
            self.stub = _ExpertStub(experts)
            layer.set_submodule(family.experts, self.stub)
        else:
            self.block = layer.get_submodule(family.dense)
            down = self.block.get_submodule("down_proj")
            assert isinstance(down, nn.Linear)
            self.weight, self.bias = down.weight, down.bias
            self.stub = _DenseStub(down.out_features)
            self.block.set_submodule("down_proj", self.stub)

    def taken(self) -> tuple[Tensor, Tensor | None]:
        """h [N, W] of the block's last call, and w [N, 1]."""
        assert self.stub.inner is not None
        weight = self.stub.weight if isinstance(self.stub, _ExpertStub) else None
        return self.stub.inner, weight

    def columns(self) -> Tensor:
        """What D and, below it, the bias multiply, of the block's last call: [N, W (+ 1)]."""
        inner, weight = self.taken()
        if self.bias is not None:
            inner = torch.cat([inner, inner.new_ones(len(inner), 1)], dim=1)
        return inner if weight is None else inner * weight.to(inner.dtype)

    def rows(self) -> Tensor:
        """D and, below it, the bias: [W (+ 1), H]."""
        rows = self.weight.T
        return rows if self.bias is None else torch.cat([rows, self.bias[None]])

    def replace(self, rows: Tensor, dtype: torch.dtype) -> None:
        """Take D and the bias from `rows`, as they will be on disk in `dtype`."""
        rounded = rows.to(dtype).to(self.weight.dtype)
        if self.bias is not None:
            rounded, self.bias = rounded[:-1], rounded[-1]
        self.weight = rounded.T.contiguous()

    def base(self, block_input: Tensor) -> Tensor:
        """base [B, T, H] of the block's input [B, T, H]; h is then that of this call."""
        return _first(self.block(block_input))

    def output(self, block_input: Tensor) -> Tensor:
        """The whole block's output [B, T, H] of its input [B, T, H]."""
        base = self.base(block_input)
        inner, weight = self.taken()
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        out = functional.linear(inner, self.weight.to(inner.dtype), bias)
        return base + (out if weight is None else out * weight.to(out.dtype)).view_as(base)


def student_block_path(family: Family) -> str:
    """Module path of the same in a student: of its dense FFN, or of the block of its experts."""
    return block_path(family) if family.student_experts else family.dense


def block_path(family: Family) -> str:
    """Module path of the MoE block: where the experts and the router are.

    Raises UserError where a layer's experts stand by themselves: what they give goes through a
    norm of its own, and no down projection can be solved for; or where layers are given more of
    those before them than their sum.
    """
    if family.given_blocks:
        raise UserError(
            f"{family.model_type}: a layer is given what several before it were given, not their "
            "sum alone, so a refit does not apply; leave out refit and align (--fold works)"
        )
    path = family.block
    if not path:
        raise UserError(
            f"{family.model_type}: its experts' sum is normed before it is added, so a refit in "
            "closed form does not apply"
        )
    return path
