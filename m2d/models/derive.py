"""A family read off its stock class: where its experts are, and how its router weighs.

What is asked of the class is a module per layer that holds all experts stacked, and, for most,
transformers' common experts interface, `forward(hidden_states, top_k_index, top_k_weights)`. How
the router weighs is found by running it on random numbers. m2d.models.sibling settles the student.
"""

import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from m2d.errors import UserError
from m2d.models.calls import BLOCKS
from m2d.models.families import DESCRIBED, FAMILIES, IMAGE_EXPERTS, Family
from m2d.models.names import names_of
from m2d.models.routers import kind_of_probabilities, probe, router_logits
from m2d.models.sibling import with_student
from m2d.models.skeleton import (
    experts_modules,
    head_path,
    layers_of,
    layers_path,
    reached_by_text,
    stack_of,
)

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_KS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
    "top_k_experts",
)  # fmt: skip
WIDTHS = (
    "moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size",
    "intermediate_size",
)  # fmt: skip
# Keys of other numbers than an expert's width, though they may be equal.
NOT_WIDTHS = re.compile("shared|dense|mlp|ple|vision")
PROBE_TOKENS = 5
# Why some are refused that look like any other.
REFUSED = {
    "diffusion_gemma": "generates by denoising blocks of text, not token by token",
    "longcat_flash": "has experts that pass their input on unchanged, which no FFN does",
    "doge": "has no experts that are FFNs: each is one neuron, found by a product of keys",
    "jetmoe": "has experts in its attention too, which no dense layer replaces",
}


def describe(
    config: PretrainedConfig,
    skeleton: PreTrainedModel,
    where: str,
    student_class: str = "sibling",
    text_only: bool = False,
) -> Family:
    """The family of a model, also kept in DESCRIBED.

    student_class: "sibling" for a dense student wherever one is known, "same" for the teacher's own
    class with experts that are always taken. text_only: of a composite model, its text model alone,
    as it always is where images have experts of their own.
    Raises UserError with what is missing.
    """
    unsupported = f"{where}: model_type {config.model_type!r}"
    if config.model_type in REFUSED:
        raise UserError(f"{unsupported} {REFUSED[config.model_type]}; m2d does not convert it yet")
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    text, names = config.get_text_config(), names_of(skeleton)
    own_block = IMAGE_EXPERTS.get(config.model_type, (None,))[0]
    skeleton = reached_by_text(skeleton)
    found = experts_modules(skeleton)
    if not found:
        raise UserError(
            f"{unsupported} is not a Mixture-of-Experts model that m2d can read: no layer has "
            "experts, stacked in one module"
        )
    paths = set(found.values())
    if len(paths) > 1:
        raise UserError(f"{unsupported} has experts in several places: {', '.join(sorted(paths))}")
    path, first = paths.pop(), min(found)
    layer = layers_of(skeleton)[first]
    experts: Any = layer.get_submodule(path)
    own = dict(experts.named_parameters(recurse=False))
    if getattr(experts, "has_post_expert_norm", False) or len(own) > 4:
        raise UserError(
            f"{unsupported} has experts with more than projections, or with a norm of their own"
        )
    stack = stack_of(experts)
    block_path = path.rpartition(".")[0] if own_block is None else own_block
    name = path.removeprefix(f"{block_path}.")
    block = layer.get_submodule(block_path) if block_path else layer
    router = _router(block, name, stack.count)
    if router is None:
        raise UserError(f"{unsupported} has a router without one row of weights per expert")
    keys = {
        "num_experts": _key(text, EXPERT_COUNTS, r"experts$", stack.count),
        "top_k": _key(text, TOP_KS, r"^(?!index|.*group).*(top_?k|per_tok)", None),
        "expert_width": _key(text, WIDTHS, r"intermediate|ffn", stack.width),
    }
    missing = [key for key, value in keys.items() if value is None]
    if missing:
        raise UserError(f"{unsupported}: no config key is recognised as {', '.join(missing)}")
    scales_input = _scales_input(experts)
    kind, float32 = ("sigmoid", False) if scales_input else _routing(block, name, router, text)
    family = Family(
        model_type=config.model_type,
        teacher_text_type=text.model_type,
        student_model_type=text.model_type,
        student_architecture=type(skeleton).__name__,
        **keys,  # type: ignore[arg-type]
        experts=path,
        own_block=own_block,
        router=f"{block_path}.{router}".removeprefix("."),
        probabilities=kind,
        router_float32=float32,
        gated=stack.gated,
        biases=bool(getattr(experts, "has_bias", False)),
        scales_input=scales_input,
        given_blocks=BLOCKS in inspect.signature(layer.forward).parameters,
        names=names,
        transposed=stack.transposed,
        interleaved=not getattr(experts, "is_concatenated", True),
        rows=stack.rows,
        student_class=student_class,
        layers=layers_path(skeleton),
        head=head_path(skeleton),
    )
    text_only = text_only or family.left_out is not None
    family = with_student(family, config, skeleton, first, student_class, text_only, unsupported)
    DESCRIBED[config.model_type] = family
    return family


def _router(block: nn.Module, experts: str, count: int) -> str | None:
    """Path, in the block, of what has a weight of one row per expert.

    Some have one row more, the last, of an expert that does nothing (Zaya).
    """
    for rows in (count, count + 1):
        for path, module in block.named_modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            inside = path.startswith((f"{experts}.", "shared", "self_attn", "mlp"))
            fits = weight is not None and weight.dim() == 2 and weight.shape[0] == rows
            if fits and path != experts and not inside:
                return path
    return None


def _key(
    config: PretrainedConfig, names: tuple[str, ...], pattern: str, value: int | None
) -> str | None:
    """The first config key of those names, or else like the pattern, with that value if given.

    Keys of the config itself come before those of configs in it, which have a dot.
    """

    def fits(name: str) -> bool:
        try:
            found = getattr(config, name, None)
        except Exception:
            return False  # differs between layers, and the config class says so
        if isinstance(found, list | tuple) and found:
            # The same in every layer, or one for each kind of experts.
            found = found[0] if len(set(found)) == 1 or value == found[0] else None
        known = isinstance(found, int) and not isinstance(found, bool)
        return known and value in (None, found)

    others = sorted(
        name
        for name in config.to_dict()
        if re.search(pattern, name) and not NOT_WIDTHS.search(name)
    )
    own = next((name for name in (*names, *others) if fits(name)), None)
    if own is not None:
        return own
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {
        name: _key(sub, names, pattern, value)
        for name, sub in inner.items()
        if isinstance(sub, PretrainedConfig) and not NOT_WIDTHS.search(name)
    }
    return next((f"{name}.{key}" for name, key in found.items() if key is not None), None)


def _scales_input(experts: nn.Module) -> bool:
    """Whether experts get inputs that are weighted already, and nothing else (Llama 4)."""
    code = type(experts).forward.__code__
    return code.co_argcount == 2 and not code.co_flags & 0x04


def _routing(
    block: nn.Module, experts: str, router: str, config: PretrainedConfig
) -> tuple[str, bool]:
    """What p_t is, "softmax" or "sigmoid", and whether logits are float32 whatever the dtype.

    A router whose weights are proportional to neither (a sparse mixer), or that cannot be run
    alone, is taken to mean a softmax of its logits: that enters scores, and no weight.
    """
    hidden = torch.randn(
        PROBE_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(2)
    )
    try:
        real, _, recorder = probe(block, experts, router, hidden, seed=3)
        logits = router_logits(real.get_submodule(router), hidden)
        kind = kind_of_probabilities(logits, recorder.index, recorder.weights)
    except Exception:
        return "softmax", False
    return kind or "softmax", _in_float32(real, router, hidden)


def _in_float32(block: nn.Module, router: str, hidden: torch.Tensor) -> bool:
    """Whether a router in bfloat16 gives float32 logits."""
    module = block.get_submodule(router).to(torch.bfloat16)
    try:
        with torch.no_grad():
            output = module(hidden.to(torch.bfloat16))
    except Exception:
        return False
    first = output[0] if isinstance(output, tuple) else output
    return first.dtype == torch.float32
