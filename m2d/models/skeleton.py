"""The stock model class of a config, with every parameter on the meta device."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from m2d.errors import UserError
from m2d.models.families import IMAGE_EXPERTS, ROWS

# Tensors of more elements than this are never allocated, not even for a moment.
LARGEST_REAL_TENSOR = 2**24
# Functions of torch, and of torch.nn.init, that fill a tensor in place: nothing to do on meta.
FILLS = {
    "normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "zero_",
    "zeros_", "ones_", "fill_", "constant_", "copy_",
}  # fmt: skip
# What decoders call the list of their layers.
LISTS = ("layers", "blocks")


class _LargeOnMeta(TorchFunctionMode):
    """Makes large new tensors on the meta device, and leaves those there as they are.

    Experts' parameters are allocated before accelerate's `init_empty_weights` sees them, and those
    of one layer may be larger than memory. Buffers, which must be real, are small.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if shape and math.prod(shape) > LARGEST_REAL_TENSOR:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that loads what a config describes: composite models whole, not their text."""
    known: Any = AutoModelForImageTextToText._model_mapping
    composite = config.get_text_config() is not config
    causal: Any = AutoModelForCausalLM._model_mapping
    if type(config) in known and (composite or type(config) not in causal):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def make_skeleton(config: PretrainedConfig, where: Path | str) -> PreTrainedModel:
    """The stock model class with parameters on the meta device, buffers real."""
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            made = auto_class(config).from_config(config, trust_remote_code=False)
            return cast(PreTrainedModel, made.eval())
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{where}: transformers cannot build a causal LM from it "
            f"({reason[0] if reason else type(error).__name__})"
        ) from None


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers keeps the tensor of a name in float32 whatever the model's dtype."""
    parts = [n for n, kept in model._get_dtype_plan(dtype).items() if kept == torch.float32]
    return lambda name: any(part in name for part in parts)


def text_key(config: PretrainedConfig) -> str | None:
    """The key of a composite config that holds its text model's; None for a text model itself."""
    text = config.get_text_config()
    if text is config:
        return None
    return next(key for key in config.sub_configs if getattr(config, key, None) is text)


def decoder_path(model: PreTrainedModel) -> str:
    """Module path of the text decoder: what has the embeddings, the layers and the last norm."""
    decoder = model.get_decoder()
    if not any(hasattr(decoder, name) for name in LISTS):
        decoder = getattr(decoder, "model", decoder)  # Llama 4's language model has its own head
    for path, module in model.named_modules():
        if module is decoder:
            return path
    return str(model.base_model_prefix)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The text decoder."""
    return cast(nn.Module, model.get_submodule(decoder_path(model)))


def head_path(model: PreTrainedModel) -> str:
    """Module path of the output embedding."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "lm_head")


def layers_path(model: PreTrainedModel) -> str:
    """Module path of the decoder layers."""
    decoder = decoder_of(model)
    own = next((name for name in LISTS if hasattr(decoder, name)), LISTS[0])
    return f"{decoder_path(model)}.{own}"


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    return cast(nn.ModuleList, model.get_submodule(layers_path(model)))


def replace_layers(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """Put other modules where the decoder layers stood."""
    model.set_submodule(layers_path(model), nn.ModuleList(layers))


def above(layers: str) -> str:
    """What the names of all else in the decoder begin with, of the module path of its layers."""
    return layers.rpartition(".")[0] + "."


def text_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Module paths of what predicts text from text: all of a model but for composite ones'."""
    if text_key(model.config) is None:
        return ("",)
    return decoder_path(model), head_path(model)


def in_text(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a parameter of that name takes part in predicting text from text."""
    paths = tuple(f"{path}." for path in text_paths(model) if path)
    return (lambda name: name.startswith(paths)) if paths else (lambda _: True)


def move_text(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model, what predicts text there; a composite one's rest may have no data."""
    for path in text_paths(model):
        model.get_submodule(path).to(device)
    return model


def has_module(layer: nn.Module, path: str) -> bool:
    """Whether there is a module of that path."""
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def reached_by_text(model: PreTrainedModel) -> PreTrainedModel:
    """The model; of one whose images have experts of their own, a copy without them."""
    if model.config.model_type not in IMAGE_EXPERTS:
        return model
    path, images = IMAGE_EXPERTS[model.config.model_type]
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        if has_module(layer, f"{path}.{images}"):
            delattr(layer.get_submodule(path), images)
    return model


def experts_modules(model: PreTrainedModel) -> dict[int, str]:
    """Layer -> module path of its experts, for those with transformers' common interface.

    Those of images alone do not count. Raises UserError where a layer has several.
    """
    of_images = ".".join(IMAGE_EXPERTS.get(model.config.model_type, ())) + "."
    if not has_module(model, layers_path(model)):
        return {}
    layers = layers_of(model)
    if not isinstance(layers, nn.ModuleList):
        return {}
    found: dict[int, str] = {}
    for index, layer in enumerate(layers):
        paths = [
            path
            for path, module in layer.named_modules()
            if are_experts(module) and not path.startswith(of_images)
        ]
        if len(paths) > 1:
            raise UserError(f"{type(model).__name__}: a layer has experts in {', '.join(paths)}")
        if paths:
            found[index] = paths[0]
    return found


@dataclass(frozen=True)
class Stack:
    """How a module keeps all experts of a layer."""

    count: int
    width: int
    """I, the intermediate size of one."""
    size: int
    """H of the experts."""
    gated: bool
    transposed: bool
    """Whether they are [E, in, out]."""
    rows: bool
    """Whether they are the matrices ROWS."""


def are_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer: stacked up and down projections."""
    if all(getattr(own_parameter(module, name), "ndim", 0) == 2 for name in ROWS):
        return True
    gate_up = own_parameter(module, "gate_up_proj")
    up = own_parameter(module, "up_proj") if gate_up is None else gate_up
    down = own_parameter(module, "down_proj")
    return up is not None and down is not None and up.dim() == down.dim() == 3


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's parameter, or one of its child's if the name has a dot."""
    path, _, last = name.rpartition(".")
    owner = module._modules.get(path) if path else module
    return None if owner is None else owner._parameters.get(last)


def stack_of(experts: nn.Module) -> Stack:
    """How a module that `are_experts` keeps them."""
    down = own_parameter(experts, ROWS[-1])
    if down is not None:
        count = int(cast(Any, experts).num_experts)
        return Stack(count, down.shape[0] // count, down.shape[1], True, False, True)
    gated = hasattr(experts, "gate_up_proj")
    up, down = (
        experts.get_parameter(n) for n in ("gate_up_proj" if gated else "up_proj", "down_proj")
    )
    own = getattr(experts, "is_transposed", None)
    width = down.shape[2] * (2 if gated else 1)
    transposed = up.shape[1] != width if own is None else bool(own)
    width, size = down.shape[1:] if transposed else down.shape[:0:-1]
    return Stack(down.shape[0], width, size, gated, transposed, False)


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = model.named_parameters()
    return sum(math.prod(p.shape) for name, p in parameters if name not in tied)
