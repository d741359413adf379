"""A family entry for a model that has none: read off its stock class.

What is asked of the class is transformers' common experts interface: fused `gate_up_proj` and
`down_proj`, and `forward(hidden_states, top_k_index, top_k_weights)`. How its router weighs is
found by running it on random numbers. The student is the same class with one expert and top-1,
exact whatever else is in the block; where the class cannot route to a single expert, it is the same
class with every layer dense, if its block is found to be the plain sum that this needs.
"""

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from m2d.errors import UserError
from m2d.models.families import DESCRIBED, FAMILIES, Family, Of
from m2d.models.routers import kind_of_probabilities, probe, router_logits
from m2d.models.skeleton import experts_modules, has_module, layers_of, make_skeleton

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_KS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
GROUPS = ("n_group", "num_expert_group", "topk_group")
PROBE_TOKENS = 5


def describe(config: PretrainedConfig, skeleton: PreTrainedModel, where: str) -> Family:
    """The family of a model outside FAMILIES, also kept in DESCRIBED.

    Raises UserError with what is missing.
    """
    unsupported = f"{where}: model_type {config.model_type!r}"
    if config.get_text_config() is not config:
        raise UserError(f"{unsupported} has parts other than text; m2d converts language models")
    found = experts_modules(skeleton)
    if not found:
        raise UserError(
            f"{unsupported} is not a Mixture-of-Experts family that m2d knows: no layer has "
            f"experts with transformers' common interface; known: {', '.join(sorted(FAMILIES))}"
        )
    paths = set(found.values())
    if len(paths) > 1 or len(set(found)) != len(found):
        raise UserError(f"{unsupported} has experts in several places: {', '.join(sorted(paths))}")
    path, first = paths.pop(), min(found)
    layer = layers_of(skeleton)[first]
    experts: Any = layer.get_submodule(path)
    if not experts.has_gate or experts.has_post_expert_norm:
        raise UserError(f"{unsupported} has experts without a gate, or with a norm of their own")
    block_path, _, name = path.rpartition(".")
    block = layer.get_submodule(block_path)
    count, width = (
        experts.down_proj.shape[0],
        experts.down_proj.shape[1 if experts.is_transposed else 2],
    )
    router = _router(block, name, count)
    if router is None:
        raise UserError(f"{unsupported} has a router without one row of weights per expert")
    keys = {
        "num_experts": _key(config, EXPERT_COUNTS, count),
        "top_k": _key(config, TOP_KS, None),
        "expert_width": _key(config, WIDTHS, width),
    }
    missing = [key for key, value in keys.items() if value is None]
    if missing:
        raise UserError(f"{unsupported}: no config key is recognised as {', '.join(missing)}")
    family = Family(
        model_type=config.model_type,
        student_model_type=config.model_type,
        student_architecture=type(skeleton).__name__,
        **keys,  # type: ignore[arg-type]
        experts=path,
        router=f"{block_path}.{router}",
        probabilities=_probabilities(block, name, router, config, unsupported),
        glu="stock",
        biases=experts.has_bias,
        renames=_renames(skeleton),
        transposed=experts.is_transposed,
        interleaved=not experts.is_concatenated,
        layers=f"{skeleton.base_model_prefix}.layers",
    )
    family = _with_student(family, config, block, first, unsupported)
    DESCRIBED[config.model_type] = family
    return family


def _router(block: nn.Module, experts: str, count: int) -> str | None:
    """Path, in the block, of what has a weight of one row per expert."""
    for path, module in block.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        rows = weight is not None and weight.dim() == 2 and weight.shape[0] == count
        if rows and not path.startswith((experts, "shared")):
            return path
    return None


def _key(config: PretrainedConfig, names: tuple[str, ...], value: int | None) -> str | None:
    """The first config key of those names, with that value if one is given."""
    return next(
        (
            name
            for name in names
            if isinstance(getattr(config, name, None), int)
            and value in (None, getattr(config, name))
        ),
        None,
    )


def _probabilities(
    block: nn.Module, experts: str, router: str, config: PretrainedConfig, unsupported: str
) -> str:
    """Whether the router's weights are proportional to a softmax or to sigmoids of its logits."""
    hidden = torch.randn(
        PROBE_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(2)
    )
    try:
        real, _, recorder = probe(block, experts, router, hidden, seed=3)
        logits = router_logits(real.get_submodule(router), hidden)
        kind = kind_of_probabilities(logits, recorder.index, recorder.weights)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{unsupported}: its router could not be run alone ({reason[0] if reason else error})"
        ) from None
    if kind is None:
        raise UserError(
            f"{unsupported} has a router whose weights are neither a softmax nor sigmoids of its "
            "logits"
        )
    return kind


def _renames(skeleton: PreTrainedModel) -> tuple[tuple[str, str], ...]:
    """transformers' own renaming of this model's tensors, per-expert ones to canonical names."""
    renames = []
    for transform in get_model_conversion_mapping(skeleton, add_legacy=False):
        target = transform.target_patterns[0]
        if type(transform) is WeightRenaming:
            for source in transform.source_patterns:
                pattern = source.replace("*.", r".*\.")
                end = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
                renames.append((pattern + end, target))
        elif isinstance(transform, WeightConverter) and target.endswith("_proj"):
            stem, _, fused = target.rpartition(".")
            halves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
            if not stem.endswith("experts") or len(transform.source_patterns) != len(halves):
                continue
            for source, half in zip(transform.source_patterns, halves, strict=True):
                plain = re.escape(source.replace("\\", ""))
                renames.append((plain.replace(r"\*", r"(\d+)") + "$", rf"{stem}.\1.{half}.weight"))
    return tuple(renames)


def _with_student(
    family: Family, config: PretrainedConfig, block: nn.Module, layer: int, unsupported: str
) -> Family:
    """The family with its student's class settled: one expert, or all layers dense."""
    single = copy.copy(family.__dict__)
    single |= {
        "one_expert": True,
        "width_key": family.expert_width,
        "student_config": {family.num_experts: 1, family.top_k: 1}
        | {key: 1 for key in GROUPS if isinstance(getattr(config, key, None), int)},
    }
    weight = _weight_of_one(Family(**single), config, block, layer)
    if weight is not None:
        return Family(**{**single, "one_expert_weight": weight})
    dense = copy.copy(family.__dict__) | _all_dense(family, config, block, layer)
    if dense["student_config"]:
        return Family(**dense)
    raise UserError(
        f"{unsupported} can neither route to one expert nor be dense in every layer: it has no "
        "student"
    )


def _student_skeleton(family: Family, config: PretrainedConfig, width: int) -> PreTrainedModel:
    values = {
        key: getattr(config, value.key) if isinstance(value, Of) else value
        for key, value in family.student_config.items()
    }
    student = copy.deepcopy(config)
    for key, value in {**values, family.width_key: width}.items():
        setattr(student, key, value)
    return make_skeleton(student, config.model_type)


def _same_but_for_experts(
    teacher: nn.Module, student: nn.Module, experts: str, router: str
) -> bool:
    """Whether two blocks agree in all but the experts and what has one element per expert."""
    count = teacher.get_parameter(f"{router}.weight").shape[0]
    of_student = dict(student.named_parameters())
    return all(
        name in of_student and of_student[name].shape == parameter.shape
        for name, parameter in teacher.named_parameters()
        if not name.startswith(experts) and count not in parameter.shape
    )


def _weight_of_one(
    family: Family, config: PretrainedConfig, teacher: nn.Module, layer: int
) -> float | None:
    """The weight that a router of one expert gives it; None where that cannot be."""
    block_path, _, name = family.experts.rpartition(".")
    router = family.router.removeprefix(f"{block_path}.")
    hidden = torch.randn(
        PROBE_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(4)
    )
    try:
        width = 2 * getattr(config, family.expert_width)
        student = _student_skeleton(family, config, width)
        block = layers_of(student)[layer].get_submodule(block_path)
        shape = tuple(block.get_parameter(f"{name}.down_proj").shape)
        if shape[0] != 1 or shape[1 if family.transposed else 2] != width:
            return None
        if not _same_but_for_experts(teacher, block, name, router):
            return None  # shared experts would grow as well
        _, _, recorder = probe(block, name, router, hidden, seed=None)
    except Exception:
        return None
    weights = recorder.weights.double().reshape(-1)
    if recorder.index.any() or len(weights) != PROBE_TOKENS or weights.min() <= 0:
        return None
    return float(weights[0]) if bool((weights == weights[0]).all()) else None


def _all_dense(
    family: Family, config: PretrainedConfig, block: nn.Module, layer: int
) -> dict[str, Any]:
    """Fields of the family whose student is dense in every layer; empty where it is not exact."""
    block_path, _, name = family.experts.rpartition(".")
    router = family.router.removeprefix(f"{block_path}.")
    layers = int(config.num_hidden_layers)
    options: list[dict[str, Any]] = [
        {"mlp_layer_types": ["dense"] * layers},
        {"first_k_dense_replace": Of("num_hidden_layers")},
        {"num_dense_layers": Of("num_hidden_layers")},
        {"moe_layer_start_index": Of("num_hidden_layers")},
        {family.num_experts: 1},  # a class may take one expert for none
    ]
    hidden = torch.randn(
        PROBE_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(5)
    )
    for changes in options:
        if any(getattr(config, key, None) is None for key in changes):
            continue
        fields = {"student_config": changes, "dense": block_path, "shared": None}
        try:
            student = _student_skeleton(Family(**{**family.__dict__, **fields}), config, 64)
            if experts_modules(student):
                continue
            dense = layers_of(student)[layer].get_submodule(block_path)
            names = {n for n, _ in dense.named_parameters()}
            if names != {f"{half}_proj.weight" for half in ("gate", "up", "down")}:
                continue
            real, output, recorder = probe(block, name, router, hidden, seed=6)
        except Exception:
            continue
        expected = recorder.answer
        for child in ("shared_experts", "shared_expert"):
            if has_module(real, child):
                fields["shared"] = f"{block_path}.{child}"
                with torch.no_grad():
                    expected = expected + real.get_submodule(child)(hidden)
        activations = {type(getattr(m, "act_fn", None)) for m in (dense, block.get_submodule(name))}
        if torch.allclose(output, expected, rtol=1e-4, atol=1e-5) and len(activations) == 1:
            return fields
    return {}
