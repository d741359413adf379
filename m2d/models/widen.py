"""Modules that compute in a wider dtype than their weights have, such as float32 for bfloat16.

Large weights (linear layers, embeddings, experts) stay as they are and are widened for each
product; what is small (norms, routers, biases) is widened once. So a model takes no more memory
than in its own dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Arguments = Any
WIDENED_BYTES = 256_000_000  # of one linear layer at a time


class WideLinear(nn.Linear):
    """A linear layer in the dtype of its input; an output head's rows are widened part by part."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        rows = max(1, WIDENED_BYTES // (self.in_features * hidden.dtype.itemsize))
        if self.weight.dtype == hidden.dtype or rows >= self.out_features:
            return functional.linear(hidden, self.weight.to(hidden.dtype), bias)
        output = hidden.new_empty(*hidden.shape[:-1], self.out_features)
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            own = None if bias is None else bias[part]
            output[..., part] = functional.linear(hidden, self.weight[part].to(hidden.dtype), own)
        return output


class WideEmbedding(nn.Embedding):
    """An embedding whose output is of the dtype `wide`."""

    wide: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.wide)


def held(on_disk: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The dtype that a weight has in memory: that on disk, or that of the products if narrower."""
    return on_disk if on_disk.itemsize < compute.itemsize else compute


def widen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make a module with weights narrower than `dtype` compute in it; returns the module.

    Modules that hold experts ([E, ...] tensors) and do not know how to widen them have all of them
    widened for the length of a call. A module that is called widened again keeps its ways.
    """
    for part in module.modules():
        if getattr(part, "widens", False):  # it sees to it itself
            continue
        if type(part) in (nn.Linear, WideLinear):
            part.__class__ = WideLinear
        elif type(part) in (nn.Embedding, WideEmbedding):
            part.__class__ = WideEmbedding
            part.wide = dtype  # type: ignore[assignment]
        elif any(p.dim() > 2 and _narrow(p, dtype) for p in part.parameters(recurse=False)):
            _widen_for_calls(part, dtype)
        else:
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                if _narrow(tensor, dtype):
                    tensor.data = tensor.data.to(dtype)
    return module


def _narrow(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize


def _widen_for_calls(module: nn.Module, dtype: torch.dtype) -> None:
    """Widen a module's own parameters whenever it is called, and only then."""
    held: list[tuple[nn.Parameter, Tensor]] = []

    def before(*_: Arguments) -> None:
        held.extend((p, p.data) for p in module.parameters(recurse=False))
        for parameter, narrow in held:
            parameter.data = narrow.to(dtype)

    def after(*_: Arguments) -> None:
        for parameter, narrow in held:
            parameter.data = narrow
        held.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
