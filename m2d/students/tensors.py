"""The tensors of the student of a teacher and a plan, one by one.

Shapes: H hidden size, I expert intermediate size, W the student's intermediate size. The routed
groups come first in W, shared experts after them, zeros last.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m2d.choose.plan import LayerPlan, Plan
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, Spec
from m2d.models.entries import Entry
from m2d.models.families import FUSED, Family, dense_pattern
from m2d.models.folded import Folds
from m2d.models.skeleton import above
from m2d.models.student import made_buffers, stored_shapes
from m2d.students.average import merge_down, merge_down_bias, merge_gate_or_up


def pad_to(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` with zeros after its own values, which changes nothing that an FFN computes."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


def source_name(family: Family, name: str) -> str:
    """Canonical name, in the teacher, of a parameter of the student outside its FFNs."""
    ours, theirs = above(family.student_layers or family.layers), above(family.layers)
    for own, other in (
        (ours, theirs),
        (f"{family.student_head or family.head}.", f"{family.head}."),
    ):
        if name.startswith(own):
            return other + name.removeprefix(own)
    return name


@dataclass(frozen=True)
class _Output:
    """A tensor of the student."""

    source: str
    """Canonical name of the teacher's tensor, where it is taken over."""
    shape: tuple[int, ...]
    layer: int | None = None
    """Of an FFN: its layer."""
    part: str = ""
    """Of an FFN: gate_proj, up_proj, down_proj or gate_up_proj; .bias follows for its bias."""
    expert: int | None = None
    """Of an FFN in several experts, each in tensors of its own: which of them."""


class StudentTensors:
    """Every tensor of the student, made on request from the teacher's checkpoint and the plan.

    `skeleton` is the student's stock class on the meta device; `read` may be replaced by one that
    keeps tensors in memory; `folds` fold the experts' gates. Names are those of the class's
    parameters or, with `hub_names`, those under which the teacher's own repository keeps what is in
    the student's files.
    """

    def __init__(
        self,
        family: Family,
        checkpoint: Checkpoint,
        skeleton: PreTrainedModel,
        dtype: torch.dtype | None = None,
        read: Callable[[str], Tensor] | None = None,
        hub_names: bool = False,
        folds: Folds | None = None,
    ):
        self.buffers = made_buffers(skeleton)
        self.folds = {i: fold for i, fold in (folds or {}).items() if fold.folds}
        self.family, self.checkpoint, self.dtype = family, checkpoint, dtype
        self.read = read or checkpoint.read
        self.is_feed_forward = dense_pattern(family).fullmatch
        self.layers = family.student_layers or family.layers
        # Only a student of the teacher's own class has its repository's names.
        renamed = hub_names and family.student_model_type == family.teacher_text_type
        renamed = renamed and not family.text_only
        self.outputs: dict[str, _Output] = {}
        for name, shape in stored_shapes(skeleton).items():
            for canonical, output in self._outputs(name, shape, renamed):
                written = self._on_disk(canonical) if renamed else canonical
                self.outputs[written] = output

    def _on_disk(self, canonical: str) -> str:
        """The name that the teacher's repository has, or would have, for a canonical name."""
        if canonical in self.checkpoint.on_disk:
            return self.checkpoint.on_disk[canonical]
        # What lies beside it in the same layer tells how the layer is called there.
        match = re.match(re.escape(self.layers) + r"\.\d+\.", canonical)
        for known, written in self.checkpoint.on_disk.items() if match else ():
            rest = known.removeprefix(match[0] if match else "")
            if rest != known and written.endswith(f".{rest}"):
                return written.removesuffix(rest) + canonical.removeprefix(known[: -len(rest)])
        return canonical

    def _outputs(self, name: str, shape: tuple[int, ...], split: bool) -> list[tuple[str, _Output]]:
        """(canonical name, output) of a parameter; several where experts are apart on disk."""
        family = self.family
        source = source_name(family, name)
        if not family.student_experts:
            found = self.is_feed_forward(name)
            if found is None:
                return [(name, _Output(source, shape))]
            part, _ = name.rsplit(".", 2)[1:]
            return [(name, _Output(source, shape, _layer_of(name, self.layers), part))]
        path = re.escape(f"{self.layers}.") + r"\d+" + re.escape(f".{family.experts}.")
        kinds = "|".join(map(re.escape, FUSED))
        match = re.fullmatch(f"(?P<path>{path})(?P<part>{kinds})(?P<bias>_bias)?", name)
        if match is None:
            return [(name, _Output(source, shape))]
        layer = _layer_of(name, self.layers)
        bias = ".bias" if match["bias"] else ""
        halves = FUSED[match["part"]]
        if not split or self.checkpoint.fused or family.rows:
            part = halves[0] if len(halves) == 1 else match["part"]
            return [(name, _Output(source, shape, layer, part + bias))]
        own = shape[1:]
        if family.transposed and not bias:
            own = own[::-1]
        own = (own[0] // len(halves), *own[1:])
        return [
            (
                f"{match['path']}{index}.{half}{bias or '.weight'}",
                _Output(source, own, layer, half + bias, index),
            )
            for index in range(shape[0])
            for half in halves
        ]

    def specs(self, plan: Plan) -> dict[str, Spec]:
        """dtype and shape of every tensor of the student, in the order of its layers.

        Raises UserError where the teacher lacks what the student needs.
        """
        first = {layer.layer: layer.groups[0].experts[0] for layer in plan.layers}
        specs = {}
        for name, output in self.outputs.items():
            source = output.source
            if output.layer in first:
                part = output.part.replace("gate_up_proj", "up_proj")
                source = self._of_expert(output.layer, first[output.layer], part)
            specs[name] = (self.dtype or self.checkpoint.entry(source).dtype, output.shape)
        return specs

    def _of_expert(self, layer: int, expert: int, part: str) -> str:
        """Canonical name of one expert's tensor; part as in _Output, but for gate_up_proj."""
        name = self.family.up_proj.format(layer=layer, expert=expert)
        projection, _, kind = part.partition(".")
        return name.removesuffix("up_proj.weight") + f"{projection}.{kind or 'weight'}"

    def feed_forward_names(self, layer: int) -> list[str]:
        """Names of the student's tensors that a plan makes in a layer."""
        return [name for name, output in self.outputs.items() if output.layer == layer]

    def make(self, name: str, plan: Plan) -> Tensor:
        """The tensor of that name, whole, in the student's dtype and shape."""
        output = self.outputs[name]
        layer = next((found for found in plan.layers if found.layer == output.layer), None)
        if layer is not None:
            return self._fit(name, self._merge(layer, output))
        found = self.checkpoint.entry(output.source)
        if self._is_router(output, found.shape):
            # All experts are taken whatever the router says, alike; zeros say so, and what the
            # class itself makes of its buffers.
            if (own := self.buffers.get(output.source)) is not None:
                return own.to(self.dtype or found.dtype)
            scale = output.source.endswith("scale")
            fill = torch.ones if scale else torch.zeros
            return fill(output.shape, dtype=self.dtype or found.dtype)
        return self._fit(name, self.read(output.source))

    def copied(self, name: str, plan: Plan) -> list[Entry] | None:
        """The tensors on disk whose bytes, one after the other, are those of `make(name, plan)`.

        None where it has to be computed, or where that is not known beforehand.
        """
        output = self.outputs[name]
        layer = next((found for found in plan.layers if found.layer == output.layer), None)
        sources = [output.source]
        if layer is None and self._is_router(output, self.checkpoint.entry(output.source).shape):
            return None
        if layer is not None:
            if layer.layer in self.folds and output.part.startswith("gate"):
                return None
            alone = all(len(g.experts) == 1 and g.neurons is None for g in layer.groups)
            own = self.family.student_experts or self.family.scales_input
            if not alone or output.part not in ("gate_proj", "up_proj") or own:
                return None
            experts = [group.experts[0] for group in layer.groups]
            sources = [self._of_expert(layer.layer, expert, output.part) for expert in experts]
            sources += self._shared(layer.layer, output.part)
        found = [self.checkpoint.entry(source) for source in sources]
        dtype = self.dtype or found[0].dtype
        entries = [e for e in found if isinstance(e, Entry) and e.dtype == dtype and e.shape]
        shapes = {entry.shape[1:] for entry in entries}
        rows = sum(entry.shape[0] for entry in entries)
        whole = len(entries) == len(found) and shapes == {output.shape[1:]}
        return entries if whole and rows == output.shape[0] else None

    def _is_router(self, output: _Output, shape: tuple[int, ...]) -> bool:
        """Whether the teacher has a row per expert where the student has other experts."""
        family = self.family
        if not family.student_experts or output.layer is not None:
            return False
        name = output.source.removeprefix(f"{family.layers}.").partition(".")[2]
        block = family.block
        own = family.router.removeprefix(f"{block}.").partition(".")[0]
        near = name.startswith(f"{block}.{own}.".removeprefix("."))
        if near and shape[:1] != output.shape[:1]:
            return True
        inside = block and name.startswith(f"{block}.") and len(shape) == len(output.shape)
        changed = {own for theirs, own in zip(shape, output.shape, strict=False) if theirs != own}
        if inside and changed == {family.student_experts}:
            return True
        # As many experts as the teacher has: its router is no longer theirs.
        return near and shape[0] == family.student_experts

    def _merge(self, layer: LayerPlan, output: _Output) -> Tensor:
        """An FFN's tensor: merged groups, then shared experts, then zeros, to the shape."""
        family = self.family
        if not family.student_experts:
            return self._projection(layer, output.part)
        bias = "." + output.part.partition(".")[2] if "." in output.part else ""
        part = output.part.removesuffix(bias) if bias else output.part
        slices = [self._slices(layer, half, bias, output) for half in FUSED[part]]
        if output.expert is not None:
            return slices[0][output.expert].contiguous()
        if len(slices) == 2 and family.interleaved:
            both = torch.stack(slices, dim=2).flatten(1, 2)
        else:
            both = torch.cat(slices, dim=1)
        both = both.mT.contiguous() if family.turns(part) and both.dim() == 3 else both
        return both.flatten(0, 1) if family.rows else both

    def _slices(self, layer: LayerPlan, half: str, bias: str, output: _Output) -> Tensor:
        """A projection cut into the student's experts: [n, w, H], down [n, H, w]; biases [n, any].

        Each expert's down projection makes good for the weight that its router gives it.
        """
        family = self.family
        count, weights = family.student_experts, torch.tensor(family.expert_weights).double()
        whole = self._projection(layer, half + bias)
        if half == "down_proj" and bias:
            # Added once for every expert, each time its weight.
            return (whole.double() / weights.sum()).to(whole.dtype).expand(count, -1)
        axis = 1 if half == "down_proj" else 0
        width = self._width_of_each(output)
        shape = list(whole.shape)
        shape[axis] = count * width
        whole = pad_to(whole, tuple(shape))
        if axis == 0:
            return whole.unflatten(0, (count, width))
        cut = whole.unflatten(1, (count, width)).transpose(0, 1)
        if bool((weights == 1).all()):
            return cut
        return (cut.float() / weights.float()[:, None, None]).to(cut.dtype)

    def _width_of_each(self, output: _Output) -> int:
        """Intermediate size of one of the student's experts."""
        family = self.family
        if family.rows:
            return output.shape[0] // family.student_experts
        part, _, bias = output.part.partition(".")
        shape = list(output.shape if output.expert is not None else output.shape[1:])
        if output.expert is None and family.transposed and len(shape) == 2:
            shape.reverse()
        if part == "down_proj":
            return int(shape[1]) if not bias else 0
        return int(shape[0]) // (2 if part == "gate_up_proj" else 1)

    def _projection(self, layer: LayerPlan, part: str) -> Tensor:
        """gate_proj or up_proj [width, H], down_proj [H, width], or a .bias of one."""

        def read(expert: int) -> Tensor:
            tensor = self.read(self._of_expert(layer.layer, expert, part))
            wider = self.dtype is not None and self.dtype.itemsize > tensor.dtype.itemsize
            tensor = tensor.to(self.dtype) if wider else tensor  # so that nothing is rounded twice
            fold = self.folds.get(layer.layer)
            if fold is None or not part.startswith("gate_proj"):
                return tensor
            return (fold.gate_bias if part.endswith("bias") else fold.gate)(expert, tensor)

        family = self.family
        factor = 1.0 if family.student_experts else family.routed_factor
        if part == "down_proj.bias":
            return merge_down_bias(read, layer, 1 / factor)
        shared = [self.read(name) for name in self._shared(layer.layer, part)]
        fold = self.folds.get(layer.layer)
        if fold is not None and fold.shared is not None and part == "gate_proj":
            shared = [fold.shared.gate(0, tensor) for tensor in shared]
        if part == "down_proj" and not family.scales_input:
            merged = list(merge_down(read, layer, 1 / factor))
            shared = [tensor * layer.shared_scale for tensor in shared]
        else:
            merged = merge_gate_or_up(read, layer, part == "down_proj")
            if family.scales_input and part != "down_proj":
                merged = [m * g.scale for m, g in zip(merged, layer.groups, strict=True)]
        parts = [*merged, *(tensor.to(merged[0].dtype) for tensor in shared)]
        return torch.cat(parts, dim=1 if part == "down_proj" else 0)

    def _shared(self, layer: int, part: str) -> list[str]:
        """Canonical names of what shared experts add to a dense student's FFN."""
        family, config = self.family, self.checkpoint.config
        if family.student_experts:
            return []
        if family.shared is not None:
            return [f"{family.layers}.{layer}.{family.shared}.{part}.weight"]
        count = int(config.get(family.shared_in_experts or "") or 0)
        total = int(config.get(family.num_experts) or 0)
        return [self._of_expert(layer, total - count + i, part) for i in range(count)]

    def _fit(self, name: str, tensor: Tensor) -> Tensor:
        output = self.outputs[name]
        tensor = tensor.to(self.dtype or tensor.dtype)
        # Only an FFN may be narrower than the student's one width.
        if output.layer is not None and all(map(operator.le, tensor.shape, output.shape)):
            tensor = pad_to(tensor, output.shape)
        if tuple(tensor.shape) != output.shape:
            raise UserError(
                f"{self.checkpoint.folder}: {name} would be {list(tensor.shape)}, but the config "
                f"implies {list(output.shape)}"
            )
        return tensor


def _layer_of(name: str, layers: str) -> int:
    return int(name.removeprefix(f"{layers}.").partition(".")[0])
