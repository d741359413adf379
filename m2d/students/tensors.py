"""The dense student of a teacher and a plan: its config, and its tensors one by one.

Shapes: H hidden size, I expert intermediate size, W the student's intermediate size. The routed
groups come first in W, shared experts after them, zeros last.
"""

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.choose.plan import Group, LayerPlan, Plan
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, Spec
from m2d.models.entries import Entry
from m2d.models.families import Family, Of, dense_pattern
from m2d.models.folded import Folds
from m2d.models.teacher import Teacher, make_skeleton

# Of a teacher's config.json, never a student's: custom code, paths, how the weights were packed.
NEVER_INHERITED = {"auto_map", "_name_or_path", "quantization_config", "transformers_version"}
# transformers' grouped matrix products want rows of a multiple of 16 bytes.
ONE_EXPERT_MULTIPLE = 8
# What differs between any two config classes.
NOT_COMPARED = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}


def student_width(teacher: Teacher, plan_width: int) -> int:
    """W: one width for all layers, wide enough for those that were dense in the teacher.

    plan_width: of the routed groups. A student with one expert keeps shared experts and dense
    layers as they are.
    """
    if teacher.family.one_expert:
        return -(-plan_width // ONE_EXPERT_MULTIPLE) * ONE_EXPERT_MULTIPLE
    width = plan_width + teacher.shared_width
    dense = len(teacher.moe_layers) < int(teacher.config.num_hidden_layers)
    return max(width, int(teacher.config.intermediate_size)) if dense else width


def student_config(teacher: Teacher, width: int) -> dict[str, Any]:
    """The student's config.json: the teacher's as on disk, without what only experts need."""
    family = teacher.family
    dropped = NEVER_INHERITED | family.dropped_config_keys
    raw = {key: value for key, value in teacher.raw_config.items() if key not in dropped}
    changes = {
        key: getattr(teacher.config, value.key) if isinstance(value, Of) else value
        for key, value in family.student_config.items()
    }
    changes[family.width_key] = width
    for key, value in changes.items():
        set_key(raw, type(teacher.config), key, value)
    raw["architectures"] = [family.student_architecture]
    raw["model_type"] = family.student_model_type
    if family.student_model_type == family.model_type:
        return raw
    return raw | _unlike_defaults(raw, teacher.config, {*dropped, *changes})


def build_student_skeleton(
    teacher: Teacher, plan_width: int
) -> tuple[dict[str, Any], torch.nn.Module]:
    """The student's config.json and its stock class on the meta device."""
    raw = student_config(teacher, student_width(teacher, plan_width))
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return raw, make_skeleton(config, teacher.folder)


def set_key(raw: dict[str, Any], kind: type[PretrainedConfig], key: str, value: Any) -> None:
    """Set a config key under the name that `raw` has for it; config classes have synonyms."""
    synonyms = dict(getattr(kind, "attribute_map", {}))
    real = synonyms.get(key, key)
    names = [key, *(n for n in (real, *synonyms) if n != key and synonyms.get(n, n) == real)]
    present = [name for name in names if name in raw]
    for name in present[1:]:
        del raw[name]
    raw[present[0] if present else key] = value


def _unlike_defaults(
    raw: dict[str, Any], config: PretrainedConfig, own: set[str]
) -> dict[str, Any]:
    """What the teacher's class means by keys that `raw` lacks, where the student's differs."""
    found = CONFIG_MAPPING[raw["model_type"]].from_dict(raw).to_dict()
    meant = config.to_dict()
    return {
        key: meant[key]
        for key in found.keys() & meant.keys() - own - NOT_COMPARED - raw.keys()
        if found[key] != meant[key]
    }


def merge_gate_or_up(read: Callable[[int], Tensor], plan: LayerPlan) -> list[Tensor]:
    """The groups' averages, each [group width, H]: one below the other, a gate or up projection.

    read(expert) gives the expert's tensor [I, H] or bias [I]. A group of one is copied exactly.
    """
    return [_select(_average(read, group), group, 0) for group in plan.groups]


def merge_down(
    read: Callable[[int], Tensor], plan: LayerPlan, weight: float = 1.0
) -> Iterator[Tensor]:
    """The groups' averages [H, group width], each times its scale: side by side, down projections.

    read(expert) gives the expert's tensor [H, I]. weight: with which the student itself will
    multiply the result. Products are rounded once, from float32.
    """
    for group in plan.groups:
        yield _select(_average(read, group), group, 1) * (group.scale / weight)


def merge_down_bias(read: Callable[[int], Tensor], plan: LayerPlan, weight: float = 1.0) -> Tensor:
    """Bias of the down projection [H]: the groups' averages, each times its scale, added up."""
    total: Tensor | float = 0.0
    for group in plan.groups:
        part = _average(read, group)
        total = total + part.float() * (group.scale / weight)
    assert isinstance(total, Tensor)
    return total.to(part.dtype)


def _average(read: Callable[[int], Tensor], group: Group) -> Tensor:
    if len(group.experts) == 1:
        return read(group.experts[0])
    total = None
    for expert, weight in zip(group.experts, group.weights, strict=True):
        tensor = read(expert)
        part = tensor.float() * weight  # summed in float32, rounded once
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(tensor.dtype)


def _select(tensor: Tensor, group: Group, axis: int) -> Tensor:
    """The intermediate neurons that the group keeps, all if it names none."""
    if group.neurons is None:
        return tensor
    return tensor.index_select(axis, torch.tensor(group.neurons, device=tensor.device))


def pad_to(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` with zeros after its own values, which changes nothing that an FFN computes."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


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


class StudentTensors:
    """Every tensor of the student, made on request from the teacher's checkpoint and the plan.

    `shapes` are those of the student's stock class, by name; `read` may be replaced by one that
    keeps tensors in memory; `folds` fold the experts' gates. Names are those of the class's
    parameters or, with `hub_names`, those under which the teacher's own repository keeps what is in
    the student's files.
    """

    def __init__(
        self,
        family: Family,
        checkpoint: Checkpoint,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype | None = None,
        read: Callable[[str], Tensor] | None = None,
        hub_names: bool = False,
        folds: Folds | None = None,
    ):
        self.folds = {i: fold for i, fold in (folds or {}).items() if fold.folds}
        self.family, self.checkpoint, self.shapes, self.dtype = family, checkpoint, shapes, dtype
        self.read = read or checkpoint.read
        self.is_feed_forward = dense_pattern(family).fullmatch
        # Only a student of the teacher's own class has its repository's names.
        renamed = hub_names and family.student_model_type == family.model_type
        self.outputs: dict[str, _Output] = {}
        for name, shape in shapes.items():
            for canonical, output in self._outputs(name, shape, renamed):
                written = checkpoint.on_disk.get(canonical, canonical) if renamed else canonical
                self.outputs[written] = output

    def _outputs(self, name: str, shape: tuple[int, ...], split: bool) -> list[tuple[str, _Output]]:
        """(canonical name, output) of a parameter; several where experts are apart on disk."""
        family = self.family
        if not family.one_expert:
            found = self.is_feed_forward(name)
            if found is None:
                return [(name, _Output(name, shape))]
            part, _ = name.rsplit(".", 2)[1:]
            return [(name, _Output(name, shape, _layer_of(name, family), part))]
        path = re.escape(f"{family.layers}.") + r"\d+" + re.escape(f".{family.experts}.")
        match = re.fullmatch(
            f"(?P<path>{path})(?P<part>gate_up_proj|down_proj)(?P<bias>_bias)?", name
        )
        if match is None:
            return [(name, _Output(name, shape))]
        layer = _layer_of(name, family)
        bias = ".bias" if match["bias"] else ""
        if not split or self.checkpoint.fused:
            return [(name, _Output(name, shape, layer, match["part"] + bias))]
        halves = ("gate_proj", "up_proj") if match["part"] == "gate_up_proj" else ("down_proj",)
        own = shape[1:]
        if family.transposed and not bias:
            own = own[::-1]
        own = (own[0] // len(halves), *own[1:])
        return [
            (f"{match['path']}0.{half}{bias or '.weight'}", _Output(name, own, layer, half + bias))
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
                part = output.part.replace("gate_up_proj", "gate_proj")
                source = self._of_expert(output.layer, first[output.layer], part)
            specs[name] = (self.dtype or self.checkpoint.entry(source).dtype, output.shape)
        return specs

    def _of_expert(self, layer: int, expert: int, part: str) -> str:
        """Canonical name of one expert's tensor; part as in _Output, but for gate_up_proj."""
        name = self.family.gate_proj.format(layer=layer, expert=expert)
        projection, _, kind = part.partition(".")
        return name.removesuffix("gate_proj.weight") + f"{projection}.{kind or 'weight'}"

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
            # One expert is chosen whatever the router says; zeros say so.
            return torch.zeros(output.shape, dtype=self.dtype or found.dtype)
        return self._fit(name, self.read(output.source))

    def copied(self, name: str, plan: Plan) -> list[Entry] | None:
        """The tensors on disk whose bytes, one after the other, are those of `make(name, plan)`.

        None where it has to be computed, or where that is not known beforehand.
        """
        output = self.outputs[name]
        layer = next((found for found in plan.layers if found.layer == output.layer), None)
        sources = [output.source]
        if layer is not None:
            if layer.layer in self.folds and output.part.startswith("gate"):
                return None
            alone = all(len(g.experts) == 1 and g.neurons is None for g in layer.groups)
            if not alone or output.part not in ("gate_proj", "up_proj") or self.family.one_expert:
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
        """Whether the teacher has a row per expert where the student has one."""
        block = self.family.experts.rpartition(".")[0]
        inside = f".{block}." in output.source
        if not (self.family.one_expert and inside and len(shape) == len(output.shape)):
            return False
        changed = {own for theirs, own in zip(shape, output.shape, strict=True) if theirs != own}
        return changed == {1}

    def _merge(self, layer: LayerPlan, output: _Output) -> Tensor:
        """An FFN's tensor: merged groups, then shared experts, then zeros, to the shape."""
        if not output.part.startswith("gate_up_proj"):
            part = self._projection(layer, output.part)
            if output.shape == (1, *part.shape) or len(output.shape) > part.dim():
                part = pad_to(part, self._fused_shape(output.shape, part.dim()))
                transposed = self.family.transposed and part.dim() == 2
                return (part.T if transposed else part)[None].contiguous()
            return part
        width = self._fused_shape(output.shape, len(output.shape) - 1)[0] // 2
        bias = output.part.removeprefix("gate_up_proj")
        gate, up = (self._projection(layer, f"{half}{bias}") for half in ("gate_proj", "up_proj"))
        gate, up = (pad_to(half, (width, *half.shape[1:])) for half in (gate, up))
        if self.family.interleaved:
            both = torch.stack([gate, up], dim=1).flatten(0, 1)
        else:
            both = torch.cat([gate, up])
        transposed = self.family.transposed and both.dim() == 2
        return (both.T if transposed else both)[None].contiguous()

    def _fused_shape(self, shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
        """[out, in] of a fused parameter [1, ...] of one expert."""
        own = shape[1:]
        return own[::-1] if self.family.transposed and dims == 2 else own

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

        weight = self.family.one_expert_weight
        if part == "down_proj.bias":
            return merge_down_bias(read, layer, weight)
        shared = (self.read(name) for name in self._shared(layer.layer, part))
        if part == "down_proj":
            merged = list(merge_down(read, layer, weight))
        else:
            merged = merge_gate_or_up(read, layer)
        parts = [*merged, *(tensor.to(merged[0].dtype) for tensor in shared)]
        return torch.cat(parts, dim=1 if part == "down_proj" else 0)

    def _shared(self, layer: int, part: str) -> list[str]:
        """Canonical names of what shared experts add to a dense student's FFN."""
        family, config = self.family, self.checkpoint.config
        if family.one_expert:
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


def _layer_of(name: str, family: Family) -> int:
    return int(name.removeprefix(f"{family.layers}.").partition(".")[0])


def stored_shapes(skeleton: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this model holds: tied tensors once."""
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    return {
        name: tuple(tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if name not in tied
    }
