"""The experts of one layer, stacked, and what they compute.

Shapes: N tokens, E routed experts, S experts that are always taken with weight 1 (after the routed
ones), k = top-k, H hidden size, I expert intermediate size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, require_finite
from m2d.models.families import Family
from m2d.models.widen import held

TILE = 32  # tokens: products of a multiple of them waste nothing on a CPU's matrix units

Glu = Callable[[Tensor], Tensor]
"""What an expert does between its projections: [..., 2I], gate then up, to [..., I]; of experts
without a gate, [..., I] to [..., I]."""


def glu(config: Any) -> Glu:
    """act(gate) * up."""
    activation = ACT2FN[config.hidden_act]

    return lambda gate_up: _act(activation, gate_up)


GLU: dict[str, Callable[[Any], Glu]] = {"glu": glu}


def stock_glu(experts: Any, family: Family) -> Glu:
    """What a stock module of experts does between its projections; of [..., I] without a gate."""
    if not family.gated:
        return activation_of(experts)
    apply = getattr(experts, "_apply_gate", None)
    if apply is None:
        return lambda gate_up: _act(activation_of(experts), gate_up)
    if not family.interleaved:
        return cast(Glu, apply)
    return lambda gate_up: cast(
        Tensor, apply(torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2))
    )


def activation_of(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation of a stock module of experts, or of the module in it that computes one."""
    names = ("act_fn", "activation_fn")
    found = (getattr(module, name, None) for module in experts.modules() for name in names)
    return cast(Callable[[Tensor], Tensor], next(filter(None, found)))


def _act(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


@dataclass
class Expert:
    """One feed-forward network: down(glu(gate(x), up(x))), or down(act(up(x)))."""

    gate_proj: Tensor | None  # [I, H]
    up_proj: Tensor  # [I, H]
    down_proj: Tensor  # [H, I]
    gate_bias: Tensor | None = None  # [I]
    up_bias: Tensor | None = None  # [I]
    down_bias: Tensor | None = None  # [H]


def read_expert(checkpoint: Checkpoint, family: Family, layer: int, expert: int) -> Expert:
    """One expert's tensors, as on disk."""
    where = {"layer": layer, "expert": expert}
    names = [
        template.format(**where)
        for template in (family.gate_proj, family.up_proj, family.down_proj)
    ]
    if not family.gated:
        return Expert(None, *(checkpoint.read(name) for name in names[1:]))
    weights = [checkpoint.read(name) for name in names]
    if not family.biases:
        return Expert(*weights)
    biases = [checkpoint.read(name.removesuffix("weight") + "bias") for name in names]
    return Expert(*weights, *biases)


Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class InputScalingBlock(nn.Module):
    """Llama 4's block over StackedExperts: routed sums and the shared expert, in its own order."""

    def __init__(self, block: nn.Module, experts: str, router: str):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.paths, self.top_k = (experts, router), int(cast(int, block.top_k))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(output [N, H], router's logits [N, E]) of hidden [..., H]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts, router = (self.get_submodule(path) for path in self.paths)
        logits = functional.linear(flat, cast(Tensor, router.weight).to(flat.dtype))
        top, index = torch.topk(logits, self.top_k, dim=1)
        weights = torch.sigmoid(top.float()).to(flat.dtype)
        others = [c for n, c in self.named_children() if n not in self.paths]
        output = experts(flat, index, weights)
        return sum((other(flat) for other in others), output), logits


class StackedExperts(nn.Module):
    """All experts of a layer, with the interface of transformers' own experts modules.

    `observer(hidden_NH, top_k_index_NK, top_k_weights_NK, out_norm_NK)`, if set, is called with
    every batch; out_norm is ||f_e(x)|| of each selected expert, float32, before its weight. The
    last `shared` experts of the stack are always selected, in the last columns of the routing; they
    are computed, but are not among `num_experts`, and no observer sees them. Weights narrower than
    the hidden states are widened to their dtype, one expert at a time. With `scales_input` an
    expert's weight multiplies its input; norms are then of outputs divided by their weights.
    """

    widens = True

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        activation: str | Glu,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        shared: int = 0,
        scales_input: bool = False,
    ):
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)  # [E + S, 2I, H]
        self.down_proj = nn.Parameter(down_proj, requires_grad=False)  # [E + S, H, I]
        self.gate_up_bias = _optional(gate_up_bias)  # [E + S, 2I]
        self.down_bias = _optional(down_bias)  # [E + S, H]
        if isinstance(activation, str):
            self.activation = ACT2FN[activation]
        self.custom_glu = None if isinstance(activation, str) else activation
        self.shared, self.scales_input = shared, scales_input
        self.observer: Observer | None = None

    @property
    def num_experts(self) -> int:
        """E, the routed experts."""
        return self.down_proj.shape[0] - self.shared

    def glu(self, gate_up: Tensor) -> Tensor:
        """[..., 2I] -> [..., I]."""
        if self.custom_glu is not None:
            return self.custom_glu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up

    def gate_up(self, expert: int, hidden: Tensor) -> Tensor:
        """What an expert's gate and up projections give, [N, 2I], of hidden [N, H]."""
        weight = self.gate_up_proj[expert].to(hidden.dtype)
        bias = None if self.gate_up_bias is None else self.gate_up_bias[expert].to(hidden.dtype)
        return functional.linear(hidden, weight, bias)

    def inner(self, expert: int, hidden: Tensor) -> Tensor:
        """An expert's intermediate activations [N, I] of hidden [N, H]."""
        return self.glu(self.gate_up(expert, hidden))

    def output(self, expert: int, hidden: Tensor) -> Tensor:
        """f_e(x) [N, H] of hidden [N, H]."""
        return functional.linear(self.inner(expert, hidden), *self.down(expert, hidden.dtype))

    def down(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """An expert's down projection [H, I] and its bias [H]."""
        bias = None if self.down_bias is None else self.down_bias[expert].to(dtype)
        return self.down_proj[expert].to(dtype), bias

    def parameters_of_routed(self) -> list[Tensor]:
        """Every routed expert's own weights and biases: tensors [E, any]."""
        parts = (self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        return [part[: self.num_experts].flatten(1) for part in parts if part is not None]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routed output y of hidden, both [N, H] or [B, T, H], under the routing [N, k]."""
        given, k = hidden.shape, top_k_index.shape[1]
        hidden = hidden.reshape(-1, given[-1])
        # Tokens are gathered by expert, so that each expert is one matrix product.
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=len(self.down_proj)).tolist()
        weights = top_k_weights.reshape(-1, 1)
        norms = hidden.new_zeros(flat.shape[0], dtype=torch.float32)
        output = torch.zeros_like(hidden)
        for expert, rows in enumerate(order.split(counts)):
            if not len(rows):
                continue
            tokens = rows // k
            taken = hidden[whole_tiles(tokens, hidden)]
            if self.scales_input:
                factor = weights[whole_tiles(rows, hidden)].to(hidden.dtype)
                weighted = self.output(expert, taken * factor)[: len(rows)]
                out = weighted / weights[rows]
            else:
                out = self.output(expert, taken)[: len(rows)]
                weighted = out * weights[rows]
            output.index_add_(0, tokens, weighted.to(output.dtype))
            if self.observer is not None:
                wide = torch.promote_types(out.dtype, torch.float32)
                norms[rows] = torch.linalg.vector_norm(out, dim=1, dtype=wide).float()
        if self.observer is not None:
            routed = slice(0, k - self.shared)
            self.observer(
                hidden,
                top_k_index[:, routed],
                top_k_weights[:, routed],
                norms.view(-1, k)[:, routed],
            )
        return output.view(given)


def whole_tiles(tokens: Tensor, hidden: Tensor) -> Tensor:
    """The indices [n], on a CPU in half precision with the first repeated to a multiple of TILE.

    There a product is compiled for each number of rows: half of the time, and 1 MB kept for each.
    """
    if hidden.device.type != "cpu" or hidden.element_size() != 2 or not len(tokens) % TILE:
        return tokens
    return torch.cat([tokens, tokens[:1].expand(-len(tokens) % TILE)])


def _optional(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def read_stacked(
    checkpoint: Checkpoint,
    family: Family,
    layer: int,
    shape: tuple[int, int, int],
    activation: str | Glu,
    dtype: torch.dtype,
    shared: int = 0,
) -> StackedExperts:
    """Read a layer's experts into one stack, expert by expert. shape: (E + S, I, H).

    They are kept in `dtype` or in that on disk, whichever is narrower.
    """
    count, width, size = shape
    halves = 2 if family.gated else 1
    first = family.up_proj.format(layer=layer, expert=0)
    if first in checkpoint.entries:
        dtype = held(checkpoint.entry(first).dtype, dtype)
    gate_up = torch.empty(count, halves * width, size, dtype=dtype)
    down = torch.empty(count, size, width, dtype=dtype)
    gate_up_bias = torch.empty(count, 2 * width, dtype=dtype) if family.biases else None
    down_bias = torch.empty(count, size, dtype=dtype) if family.biases else None
    for index in range(count):
        expert = read_expert(checkpoint, family, layer, index)
        check_shape(checkpoint, expert, layer, index, width, size)
        if expert.gate_proj is not None:
            gate_up[index, :width] = expert.gate_proj
        gate_up[index, -width:] = expert.up_proj
        down[index] = expert.down_proj
        if gate_up_bias is not None and down_bias is not None:
            assert expert.gate_bias is not None
            assert expert.up_bias is not None
            assert expert.down_bias is not None
            gate_up_bias[index, :width] = expert.gate_bias
            gate_up_bias[index, width:] = expert.up_bias
            down_bias[index] = expert.down_bias
    for tensor in (gate_up, down):
        require_finite(tensor, f"{checkpoint.folder}: the experts of layer {layer}")
    return StackedExperts(
        gate_up, down, activation, gate_up_bias, down_bias, shared, family.scales_input
    )


def check_shape(
    checkpoint: Checkpoint, expert: Expert, layer: int, index: int, width: int, size: int
) -> None:
    """Raise a UserError where the tensors on disk do not fit the config."""
    expected = {
        "gate_proj": (width, size),
        "up_proj": (width, size),
        "down_proj": (size, width),
        "gate_bias": (width,),
        "up_bias": (width,),
        "down_bias": (size,),
    }
    for name, shape in expected.items():
        tensor = getattr(expert, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"{checkpoint.folder}: layer {layer}, expert {index}: {name} is "
                f"{list(tensor.shape)} on disk, but the config implies {list(shape)}"
            )
