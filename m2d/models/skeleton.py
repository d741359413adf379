"""The stock model class of a config, with every parameter on the meta device."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from m2d.errors import UserError

# Tensors of more elements than this are never allocated, not even for a moment.
LARGEST_REAL_TENSOR = 2**24


class _LargeOnMeta(TorchFunctionMode):
    """Makes large new tensors on the meta device.

    Experts' parameters are allocated before accelerate's `init_empty_weights` sees them, and those
    of one layer may be larger than memory. Buffers, which must be real, are small.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if shape and math.prod(shape) > LARGEST_REAL_TENSOR:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def make_skeleton(config: PretrainedConfig, where: Path | str) -> PreTrainedModel:
    """The stock model class with parameters on the meta device, buffers real."""
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
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


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a stock causal LM."""
    return cast(nn.ModuleList, model.base_model.layers)


def has_module(layer: nn.Module, path: str) -> bool:
    """Whether there is a module of that path."""
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def experts_modules(model: PreTrainedModel) -> dict[int, str]:
    """Layer -> module path of its experts, for those with transformers' common interface."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return {}
    return {
        index: path
        for index, layer in enumerate(layers)
        for path, module in layer.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "down_proj")
    }


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = model.named_parameters()
    return sum(math.prod(p.shape) for name, p in parameters if name not in tied)
