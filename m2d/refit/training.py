"""One layer's FFN trained, and refitted, on its inputs and on what it should put out.

Shapes: N tokens, H hidden size, W the student's intermediate size.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m2d.errors import UserError
from m2d.models.experts import StackedExperts
from m2d.models.families import Family
from m2d.refit.halves import StudentFeedForward, student_block_path
from m2d.refit.muon import Muon
from m2d.refit.refit import Fitting, down_parts, wide
from m2d.refit.ridge import RIDGES

OPTIMISERS = ("muon", "adamw")
ORDER_SEED = 0


@dataclass(frozen=True)
class AlignSettings:
    """How each layer is trained."""

    steps: int = 120
    tokens: int = 4096
    """Tokens of a step."""
    learning_rate: float = 0.02
    """Root mean square of an update at its largest, as a share of that of the weights."""
    optimiser: str = "muon"
    warm_up: float = 0.05
    """Share of the steps."""
    last: float = 0.02
    """Share of the learning rate at the end of its linear fall."""

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            known = ", ".join(OPTIMISERS)
            raise UserError(f"unknown optimiser {self.optimiser!r}; known: {known}")
        if self.steps < 1 or self.tokens < 1 or not self.learning_rate > 0:
            raise UserError("align: steps, tokens and learning rate must be greater than 0")

    def rate(self, step: int) -> float:
        """Factor of the learning rate: linear warm-up, then linear fall."""
        warm = max(1.0, self.warm_up * self.steps)
        fall = 1 - (1 - self.last) * step / max(1, self.steps - 1)
        return min((step + 1) / warm, fall)


@dataclass(frozen=True)
class Examples:
    """What a layer's FFN is trained on: each [N, ...], and which tokens are held out."""

    inputs: Tensor
    """[N, H]: the block's input, in the computation's dtype."""
    wanted: Tensor
    """[N, H]: what it should put out, times m, so that the stream comes to the teacher's."""
    weights: Tensor
    """[N, 1]: inverse squared norms of the teacher's stream; float32."""
    held_out: Tensor
    """bool [N]."""


def feed_forward_parameters(block: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name within the block."""
    if not family.student_experts:
        return dict(block.named_parameters())
    name = family.experts.rpartition(".")[2]
    experts = block.get_submodule(name)
    return {f"{name}.{key}": value for key, value in experts.named_parameters()}


def feed_forward_parts(block: nn.Module, family: Family) -> dict[str, Tensor]:
    """The FFN's tensors under canonical names, [out, in] each; those of its experts one after the
    other.
    """
    pieces = _pieces(block, family)
    return {name: torch.cat(own, dim=_axis(name)) for name, own in pieces.items()}


@torch.no_grad()
def load_parts(block: nn.Module, family: Family, parts: dict[str, Tensor]) -> None:
    """Put tensors into the block's FFN, in its own dtype and on its device."""
    for name, own in _pieces(block, family).items():
        for value, part in zip(own, parts[name].chunk(len(own), _axis(name)), strict=True):
            value.copy_(part)


def _axis(name: str) -> int:
    """That along which an FFN's neurons lie."""
    return 1 if name == "down_proj.weight" else 0


def _pieces(block: nn.Module, family: Family) -> dict[str, list[Tensor]]:
    """By canonical name, the tensors of each expert; of a dense FFN its one tensor."""
    if not family.student_experts:
        return {name: [value.detach()] for name, value in block.named_parameters()}
    experts = block.get_submodule(family.experts.rpartition(".")[2])
    assert isinstance(experts, StackedExperts)
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    pieces = {"gate_proj.weight": gate, "up_proj.weight": up}
    pieces["down_proj.weight"] = experts.down_proj.detach()
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        gate_bias, up_bias = experts.gate_up_bias.detach().chunk(2, dim=1)
        pieces |= {"gate_proj.bias": gate_bias, "up_proj.bias": up_bias}
        pieces["down_proj.bias"] = experts.down_bias.detach()
    return {name: list(piece) for name, piece in pieces.items()}


def optimisers_for(
    parameters: dict[str, nn.Parameter], settings: AlignSettings
) -> list[torch.optim.Optimizer]:
    """Muon takes the matrices alone. Each parameter's rate is in proportion to the size of its
    numbers.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        size = float(parameter.detach().square().mean().sqrt()) or 1e-2
        group = {"params": [parameter], "size": size}
        if settings.optimiser == "muon" and name.endswith(("weight", "_proj")):
            matrices.append({**group, "scale": 1.0, "halves": 2 if "gate_up" in name else 1})
        else:
            others.append(group)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(Muon(matrices, settings.learning_rate))
    if others:
        rate = settings.learning_rate
        found.append(torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.0))
    return found


def train_block(
    block: nn.Module, family: Family, examples: Examples, settings: AlignSettings, multiplier: float
) -> nn.Module:
    """A float32 copy of the block, trained; products in the dtype of the examples' inputs."""
    dtype, device = examples.inputs.dtype, examples.inputs.device
    trained = copy.deepcopy(block).float().requires_grad_(False)
    parameters = feed_forward_parameters(trained, family)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimisers = optimisers_for(parameters, settings)
    fit = torch.nonzero(~examples.held_out)[:, 0]
    generator = torch.Generator().manual_seed(ORDER_SEED)
    order = torch.empty(0, dtype=torch.long)
    for step in range(settings.steps):
        while len(order) < min(settings.tokens, len(fit)):
            order = torch.cat([order, torch.randperm(len(fit), generator=generator)])
        rows = fit[order[: settings.tokens].to(fit.device)]
        order = order[settings.tokens :]
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = settings.learning_rate * group["size"] * settings.rate(step)
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2):
            found = block_output(trained, examples.inputs[rows].float())
        error = multiplier * found.float() - examples.wanted[rows].float()
        loss = (error.square().sum(-1, keepdim=True) * examples.weights[rows]).mean()
        if not torch.isfinite(loss):
            raise UserError("align: the loss is not finite; use --dtype float32 or a lower rate")
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return trained


def block_output(block: nn.Module, inputs: Tensor) -> Tensor:
    """The block's output [N, H] of its input [N, H]."""
    output = block(inputs[None])
    return (output[0] if isinstance(output, tuple) else output).view_as(inputs)


@torch.no_grad()
def held_out_error(block: nn.Module, examples: Examples, multiplier: float) -> float:
    """Mean relative error of the stream on the held-out tokens."""
    rows = torch.nonzero(examples.held_out)[:, 0]
    total = 0.0
    for part in rows.split(8192):
        found = block_output(block, examples.inputs[part])
        error = multiplier * wide(found) - wide(examples.wanted[part])
        total += float((error.square().sum(-1, keepdim=True) * examples.weights[part]).sum())
    return total / len(rows)


def fit_block(
    block: nn.Module,
    family: Family,
    examples: Examples,
    settings: AlignSettings,
    factor: float,
    disk: torch.dtype,
) -> tuple[dict[str, Tensor], tuple[float, float, float, bool]]:
    """Train and refit one FFN in place; its tensors, and (before, trained, after, kept)."""
    original = {name: value.clone() for name, value in feed_forward_parts(block, family).items()}
    best = before = held_out_error(block, examples, factor)
    best_parts = original
    trained = feed_forward_parts(train_block(block, family, examples, settings, factor), family)

    def attempt(parts: dict[str, Tensor]) -> float:
        nonlocal best, best_parts
        rounded = {name: value.to(disk).to(original[name].dtype) for name, value in parts.items()}
        load_parts(block, family, rounded)
        error = held_out_error(block, examples, factor)
        if error < best:
            best, best_parts = error, rounded
        return error

    after_training = attempt(trained)
    load_parts(block, family, best_parts)
    attempt({**best_parts, **refitted_down(block, family, examples, factor)})
    load_parts(block, family, best_parts)
    kept = best_parts is not original and after_training < before
    parts = {name: value.to(disk).cpu().contiguous() for name, value in best_parts.items()}
    return parts, (before, after_training, best, kept)


@torch.no_grad()
def refitted_down(
    block: nn.Module, family: Family, examples: Examples, factor: float
) -> dict[str, Tensor]:
    """The block's down projection solved anew on the same tokens and weights."""
    # StudentFeedForward changes the layer that it is given, so it gets one of its own around the
    # block.
    layer = inner = nn.Module()
    *above, last = student_block_path(family).split(".")
    for name in above:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    own = copy.copy(block)
    own._modules = dict(block._modules)
    inner.add_module(last, own)
    feed_forward = StudentFeedForward(layer, family)
    fitting = Fitting(feed_forward, [examples.held_out])
    inputs, wanted = examples.inputs[:, None], wide(examples.wanted[:, None])  # "sequences" of 1
    base = feed_forward.base(inputs)
    fitting.add(0, wanted / factor - wide(base), examples.weights[:, None].sqrt())
    rows, _ = fitting.solve(0, RIDGES, torch.float32)
    return down_parts(rows.float(), feed_forward.bias is not None)
