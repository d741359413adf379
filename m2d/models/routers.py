"""What a router computes, seen from outside: its rows, and how its weights come from its logits.

Shapes: N tokens, E routed experts, k = top-k, H hidden size.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: functional.softmax(logits, dim=-1, dtype=torch.float32),
    "sigmoid": lambda logits: torch.sigmoid(logits.float()),
}


class RouterRows(nn.Module):
    """The rows of a router that belong to routed experts."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias  # [E, H], [E]
        self.seen: Tensor | None = None
        """What the router itself was last called with [N, H], where that is known: a norm of its
        own may come before it."""
        self.shared_gate: Tensor | None = None
        """[1, H]: of the shared expert, where it has one."""
        self.shared_expert: nn.Module | None = None
        """The shared expert itself, where it has a gate."""


def routed_rows(router: nn.Module, num_experts: int) -> RouterRows:
    """A router's rows, the first E where the later ones are of shared experts."""
    weight, bias = cast(Tensor, router.weight), getattr(router, "bias", None)
    return RouterRows(weight[:num_experts], None if bias is None else bias[:num_experts])


def router_logits(router: nn.Module, hidden: Tensor, float32: bool = False) -> Tensor:
    """Logits [N, E] in the router's own precision, of hidden [N, H] or of what it was given."""
    seen = getattr(router, "seen", None)
    hidden = hidden if seen is None else seen
    weight, bias = cast(Tensor, router.weight), getattr(router, "bias", None)
    if float32:
        hidden, weight = hidden.float(), weight.float()
        bias = None if bias is None else bias.float()
    wide = torch.promote_types(hidden.dtype, weight.dtype)  # weights may be held narrower
    bias = None if bias is None else bias.to(wide)
    return functional.linear(hidden.to(wide), weight.to(wide), bias)


def shared_weights(router: nn.Module, hidden: Tensor) -> Tensor | None:
    """The weight of the shared expert [N] of hidden [N, H]; None where it has no gate."""
    gate = getattr(router, "shared_gate", None)
    if gate is None:
        return None
    return torch.sigmoid(functional.linear(hidden, gate.to(hidden.dtype)))[:, 0]


def router_gram(router: nn.Module) -> Tensor:
    """R [E, E]: inner products of the router's rows, float64."""
    rows = cast(Tensor, router.weight).double()
    return rows @ rows.T


class _Recorder(nn.Module):
    """Stands where the experts stood: notes the routing and answers with `answer`."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer
        self.index = self.weights = torch.empty(0)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor, *_: Any) -> Tensor:
        self.index, self.weights = index, weights
        return self.answer.to(hidden.dtype)


@torch.no_grad()
def probe(
    block: nn.Module, experts: str, router: str, hidden: Tensor, seed: int | None
) -> tuple[nn.Module, Tensor, _Recorder]:
    """Run a MoE block whose experts are replaced by a recorder.

    block: on the meta device; a copy is made real. experts, router: its child modules' names.
    hidden [N, H]. seed: for random parameters; None sets the router's to zero. Returns the copy,
    its output [N, H] and the recorder, whose answer was random.
    """
    block = copy.deepcopy(block)
    made = {name: b.clone() for name, b in block.named_buffers() if not b.is_meta}
    recorder = _Recorder(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)))
    block.set_submodule(experts, recorder)
    block = block.to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(seed or 0)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        of_router = name.startswith(f"{router}.") or "." not in name
        if name.startswith(f"{experts}."):
            continue
        if name in made:
            tensor.copy_(made[name])  # as the class makes them
        elif name in dict(block.named_buffers()) or (of_router and seed is None):
            tensor.zero_()
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    output = block(hidden[None])
    return block, (output[0] if isinstance(output, tuple) else output).view_as(hidden), recorder


def kind_of_probabilities(logits: Tensor, index: Tensor, weights: Tensor) -> str | None:
    """The key of PROBABILITIES to which weights [N, k] at index are proportional, or None.

    Proportional, token by token: normalisation and scaling do not matter.
    """
    for kind, function in PROBABILITIES.items():
        ratio = weights.double() / function(logits).gather(1, index).double()
        if bool((ratio / ratio[:, :1] - 1).abs().max() < 1e-3):
            return kind
    return None
