"""The student's class of a family: a dense sibling, the class itself all dense, or with experts.

Each is built on the meta device and compared with the teacher, name by name and shape by shape, and
what its FFN computes is compared on random numbers, so that nothing is lost unseen.
"""

import copy
import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.errors import UserError
from m2d.models.families import SIBLINGS, TEXT_SIBLINGS, Family, Of
from m2d.models.routers import probe
from m2d.models.skeleton import (
    above,
    experts_modules,
    head_path,
    layers_of,
    layers_path,
    stack_of,
    text_key,
)
from m2d.models.student_config import holds_any_text, number, student_raw, student_skeleton

GROUPS = ("n_group", "num_expert_group", "topk_group")
PROBE_TOKENS = 5
PROBE_WIDTH = 64
# Config keys that hold the width of a dense layer's FFN, of whatever class.
DENSE_WIDTHS = re.compile(r"intermediate|ffn")
Fields = dict[str, Any]


def with_student(
    family: Family,
    config: PretrainedConfig,
    skeleton: PreTrainedModel,
    layer: int,
    student_class: str,
    text_only: bool,
    unsupported: str,
) -> Family:
    """The family with its student's class settled. layer: one that has experts.

    Raises UserError where there is none.
    """
    if text_only:
        if text_key(config) is None:
            raise UserError(f"{unsupported} has no parts other than text; leave out --text-only")
        family = Family(**{**family.__dict__, "text_only": True})
    kinds = [_sibling, _all_dense, _one_expert, _several_experts]
    if student_class == "same":
        kinds = [_one_expert, _several_experts, _all_dense]
    for kind in kinds:
        for fields in kind(family, config):
            try:
                found = _checked(Family(**{**family.__dict__, **fields}), config, skeleton, layer)
            except Exception:
                continue
            if found is not None:
                return found
    raise UserError(
        f"{unsupported} can neither route to a fixed set of experts nor be dense in every layer: "
        + ("it has no student" if student_class != "same" else "leave out --student-class same")
    )


def _sibling(family: Family, config: PretrainedConfig) -> Iterator[Fields]:
    """Students of a dense class."""
    kind = config.model_type.removesuffix("_text")
    if holds_any_text(config):
        kind = config.get_text_config().model_type
    sibling = SIBLINGS.get(kind)
    if family.text_only or config.model_type != kind:
        sibling = TEXT_SIBLINGS.get(kind, sibling)
    if sibling is None:
        return
    outer = CONFIG_MAPPING[sibling]
    inner: Any = getattr(outer, "sub_configs", {}).get("text_config", outer)
    yield {"student_model_type": inner.model_type, "width_key": "intermediate_size"}


def _all_dense(family: Family, config: PretrainedConfig) -> Iterator[Fields]:
    """Students of the class itself without a single MoE layer."""
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    options: list[Fields] = [
        {"mlp_layer_types": ["dense"] * layers},
        {"first_k_dense_replace": Of("num_hidden_layers")},
        {"num_dense_layers": Of("num_hidden_layers")},
        {"moe_layer_start_index": Of("num_hidden_layers")},
        {"moe_layers": []},
        {"mlp_only_layers": list(range(layers))},
        {family.num_experts: 1},  # a class may take one expert for none
    ]
    types = list(getattr(text, "layer_types", None) or [])
    if "moe" in types:
        options.append({"layer_types": ["mlp" if kind == "moe" else kind for kind in types]})
    extra = {"num_nextn_predict_layers": 0} if hasattr(text, "num_nextn_predict_layers") else {}
    widths = [
        k
        for k in text.to_dict()
        if DENSE_WIDTHS.search(k) and isinstance(getattr(text, k, None), int)
    ]
    widths.sort(key=lambda key: (key != "intermediate_size", "moe" in key or "shared" in key, key))
    for changes in options:
        if all(getattr(text, key, None) is not None for key in changes):
            for width in widths[:4]:
                yield {"student_config": {**changes, **extra}, "width_key": width}


def _one_expert(family: Family, config: PretrainedConfig) -> Iterator[Fields]:
    """Students of the class itself with one expert."""
    yield from _with_experts(family, config, 1)


def _several_experts(family: Family, config: PretrainedConfig) -> Iterator[Fields]:
    """Students of the class itself with as many experts as a token takes."""
    yield from _with_experts(family, config, int(number(config.get_text_config(), family.top_k)))


def _with_experts(family: Family, config: PretrainedConfig, count: int) -> Iterator[Fields]:
    text = config.get_text_config()
    groups = {key: 1 for key in GROUPS if isinstance(getattr(text, key, None), int)}
    noise = {key: 0.0 for key in keys_of(text) if "jitter" in key and attrgetter(key)(text)}
    yield {
        "student_experts": count,
        "width_key": family.expert_width,
        "student_config": {family.num_experts: count, family.top_k: count} | groups | noise,
    }


def keys_of(config: PretrainedConfig) -> list[str]:
    """A config's keys, and those of configs in it after a dot."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    found = [key for key in config.to_dict() if key not in inner]
    for name, sub in inner.items():
        found += [f"{name}.{key}" for key in sub.to_dict()] if sub is not None else []
    return found


def _checked(
    family: Family, config: PretrainedConfig, teacher: PreTrainedModel, layer: int
) -> Family | None:
    """The family, its student's class tried, with what was found; None where it does not fit."""
    width = PROBE_WIDTH
    if family.student_experts:
        width = number(config.get_text_config(), family.expert_width)
        width *= 2 if family.student_experts == 1 else 1
    raw = student_raw(family, config, config.to_dict(), {family.width_key: width})
    student = student_skeleton(raw, family.model_type)
    fields: Fields = {
        "student_architecture": type(student).__name__,
        "student_layers": layers_path(student),
        "student_head": head_path(student),
    }
    if family.student_experts:
        weights = _weights_of_each(family, config, teacher, student, layer, width)
        if weights is None:
            return None
        fields["expert_weights"] = weights
    else:
        found = _dense_fields(family, config, teacher, student, layer)
        if found is None:
            return None
        fields |= found
    family = Family(**{**family.__dict__, **fields})
    return family if _rest_is_the_same(family, teacher, student) else None


def _rest_is_the_same(family: Family, teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Whether both have the same parameters but for the MoE layers' blocks and dense FFNs."""
    block = family.block or family.experts
    inside = family.dense if not family.student_experts else block
    ffn = re.compile(r"\d+\.(" + "|".join(map(re.escape, {block, inside})) + r")\..*")

    def rest(model: PreTrainedModel, layers: str, head: str) -> dict[str, tuple[int, ...]]:
        decoder = above(layers)
        kept = {}
        for name, tensor in model.state_dict().items():
            if name.startswith(layers + "."):
                own = name.removeprefix(layers + ".")
                if not ffn.fullmatch(own):
                    kept[own] = tuple(tensor.shape)
            elif name.startswith(decoder):
                kept[f"decoder.{name.removeprefix(decoder)}"] = tuple(tensor.shape)
        return kept

    ours = rest(student, family.student_layers or family.layers, family.student_head or family.head)
    return ours == _without_experts(rest(teacher, family.layers, family.head), ours, family)


def _without_experts(
    theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]], family: Family
) -> dict[str, tuple[int, ...]]:
    """The teacher's shapes, those of one element per expert as the student has them."""
    if not family.student_experts:
        return theirs
    router = re.compile(r"\d+\." + re.escape(family.router.partition(".")[0]) + r"\..*")
    return {
        name: ours.get(name, shape) if router.fullmatch(name) else shape
        for name, shape in theirs.items()
    }


def _weights_of_each(
    family: Family,
    config: PretrainedConfig,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layer: int,
    width: int,
) -> tuple[float, ...] | None:
    """The weights that a router of zeros gives the student's experts; None if tokens differ."""
    block_path, name = family.block, family.experts.removeprefix(f"{family.block}.")
    router = family.router.removeprefix(f"{block_path}.")
    theirs, block = layers_of(teacher)[layer], layers_of(student)[layer]
    if block_path:
        theirs, block = theirs.get_submodule(block_path), block.get_submodule(block_path)
    stack = stack_of(block.get_submodule(name))
    if (stack.count, stack.width) != (family.student_experts, width):
        return None
    if not _same_but_for_experts(theirs, block, name, router):
        return None  # shared experts would grow as well
    if family.scales_input:
        return None  # the weight is in the input, and enters what experts compute
    if not block_path:
        return (1.0,) if family.student_experts == 1 else None
    hidden = torch.randn(
        PROBE_TOKENS,
        config.get_text_config().hidden_size,
        generator=torch.Generator().manual_seed(4),
    )
    _, _, recorder = probe(block, name, router, hidden, seed=None)
    weights = recorder.weights.double().reshape(PROBE_TOKENS, -1)
    taken, order = recorder.index.reshape(PROBE_TOKENS, -1).sort(-1)
    weights = weights.gather(-1, order)
    everyone = torch.arange(family.student_experts).expand_as(taken)
    if not torch.equal(taken, everyone) or weights.min() <= 0:
        return None
    alike = bool(((weights - weights[0]).abs() < 1e-6 * weights[0]).all())
    return tuple(weights[0].tolist()) if alike else None


def _same_but_for_experts(
    teacher: nn.Module, student: nn.Module, experts: str, router: str
) -> bool:
    """Whether two blocks agree in all but the experts and what has one element per expert."""
    count = teacher.get_parameter(f"{router}.weight").shape[0]
    of_student = dict(student.named_parameters())
    return all(
        name in of_student and of_student[name].shape == parameter.shape
        for name, parameter in teacher.named_parameters()
        if not name.startswith(f"{experts}.") and count not in parameter.shape
    )


def _dense_fields(
    family: Family,
    config: PretrainedConfig,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layer: int,
) -> Fields | None:
    """What a dense student's FFN takes from the teacher's block; None where it cannot be it."""
    if experts_modules(student):
        return None
    block_path, name = family.block, family.experts.removeprefix(f"{family.block}.")
    if not block_path:
        return None
    block = layers_of(teacher)[layer].get_submodule(block_path)
    ours = layers_of(student)[layer]
    dense_path = next(
        (path for path in (block_path, "mlp", "feed_forward", "mixer") if _has_ffn(ours, path)),
        None,
    )
    if dense_path is None:
        return None
    dense = ours.get_submodule(dense_path)
    names = {n for n, _ in dense.named_parameters()}
    if names != {f"{part}.weight" for part in family.projections} or family.biases:
        return None
    if dense.get_parameter("down_proj.weight").shape[1] != PROBE_WIDTH:
        return None
    if not _same_activation(family, block.get_submodule(name), dense):
        return None
    found = _parts_of_block(family, config, block, block_path, name)
    return None if found is None else {"dense": dense_path, **found}


def _has_ffn(layer: nn.Module, path: str) -> bool:
    return f"{path}.down_proj.weight" in dict(layer.named_parameters())


def _parts_of_block(
    family: Family, config: PretrainedConfig, block: nn.Module, path: str, experts: str
) -> Fields | None:
    """What the block adds to its experts' sum and multiplies it by; None where that is not all."""
    router = family.router.removeprefix(f"{path}.")
    children = dict(block.named_children())
    own = {experts.partition(".")[0], router.partition(".")[0]}
    shared = [n for n, child in children.items() if n not in own and _has_ffn(block, n)]
    gates = [
        n
        for n, child in children.items()
        if isinstance(child, nn.Linear) and child.out_features == 1 and child.bias is None
    ]
    rest = {n.partition(".")[0] for n, _ in block.named_parameters()} - own
    direct = {n for n, _ in block.named_parameters(recurse=False)}
    if len(shared) > 1 or len(gates) > len(shared) or rest - direct - {*shared, *gates}:
        return None
    fields: Fields = {
        "shared": f"{path}.{shared[0]}" if shared else None,
        "shared_gate": f"{path}.{gates[0]}" if gates else None,
    }
    if family.scales_input:
        return fields
    size = config.get_text_config().hidden_size
    hidden = torch.randn(PROBE_TOKENS, size, generator=torch.Generator().manual_seed(5))
    real, output, recorder = probe(block, experts, router, hidden, seed=6)
    with torch.no_grad():
        others: Tensor | float = 0.0
        if shared:
            others = real.get_submodule(shared[0])(hidden)
            if gates:
                others = torch.sigmoid(real.get_submodule(gates[0])(hidden)) * others
    left = (output - others).double()
    factor = float((left * recorder.answer).sum() / recorder.answer.double().square().sum())
    if not torch.allclose(left.float(), factor * recorder.answer, rtol=1e-4, atol=1e-4):
        return None
    return {**fields, "routed_factor": 1.0 if abs(factor - 1) < 1e-6 else factor}


def _same_activation(family: Family, experts: Any, dense: nn.Module) -> bool:
    """Whether a dense FFN computes what an expert of the same weights does, on random numbers."""
    from m2d.models.experts import stock_glu

    generator = torch.Generator().manual_seed(7)
    real = copy.deepcopy(dense).to_empty(device="cpu").float()
    weights = {}
    for name, parameter in real.named_parameters():
        scale = 2.0 / parameter.shape[1] ** 0.5
        weights[name] = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(weights[name])
    size = weights["up_proj.weight"].shape[1]
    hidden = torch.randn(PROBE_TOKENS, size, generator=generator)
    halves = [functional.linear(hidden, weights[f"{p}.weight"]) for p in family.projections[:-1]]
    inner = stock_glu(experts, family)(torch.cat(halves, -1))
    expected = functional.linear(inner, weights["down_proj.weight"])
    with torch.no_grad():
        return torch.allclose(real(hidden), expected, rtol=1e-4, atol=1e-4)
