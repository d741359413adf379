"""The routed experts of one layer, stacked, and what they compute.

Shapes: N tokens, E experts, k = top-k, H hidden size, I expert intermediate size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint
from m2d.models.families import Family


@dataclass
class Expert:
    """One feed-forward network: down(act(gate(x)) * up(x))."""

    gate_proj: Tensor  # [I, H]
    up_proj: Tensor  # [I, H]
    down_proj: Tensor  # [H, I]


def read_expert(checkpoint: Checkpoint, family: Family, layer: int, expert: int) -> Expert:
    """One expert's tensors, as on disk."""
    where = {"layer": layer, "expert": expert}
    return Expert(
        checkpoint.read(family.gate_proj.format(**where)),
        checkpoint.read(family.up_proj.format(**where)),
        checkpoint.read(family.down_proj.format(**where)),
    )


Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class StackedExperts(nn.Module):
    """All experts of a layer, with the interface of transformers' own experts modules.

    `observer(hidden_NH, top_k_index_NK, top_k_weights_NK, out_norm_NK)`, if set, is called with
    every batch; out_norm is ||f_e(x)|| of each selected expert, float32, before its weight.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, activation: str):
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)  # [E, 2I, H]
        self.down_proj = nn.Parameter(down_proj, requires_grad=False)  # [E, H, I]
        self.activation = ACT2FN[activation]
        self.observer: Observer | None = None

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]

    def glu(self, gate_up: Tensor) -> Tensor:
        """[..., 2I] -> [..., I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routed output y [N, H] of hidden [N, H] under the routing [N, k]."""
        k = top_k_index.shape[1]
        # Tokens are gathered by expert, so that each expert is one matrix product.
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        weights = top_k_weights.reshape(-1, 1)
        norms = hidden.new_zeros(flat.shape[0], dtype=torch.float32)
        output = torch.zeros_like(hidden)
        for expert, rows in enumerate(order.split(counts)):
            if not len(rows):
                continue
            tokens = rows // k
            inner = self.glu(hidden[tokens] @ self.gate_up_proj[expert].T)
            out = inner @ self.down_proj[expert].T
            output.index_add_(0, tokens, (out * weights[rows]).to(output.dtype))
            if self.observer is not None:
                norms[rows] = torch.linalg.vector_norm(out, dim=1, dtype=torch.float32)
        if self.observer is not None:
            self.observer(hidden, top_k_index, top_k_weights, norms.view(-1, k))
        return output


def read_stacked(
    checkpoint: Checkpoint,
    family: Family,
    layer: int,
    shape: tuple[int, int, int],
    activation: str,
    dtype: torch.dtype,
) -> StackedExperts:
    """Read a layer's experts into one stack, expert by expert. shape: (E, I, H)."""
    count, width, size = shape
    gate_up = torch.empty(count, 2 * width, size, dtype=dtype)
    down = torch.empty(count, size, width, dtype=dtype)
    for index in range(count):
        expert = read_expert(checkpoint, family, layer, index)
        check_shape(checkpoint, expert, layer, index, width, size)
        gate_up[index, :width] = expert.gate_proj
        gate_up[index, width:] = expert.up_proj
        down[index] = expert.down_proj
    return StackedExperts(gate_up, down, activation)


def check_shape(
    checkpoint: Checkpoint, expert: Expert, layer: int, index: int, width: int, size: int
) -> None:
    """Raise a UserError where the tensors on disk do not fit the config."""
    expected = {"gate_proj": (width, size), "up_proj": (width, size), "down_proj": (size, width)}
    for name, shape in expected.items():
        found = tuple(getattr(expert, name).shape)
        if found != shape:
            raise UserError(
                f"{checkpoint.folder}: layer {layer}, expert {index}: {name} is {list(found)} on "
                f"disk, but the config implies {list(shape)}"
            )
