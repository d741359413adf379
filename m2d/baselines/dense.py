"""Dense models as data: which axis of which tensor is the hidden size, a head, a neuron.

All families here have Llama's blocks and names; they differ in norms and biases alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.baselines.importance import Cut, Shape
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, Spec
from m2d.models.families import Family
from m2d.models.hub import name_of
from m2d.models.student import NEVER_INHERITED, stored_shapes
from m2d.models.student_config import set_key
from m2d.models.teacher import (
    Teacher,
    check_weights,
    locate,
    make_skeleton,
    read_config,
)

DENSE = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# Module of a decoder layer -> axes of its weight; a bias has the first of them.
IN_LAYER: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("heads", "hidden"),
    "self_attn.k_proj": ("kv_heads", "hidden"),
    "self_attn.v_proj": ("kv_heads", "hidden"),
    "self_attn.o_proj": ("hidden", "heads"),
    "self_attn.q_norm": ("head_dim",),
    "self_attn.k_norm": ("head_dim",),
    "mlp.gate_proj": ("neurons", "hidden"),
    "mlp.up_proj": ("neurons", "hidden"),
    "mlp.down_proj": ("hidden", "neurons"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
}
OUTSIDE: dict[str, tuple[str, ...]] = {
    "model.embed_tokens": ("vocabulary", "hidden"),
    "model.norm": ("hidden",),
    "lm_head": ("vocabulary", "hidden"),
}
# Config key of each size of a Shape.
KEYS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
}


def open_dense(model: str | Path, config_only: bool = False) -> Teacher:
    """A dense model's config and skeleton, in a Teacher's form; no weight is read.

    Raises UserError for a missing folder or a family that is not in DENSE.
    """
    folder = locate(model, config_only)
    raw, config = read_config(folder)
    kind = raw["model_type"]
    if kind not in DENSE:
        raise UserError(
            f"{folder}: model_type is {kind!r}; structured pruning knows dense models of "
            f"{', '.join(DENSE)}"
        )
    family = Family(
        model_type=kind,
        teacher_text_type=kind,
        student_model_type=kind,
        student_architecture=DENSE[kind],
        num_experts="",
        top_k="",
        expert_width="",
    )
    dense = Teacher(folder, name_of(model), raw, config, family, make_skeleton(config, folder), [])
    check_weights(dense)
    return dense


def shape_of(teacher: Teacher) -> Shape:
    """The sizes that pruning can change."""
    return Shape(**{name: int(getattr(teacher.config, key)) for name, key in KEYS.items()})


def head_dim(teacher: Teacher) -> int:
    """D, which pruning leaves as it is."""
    own = getattr(teacher.config, "head_dim", None)
    shape = shape_of(teacher)
    return int(own or shape.hidden_size // shape.heads)


def pruned_config(teacher: Teacher, shape: Shape, layers: list[int]) -> dict[str, Any]:
    """config.json of the model pruned to `shape`, of whose layers `layers` stay."""
    raw = {k: v for k, v in teacher.raw_config.items() if k not in NEVER_INHERITED}
    for name, key in KEYS.items():
        if getattr(shape, name) != int(getattr(teacher.config, key)):
            set_key(raw, type(teacher.config), key, getattr(shape, name))
    if "head_dim" in raw or head_dim(teacher) != shape.hidden_size // shape.heads:
        raw["head_dim"] = head_dim(teacher)
    kinds = getattr(teacher.config, "layer_types", None)
    if kinds and ("layer_types" in raw or set(kinds) != {"full_attention"}):
        raw["layer_types"] = [kinds[layer] for layer in layers]
    raw["architectures"] = [DENSE[teacher.config.model_type]]
    return raw


def pruned_skeleton(teacher: Teacher, raw: dict[str, Any]) -> PreTrainedModel:
    """The stock class of a pruned config, on the meta device.

    Raises UserError where the class has no model of these sizes.
    """
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{teacher.folder}: cannot be pruned to these sizes ({reason})") from None
    return make_skeleton(config, teacher.folder)


def pruned_tensors(
    teacher: Teacher, cut: Cut, skeleton: PreTrainedModel
) -> tuple[dict[str, Spec], Callable[[str], Tensor]]:
    """dtype and shape of every tensor of the pruned model, and what reads one, cut to size.

    Raises UserError where the teacher lacks a tensor, or one is in no table above.
    """
    checkpoint = Checkpoint(teacher.folder)
    size = head_dim(teacher)
    shapes = stored_shapes(skeleton)
    sources = {name: _source(name, cut, teacher.folder) for name in shapes}
    specs = {
        name: (checkpoint.entry(source).dtype, shapes[name])
        for name, (source, _, _) in sources.items()
    }

    def read(name: str) -> Tensor:
        source, place, axes = sources[name]
        tensor = checkpoint.read(source)
        for dim, axis in enumerate(axes[: tensor.dim()]):
            if axis == "hidden":
                tensor = _take(tensor, dim, cut.hidden, 1)
            elif axis == "neurons":
                tensor = _take(tensor, dim, cut.neurons[place], 1)
            elif axis in ("heads", "kv_heads"):
                tensor = _take(tensor, dim, getattr(cut, axis)[place], size)
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{teacher.folder}: {source} would become {list(tensor.shape)}, but the config "
                f"implies {list(shapes[name])}"
            )
        return tensor

    return specs, read


def _take(tensor: Tensor, dim: int, kept: list[int], size: int) -> Tensor:
    """Blocks of `size` along `dim`, those with the numbers `kept`."""
    if not kept or kept[-1] >= tensor.shape[dim] // size:
        raise UserError(f"a tensor of {list(tensor.shape)} is smaller than the config implies")
    index = (torch.tensor(kept)[:, None] * size + torch.arange(size)).flatten()
    return tensor.index_select(dim, index)


def _source(name: str, cut: Cut, folder: Path) -> tuple[str, int, tuple[str, ...]]:
    """The teacher's tensor, the place of its layer among the kept ones, and its axes."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    axes = IN_LAYER.get(match[2]) if match else OUTSIDE.get(module)
    if axes is None or kind not in ("weight", "bias"):
        raise UserError(f"{folder}: structured pruning does not know the tensor {name!r}")
    if match is None:
        return name, 0, axes
    place = int(match[1])
    return f"model.layers.{cut.layers[place]}.{match[2]}.{kind}", place, axes
