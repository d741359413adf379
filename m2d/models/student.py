"""The dense student of a teacher and a plan: its config, and its tensors one by one.

Shapes: H hidden size, I expert intermediate size, W the student's intermediate size.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m2d.choose.plan import LayerPlan, Plan
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, Spec
from m2d.models.families import Family, dense_pattern
from m2d.models.teacher import Teacher

# Of a teacher's config.json, never a student's: custom code, paths, how the weights were packed.
NEVER_INHERITED = {"auto_map", "_name_or_path", "quantization_config", "transformers_version"}


def student_width(teacher: Teacher, plan_width: int) -> int:
    """W: one width for all layers, wide enough for those that were dense in the teacher."""
    dense = len(teacher.moe_layers) < int(teacher.config.num_hidden_layers)
    return max(plan_width, int(teacher.config.intermediate_size)) if dense else plan_width


def student_config(teacher: Teacher, width: int) -> dict[str, Any]:
    """The student's config.json: the teacher's as on disk, without what only experts need."""
    family = teacher.family
    dropped = NEVER_INHERITED | family.dropped_config_keys
    kept = {key: value for key, value in teacher.raw_config.items() if key not in dropped}
    return {
        **kept,
        "architectures": [family.student_architecture],
        "model_type": family.student_model_type,
        "intermediate_size": width,
    }


def merge_gate_or_up(read: Callable[[int], Tensor], plan: LayerPlan) -> Tensor:
    """Gate or up projection [plan width, H]: the groups' averages, one below the other.

    read(expert) gives the expert's tensor [I, H]. A group of one is copied exactly.
    """
    parts = []
    for group in plan.groups:
        part = _average(read, group.experts, group.weights)
        parts.append(part if group.neurons is None else part[list(group.neurons)])
    return torch.cat(parts)


def merge_down(read: Callable[[int], Tensor], plan: LayerPlan) -> Tensor:
    """Down projection [H, plan width]: the groups' averages side by side, each times its scale.

    read(expert) gives the expert's tensor [H, I].
    """
    parts = []
    for group in plan.groups:
        part = _average(read, group.experts, group.weights)
        part = part if group.neurons is None else part[:, list(group.neurons)]
        parts.append((part.float() * group.scale).to(part.dtype))
    return torch.cat(parts, dim=1)


def _average(
    read: Callable[[int], Tensor], experts: tuple[int, ...], weights: tuple[float, ...]
) -> Tensor:
    if len(experts) == 1:
        return read(experts[0])
    total = None
    for expert, weight in zip(experts, weights, strict=True):
        tensor = read(expert)
        part = tensor.float() * weight  # summed in float32, rounded once
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(tensor.dtype)


def pad_to(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` with zeros after its own values, which changes nothing that an FFN computes."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


class StudentTensors:
    """Every tensor of the student, made on request from the teacher's checkpoint and the plan.

    `shapes` are those of the student's stock class; `read` may be replaced by one that keeps
    tensors in memory.
    """

    def __init__(
        self,
        family: Family,
        checkpoint: Checkpoint,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype | None = None,
        read: Callable[[str], Tensor] | None = None,
    ):
        self.family, self.checkpoint, self.shapes, self.dtype = family, checkpoint, shapes, dtype
        self.read = read or checkpoint.read
        self.is_feed_forward = dense_pattern(family).fullmatch

    def specs(self, plan: Plan) -> dict[str, Spec]:
        """dtype and shape of every tensor of the student, in the order of its layers.

        Raises UserError where the teacher lacks what the student needs.
        """
        sources = {name: name for name in self.shapes}
        for layer in plan.layers:
            first = {"layer": layer.layer, "expert": layer.groups[0].experts[0]}
            for dense, of_expert in self._projections():
                sources[dense.format(**first)] = of_expert.format(**first)
        return {
            name: (self.dtype or self.checkpoint.entry(source).dtype, self.shapes[name])
            for name, source in sources.items()
        }

    def _projections(self) -> tuple[tuple[str, str], ...]:
        family = self.family
        return (
            (family.dense_gate_proj, family.gate_proj),
            (family.dense_up_proj, family.up_proj),
            (family.dense_down_proj, family.down_proj),
        )

    def feed_forward_names(self, layer: int) -> list[str]:
        """Names of the student's gate, up and down projection in a layer."""
        return [dense.format(layer=layer) for dense, _ in self._projections()]

    def make(self, name: str, plan: Plan) -> Tensor:
        """The tensor of that name, whole, in the student's dtype and shape."""
        for layer in plan.layers:
            for dense, of_expert in self._projections():
                if name == dense.format(layer=layer.layer):
                    return self._fit(name, self._merge(layer, dense, of_expert))
        return self._fit(name, self.read(name))

    def _merge(self, layer: LayerPlan, dense: str, of_expert: str) -> Tensor:
        def read(expert: int) -> Tensor:
            return self.read(of_expert.format(layer=layer.layer, expert=expert))

        down = dense == self.family.dense_down_proj
        return merge_down(read, layer) if down else merge_gate_or_up(read, layer)

    def _fit(self, name: str, tensor: Tensor) -> Tensor:
        shape = self.shapes[name]
        tensor = tensor.to(self.dtype or tensor.dtype)
        # Only an FFN may be narrower than the student's one width.
        if self.is_feed_forward(name) and all(map(operator.le, tensor.shape, shape)):
            tensor = pad_to(tensor, shape)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.checkpoint.folder}: {name} would be {list(tensor.shape)}, but the config "
                f"implies {list(shape)}"
            )
        return tensor


def stored_shapes(skeleton: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this model holds: tied tensors once."""
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    return {
        name: tuple(tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if name not in tied
    }
