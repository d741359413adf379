"""A student's folder in the form that more programs take: the same function, cut into experts.

Two kinds of students are refused by vLLM as they are (docs/serving.md): those of a class with one
expert, under tensor parallelism, which wants at least as many experts as devices; and those that
are dense in every layer but of a class that it takes for Mixture-of-Experts alone. The first get N
experts, the second one last layer of N experts and a shared one. The experts are equal slices of
the FFN, and all are always taken: the router is zeros, and its top-k is N.

Shapes: N experts, H hidden size, W the FFN's intermediate size, S = W / N that of a slice.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.artifacts import atomic_path, require_absent
from m2d.errors import UserError
from m2d.models.load import load_model
from m2d.models.routers import probe
from m2d.models.skeleton import experts_modules, has_module, layers_of, make_skeleton, stack_of
from m2d.models.student_config import set_key
from m2d.models.teacher import dtype_of, read_config
from m2d.students.files import copy_others, write_record
from m2d.students.merge import write_into
from m2d.students.record import read_record
from m2d.students.spelling import both_spellings
from m2d.students.tensors import pad_to

# Classes that vLLM refuses without a MoE layer -> the config keys of one whose last layer is such,
# beside the number of experts. L stands for the layers but the last, N for the experts.
LAST_LAYER: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "first_k_dense_replace": "L",
        "n_routed_experts": "N",
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": "N",
    },
    "afmoe": {
        "num_dense_layers": "L",
        "num_experts": "N",
        "n_group": 1,
        "topk_group": 1,
        "num_shared_experts": 1,
        "route_norm": True,
        "route_scale": "N",
    },
    "hy_v3": {
        "mlp_layer_types": ["dense", "sparse"],
        "first_k_dense_replace": "L",
        "num_experts": "N",
        "num_shared_experts": 1,
        "route_norm": True,
        "router_scaling_factor": "N",
    },
}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k")
GROUP_KEYS = ("n_group", "num_expert_group", "topk_group")
WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
MULTIPLE = 8  # of a slice's width, as transformers' grouped products and their kernels want it
PROBE_TOKENS = 3


def export_folder(student: str | Path, out: str | Path, experts: int = 2) -> str:
    """Write the student with its FFNs cut into so many experts; returns what was done, in words.

    The function is the same: to the last bit where `experts` is a power of 2, else to rounding.
    Raises UserError where the student's class needs no such form, or the width does not allow it.
    """
    require_absent(out)
    folder = Path(student)
    raw, config = read_config(folder)
    last = LAST_LAYER.get(config.model_type)
    model = load_model(folder, config, dtype_of(config, folder), "cpu")
    found = experts_modules(model)
    if found:
        changes = _more_experts(config, model, found, experts)
        done = f"{experts} experts in every layer, slices of the FFN"
    elif last:
        changes = _last_layer(config, last, experts)
        done = f"a last layer of {experts} experts and a shared one, slices of the FFN"
    else:
        raise UserError(
            f"{student}: dense, and of a class that every program takes as it is; nothing to do"
        )
    new = copy.deepcopy(raw)
    for key, value in changes.items():
        set_key(new, type(config), key, value)
    new = both_spellings(new)
    target = make_skeleton(CONFIG_MAPPING[new["model_type"]].from_dict(dict(new)), folder)
    state = _state(model, target, _scale(model, target))
    target.load_state_dict(state, strict=True, assign=True)
    target.tie_weights()
    with atomic_path(out) as temporary:
        target.save_pretrained(temporary)
        copy_others(folder, temporary)
        write_into(temporary, "config.json", new)
        if (folder / "m2d.json").is_file():
            write_record(temporary, read_record(folder / "m2d.json"))
        elif (folder / "README.md").is_file():
            (temporary / "README.md").write_bytes((folder / "README.md").read_bytes())
    return done


def _more_experts(
    config: Any, model: PreTrainedModel, found: dict[int, str], experts: int
) -> dict[str, Any]:
    """Config keys of the same class with so many experts instead of one."""
    layer = min(found)
    stack = stack_of(layers_of(model)[layer].get_submodule(found[layer]))
    if stack.count != 1:
        raise UserError(f"it has {stack.count} experts in a layer; a student with one is cut")
    if stack.rows:
        raise UserError("its class keeps all experts in one matrix, which m2d does not cut")
    width = stack.width
    if width % (experts * MULTIPLE):
        raise UserError(
            f"--experts {experts}: the FFN is {width} wide, which is no multiple of "
            f"{experts} x {MULTIPLE}"
        )
    keys: dict[str, Any] = {}
    for names, value in ((EXPERT_KEYS, experts), (TOP_K_KEYS, experts), (GROUP_KEYS, 1)):
        keys |= {name: value for name in names if isinstance(getattr(config, name, None), int)}
    # The width of an expert: the first key that has it.
    key = next(name for name in WIDTH_KEYS if getattr(config, name, None) == width)
    return keys | {key: width // experts}


def _last_layer(config: Any, keys: dict[str, Any], experts: int) -> dict[str, Any]:
    """Config keys of the same class whose last layer has experts."""
    layers = int(config.num_hidden_layers)
    values = {"L": layers - 1, "N": experts}
    found = {key: values.get(value, value) if isinstance(value, str) else value
             for key, value in keys.items()}  # fmt: skip
    if "mlp_layer_types" in found:
        found["mlp_layer_types"] = ["dense"] * (layers - 1) + ["sparse"]
    for key in ("routed_scaling_factor", "route_scale", "router_scaling_factor"):
        if key in found:
            found[key] = float(found[key])
    # The shared expert is one more slice; zeros fill the last.
    width = -(-int(config.intermediate_size) // ((experts + 1) * MULTIPLE)) * MULTIPLE
    return found | {"num_experts_per_tok": experts, "moe_intermediate_size": width}


@dataclass(frozen=True)
class FeedForward:
    """An FFN: gate and up [W, H], down [H, W], and the biases [W], [W], [H] where there are any."""

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None = None

    def part(self, start: int, end: int) -> "FeedForward":
        """Columns start to end of W; zeros beyond it. The down projection's bias is left whole."""

        def cut(tensor: Tensor, axis: int) -> Tensor:
            short = tensor.narrow(axis, start, max(0, min(end, tensor.shape[axis]) - start))
            shape = list(tensor.shape)
            shape[axis] = end - start
            return pad_to(short, tuple(shape))

        biases = self.biases and (cut(self.biases[0], 0), cut(self.biases[1], 0), self.biases[2])
        return FeedForward(cut(self.gate, 0), cut(self.up, 0), cut(self.down, 1), biases)


def _of_experts(experts: Any) -> FeedForward:
    """The one expert of a module with transformers' common interface."""
    both, down = experts.gate_up_proj[0], experts.down_proj[0]
    if experts.is_transposed:
        both, down = both.T, down.T
    gate, up = both.chunk(2) if experts.is_concatenated else (both[::2], both[1::2])
    if not experts.has_bias:
        return FeedForward(gate, up, down)
    bias = experts.gate_up_proj_bias[0]
    halves = bias.chunk(2) if experts.is_concatenated else (bias[::2], bias[1::2])
    return FeedForward(gate, up, down, (*halves, experts.down_proj_bias[0]))


def _to_experts(experts: Any, parts: list[FeedForward], scale: float) -> dict[str, Tensor]:
    """Parameters of such a module of these slices, whose weights are to add up to 1 / scale."""

    def fused(gate: Tensor, up: Tensor) -> Tensor:
        if experts.is_concatenated:
            return torch.cat([gate, up])
        return torch.stack([gate, up], dim=1).flatten(0, 1)

    transposed = (lambda tensor: tensor.T) if experts.is_transposed else (lambda tensor: tensor)
    made = {
        "gate_up_proj": torch.stack([transposed(fused(p.gate, p.up)) for p in parts]),
        "down_proj": torch.stack([transposed(p.down * scale) for p in parts]),
    }
    if experts.has_bias:
        biases = [p.biases for p in parts if p.biases]
        made["gate_up_proj_bias"] = torch.stack([fused(gate, up) for gate, up, _ in biases])
        made["down_proj_bias"] = torch.stack([down * (scale / len(parts)) for *_, down in biases])
    return {name: tensor.contiguous() for name, tensor in made.items()}


@torch.no_grad()
def _state(model: PreTrainedModel, target: PreTrainedModel, scale: float) -> dict[str, Tensor]:
    """Every parameter and buffer of `target`, made of the student's."""
    made: dict[str, Tensor] = {}
    for layer, path in experts_modules(target).items():
        experts: Any = layers_of(target)[layer].get_submodule(path)
        count = experts.down_proj.shape[0]
        width = experts.down_proj.shape[1 if experts.is_transposed else 2]
        block_path = path.rpartition(".")[0]
        block: Any = layers_of(model)[layer].get_submodule(block_path)
        before = f"{target.base_model_prefix}.layers.{layer}."
        if has_module(layers_of(model)[layer], path):
            whole, first = _of_experts(layers_of(model)[layer].get_submodule(path)), 0
        else:  # dense: the first slice is the shared expert
            whole, first = (
                FeedForward(block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight),
                1,
            )
            shared = whole.part(0, width)
            for name in ("gate", "up", "down"):
                made[f"{before}{block_path}.shared_experts.{name}_proj.weight"] = getattr(
                    shared, name
                ).contiguous()
        parts = [whole.part(i * width, (i + 1) * width) for i in range(first, first + count)]
        for name, tensor in _to_experts(experts, parts, scale).items():
            made[f"{before}{path}.{name}"] = tensor
    own = model.state_dict()
    for name, tensor in target.state_dict().items():
        if name in made:
            continue
        same = name in own and own[name].shape == tensor.shape
        kind = own[name].dtype if name in own else model.dtype
        # What has another shape, or is new, is of the router: zeros.
        made[name] = own[name] if same else torch.zeros(tensor.shape, dtype=kind)
    return made


def _scale(model: PreTrainedModel, target: PreTrainedModel) -> float:
    """What the slices' down projections are multiplied by, for the weights that a class gives."""
    own = weight_of_each(model) if experts_modules(model) else 1.0
    return own / weight_of_each(target)


def weight_of_each(model: PreTrainedModel) -> float:
    """The weight that a router of zeros gives to each of its experts, all of which are taken.

    Raises UserError where they are not, or not alike.
    """
    layer, path = next(iter(experts_modules(model).items()))
    block_path, _, name = path.rpartition(".")
    block = layers_of(model)[layer].get_submodule(block_path)
    router = next(child for child, _ in block.named_children() if child in ("gate", "router"))
    size = model.config.get_text_config().hidden_size
    hidden = torch.randn(PROBE_TOKENS, size, generator=torch.Generator().manual_seed(0))
    _, _, recorder = probe(block, name, router, hidden, seed=None)
    weights, taken = recorder.weights, recorder.index.sort(-1).values
    experts: Any = block.get_submodule(name)
    everyone = torch.arange(experts.down_proj.shape[0]).expand_as(taken)
    if not torch.equal(taken, everyone) or weights.min() <= 0 or weights.min() != weights.max():
        raise UserError("this class does not take all experts alike under a router of zeros")
    return float(weights[0, 0])
