"""How many calibration tokens and alignment steps fit a budget of time or tokens.

Time is predicted from a probe: the teacher's first MoE layer is read and run on a few sequences,
every pass over it that the conversion will make is timed, and so is a step of training a student's
FFN. Shapes: n calibration tokens, W the student's width, H hidden size.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from m2d.choose.neurons import top_neurons
from m2d.errors import UserError
from m2d.models.routers import routed_rows
from m2d.models.teacher import Teacher
from m2d.recipes import Conversion
from m2d.refit.align import AlignSettings, Examples, train_block
from m2d.refit.fold import FoldTotals
from m2d.refit.halves import SteppedModel
from m2d.refit.ridge import RIDGES
from m2d.statistics.gram import GramTotals
from m2d.statistics.neurons import CANDIDATES_PER_NEURON, CandidateMoments, NeuronTotals, score_of
from m2d.statistics.routing import RoutingTotals

UNITS = {"s": 1, "min": 60, "h": 3600}
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MARGIN = 0.85  # of a budget of time: the probe is short, and other things run on a machine
PASSES = 4  # of alignment over the calibration tokens
STEPS = (40, 320)  # least and most of alignment; more hardly helps
MOST_TOKENS = 2**20  # the paper's calibration
MATRIX = 1024  # widest matrix that is solved for timing


@dataclass(frozen=True)
class Budget:
    """Seconds or tokens; the other is None."""

    seconds: float | None
    tokens: int | None


@dataclass(frozen=True)
class Speed:
    """What a conversion takes, in seconds."""

    fixed: float
    """Reading the teacher as often as it is passed through, and solving."""
    token: float
    """For each calibration token."""
    step: float
    """For each step of alignment, of all layers together."""

    def seconds(self, tokens: int, steps: int) -> float:
        """The whole conversion."""
        return self.fixed + tokens * self.token + steps * self.step


@dataclass(frozen=True)
class Chosen:
    """What fits."""

    sequences: int
    steps: int
    """0 where the recipe has no alignment."""
    seconds: float | None
    """Predicted; None for a budget of tokens."""


def parse_budget(text: str) -> Budget:
    """ "30min", "2h" or "90s" of time; "500k", "2M" or a plain number of tokens.

    Raises UserError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    value = float(found[1]) if found else 0.0
    unit = found[2].lower() if found else ""
    if value > 0 and unit in UNITS:
        return Budget(value * UNITS[unit], None)
    if value > 0 and unit in COUNTS:
        return Budget(None, int(value * COUNTS[unit]))
    raise UserError(f"--budget {text}: give a time such as 30min or 2h, or tokens such as 2M")


def choose(budget: Budget, how: Conversion, length: int, speed: Speed | None) -> Chosen:
    """Calibration sequences of `length` tokens, and steps of alignment, that fit the budget.

    A budget of tokens counts those of calibration once and those of every step of alignment. speed:
    needed for a budget of time. Raises UserError where not even two sequences fit.
    """
    step_tokens = AlignSettings().tokens
    for sequences in range(MOST_TOKENS // length or 2, 1, -1):
        tokens = sequences * length
        steps = min(STEPS[1], max(STEPS[0], PASSES * tokens // step_tokens)) if how.align else 0
        if budget.tokens is not None and tokens + steps * step_tokens <= budget.tokens:
            return Chosen(sequences, steps, None)
        if budget.seconds is not None and speed is not None:
            seconds = speed.seconds(tokens, steps)
            if seconds <= MARGIN * budget.seconds:
                return Chosen(sequences, steps, seconds)
    least = (
        "" if speed is None else f"; about {speed.seconds(2 * length, STEPS[0]):.0f} s are needed"
    )
    raise UserError(f"--budget: too small for two sequences of {length} tokens{least}")


@torch.no_grad()
def measure_speed(
    teacher: Teacher, how: Conversion, tokens: Tensor, batch: int, width: int,
    dtype: torch.dtype, device: torch.device,
) -> Speed:  # fmt: skip
    """The speed of a conversion here, from a probe on tokens [sequences, length]."""
    family = teacher.family
    model = SteppedModel(teacher, dtype, device)
    index = teacher.moe_layers[0]
    model.start(tokens[:batch], batch)
    start = time.perf_counter()
    layer = model.load(index)
    load = time.perf_counter() - start
    count = model.hidden[0].shape[0] * model.hidden[0].shape[1]
    router = routed_rows(layer.get_submodule(family.router), teacher.num_experts)
    experts: Any = layer.get_submodule(family.experts)

    def timed(visit: Callable[..., None] | None) -> float:
        """Seconds a token of a pass through the layer, the second time."""
        taken = math.inf
        for _ in range(2):
            experts.observer = None
            if visit is not None:
                experts.observer = lambda *args: visit(index, router, experts, *args)
            began = time.perf_counter()
            layer(model.hidden[0], **model.call(index, 0))
            _finish(device)
            taken = min(taken, time.perf_counter() - began)
        return taken / count

    plain = timed(None)
    passes, token = 1, 0.0
    if how.fold:
        far = torch.zeros(10**6, dtype=torch.bool)  # the probe is not to reach a layer's end
        args = (family.probabilities, family.router_float32)
        token, passes = token + timed(FoldTotals(far, 1, how.fold, how.alpha, *args).visit), 2
    if how.granularity == "neurons":
        totals = NeuronTotals()
        token += timed(totals.visit)
        if how.choice == "greedy":
            most = teacher.num_experts * teacher.expert_width
            found = top_neurons(
                score_of(totals.result()[index]), min(CANDIDATES_PER_NEURON * width, most)
            )
            token, passes = token + timed(CandidateMoments({index: found}).visit), passes + 1
    else:
        token += timed(RoutingTotals(teacher).visit) + timed(GramTotals().visit) - plain
    student = _student_step(teacher, dtype, device, width)
    for part in (how.refit, how.align):
        if part:
            token, passes = token + plain + student / 3, passes + 1
    solve = _solve(width, device) * (len(RIDGES) * (bool(how.refit) + bool(how.align)))
    if how.choice == "greedy" and how.granularity == "neurons":
        solve += _solve(width, device) * 3 * CANDIDATES_PER_NEURON
    layers, moe = len(model.layers), len(teacher.moe_layers)
    model.drop(layer)
    step = student * AlignSettings().tokens * moe if how.align else 0.0
    return Speed(layers * load * passes + moe * solve, layers * token, step)


def describe_choice(
    text: str, chosen: Chosen, tokens: Tensor, budget: Budget, speed: Speed | None
) -> str:
    """What was chosen, and why."""
    line = f"budget {text}: {len(tokens):,} sequences of {tokens.shape[1]:,} calibration tokens"
    if len(tokens) < chosen.sequences:
        line += f" (all that there are; {chosen.sequences:,} would fit)"
    line += f", {chosen.steps} alignment steps" if chosen.steps else ""
    if speed is None:
        return line
    seconds = speed.seconds(tokens.numel(), chosen.steps)
    return (
        f"{line}; about {seconds:,.0f} s by a probe of this machine: {speed.fixed:.1f} s for "
        f"reading and solving, {1000 * speed.token:.2g} ms a token, {speed.step:.2g} s a step"
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _student_step(teacher: Teacher, dtype: torch.dtype, device: torch.device, width: int) -> float:
    """Seconds a token of a step of training an FFN of this width."""
    size, settings = int(teacher.config.hidden_size), AlignSettings(steps=1)

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(size, width, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(width, size, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    block = FeedForward().to(device)
    inputs = torch.randn(settings.tokens, size, dtype=dtype, device=device)
    held_out = torch.zeros(len(inputs), dtype=torch.bool, device=device)
    weights = torch.ones(len(inputs), 1, device=device)
    examples = Examples(inputs, inputs, weights, held_out)
    dense = replace(teacher.family, student_experts=0)
    taken = math.inf
    for _ in range(2):
        start = time.perf_counter()
        with torch.enable_grad():
            train_block(block, dense, examples, settings, 1.0)
        _finish(device)
        taken = min(taken, time.perf_counter() - start)
    return taken / settings.tokens


def _solve(width: int, device: torch.device) -> float:
    """Seconds of a Cholesky solution of that width, float64."""
    size = min(width, MATRIX)
    matrix = torch.eye(size, dtype=torch.float64, device=device)
    start = time.perf_counter()
    torch.cholesky_solve(matrix, torch.linalg.cholesky(matrix))
    _finish(device)
    return (time.perf_counter() - start) * (width / size) ** 3
