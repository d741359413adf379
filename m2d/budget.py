"""How many calibration tokens and alignment steps fit a budget of time or tokens.

Time is predicted from a probe: the teacher's first MoE layer is read and run on a few sequences,
every pass over it that the conversion will make is timed, and so is a step of training a student's
FFN. Alignment, the last part, then gets the steps that fit what time is left, at the speed that the
rest turned out to have. Shapes: n calibration tokens, W the student's width, H hidden size.
"""

import argparse
import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m2d.artifacts import make_own_folder, read_json, reading, write_json
from m2d.choose.neurons import top_neurons
from m2d.errors import UserError
from m2d.models.resume import identity, kept_folder
from m2d.models.routers import routed_rows
from m2d.models.teacher import Teacher
from m2d.models.visit import Visit
from m2d.options import MOST, token_count
from m2d.progress import say
from m2d.recipes import Conversion
from m2d.refit.fold import FoldTotals
from m2d.refit.halves import SteppedModel
from m2d.refit.ridge import RIDGES
from m2d.refit.training import AlignSettings, Examples, train_block
from m2d.statistics.gram import GramTotals
from m2d.statistics.neurons import CANDIDATES_PER_NEURON, CandidateMoments, NeuronTotals, score_of
from m2d.statistics.routing import RoutingTotals

UNITS = {"s": 1, "min": 60, "h": 3600}
# Of a budget of time, what a plan may take, since a probe is short and a machine runs other things;
# once all but alignment is done, alignment may take the rest, up to the second share.
MARGIN, LAST_MARGIN = 0.75, 0.95
LEAST_STEPS = 10  # of alignment where time has run short
PACE = (0.5, 4.0)  # how far off a probe is taken to be
PASSES = 8  # of alignment over the calibration tokens
STEPS = (40, 320)  # least and most of alignment; more hardly helps
MOST_TOKENS = 2**20  # the paper's calibration
CHOSEN = "budget.json"  # what was planned, where passes are kept (m2d.models.resume)
MATRIX = 1024  # widest matrix that is solved for timing


@dataclass(frozen=True)
class Budget:
    """Seconds or tokens; the other is None."""

    seconds: float | None
    tokens: int | None


@dataclass(frozen=True)
class Part:
    """Seconds that a part of a conversion takes."""

    fixed: float = 0.0
    """Reading the teacher as often as it is passed through, and solving."""
    token: float = 0.0
    """For each calibration token."""

    def seconds(self, tokens: int) -> float:
        return self.fixed + tokens * self.token


@dataclass(frozen=True)
class Speed:
    """What a conversion takes."""

    before: Part
    """All that comes before alignment."""
    align: Part
    step: float
    """Seconds for each step of alignment, of all layers together."""

    def seconds(self, tokens: int, steps: int) -> float:
        """The whole conversion."""
        aligning = self.align.seconds(tokens) + steps * self.step if steps else 0.0
        return self.before.seconds(tokens) + aligning


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
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text.strip().lower())
    if found and 0 < float(found[1]) <= MOST:
        return Budget(float(found[1]) * UNITS[found[2]], None)
    with contextlib.suppress(argparse.ArgumentTypeError):
        return Budget(None, token_count(text.strip()))
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


def steps_left(budget: float, speed: Speed, tokens: int, spent: float, since_probe: float) -> int:
    """Steps of alignment for the time that is left of a `budget` of seconds.

    spent: seconds since the beginning, since_probe: those that all but alignment took, by which the
    probe is corrected. At least LEAST_STEPS, even where no time is left.
    """
    pace = since_probe / max(speed.before.seconds(tokens), 1e-9)
    pace = min(PACE[1], max(PACE[0], pace))
    left = (LAST_MARGIN * budget - spent) / pace - speed.align.seconds(tokens)
    return min(STEPS[1], max(LEAST_STEPS, int(left / max(speed.step, 1e-9))))


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
    model.advance_to(index)  # layers may hand on what the next ones need
    start = time.perf_counter()
    layer = model.load(index)
    load = time.perf_counter() - start
    count = model.hidden[0].shape[0] * model.hidden[0].shape[1]
    router = routed_rows(layer.get_submodule(family.router), teacher.num_experts)
    experts: Any = layer.get_submodule(family.experts)

    def timed(visit: Callable[[Visit], None] | None) -> float:
        """Seconds a token of a pass through the layer, the second time."""
        taken = math.inf
        for _ in range(2):
            experts.observer = None
            if visit is not None:
                experts.observer = lambda *batch: visit(Visit(index, router, experts, *batch))
            began = time.perf_counter()
            model.calls.run(layer, index, 0, model.hidden[0])
            _finish(device)
            taken = min(taken, time.perf_counter() - began)
        return taken / count

    plain = timed(None)
    passes, token = 1, 0.0
    if how.fold:
        far = torch.zeros(10**6, dtype=torch.bool)  # the probe is not to reach a layer's end
        folding = FoldTotals(far, 1, how.fold, how.alpha, family.probabilities)
        token, passes = token + timed(folding.visit), 2
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
    solve = _solve(width, device)
    ridges, greedy = len(RIDGES), how.choice == "greedy" and how.granularity == "neurons"
    solutions = 3 * CANDIDATES_PER_NEURON if greedy else 0
    again = plain + student / 3  # both models' passes of refit, and of alignment
    if how.refit:
        token, passes, solutions = token + again, passes + 1, solutions + ridges
    layers, moe = len(model.layers), len(teacher.moe_layers)
    model.drop(layer)
    before = Part(layers * load * passes + moe * solve * solutions, layers * token)
    if not how.align:
        return Speed(before, Part(), 0.0)
    align = Part(layers * load + moe * solve * ridges, layers * again)
    return Speed(before, align, student * AlignSettings().tokens * moe)


@dataclass(frozen=True)
class Paced:
    """A conversion under a budget, on its way."""

    limit: Budget
    chosen: Chosen
    speed: Speed | None
    """None for a budget of tokens, and where an earlier run has chosen."""
    file: Path
    """Where the choice is kept for a run that goes on after a kill."""
    started: float
    """The times of beginning and of the choice, of time.monotonic."""
    begun: float

    def steps(self, tokens: int) -> int:
        """Steps of alignment, now that all the rest is done."""
        if self.speed is None or self.limit.seconds is None or not self.chosen.steps:
            return self.chosen.steps
        now = time.monotonic()
        spent = (now - self.started, now - self.begun)
        steps = steps_left(self.limit.seconds, self.speed, tokens, *spent)
        remember(self.file, replace(self.chosen, steps=steps))
        say(f"{spent[0]:,.0f} s have gone: {steps} alignment steps fit the rest of the budget")
        return steps


def pace(
    limit: Budget, how: Conversion, teacher: Teacher, probe: Tensor, width: int, out: str | Path,
    *, batch: int, dtype: torch.dtype, device: torch.device, started: float,
) -> Paced:  # fmt: skip
    """What fits the budget: of an earlier run that was killed, or from the speed of this machine.

    probe: the first sequences [n, length]; width: the student's; started: of time.monotonic.
    """
    what = identity(teacher.folder, probe, batch, dtype, width=width, **asdict(how))
    file = kept_folder(out, {**what, **asdict(limit)}) / CHOSEN
    speed = chosen = None
    if limit.seconds is not None:
        chosen = remembered(file)
        if chosen is None:
            speed = measure_speed(teacher, how, probe, batch, width, dtype, device)
    if chosen is None:
        chosen = choose(limit, how, probe.shape[1], speed)
    if speed is not None:
        remember(file, chosen)
    return Paced(limit, chosen, speed, file, started, time.monotonic())


def remembered(file: Path) -> Chosen | None:
    """What an earlier run has chosen, which was killed; None where there was none."""
    if not file.is_file():
        return None
    try:
        with reading(file, "what a run with --budget has chosen"):
            kept = read_json(file)
            found = Chosen(int(kept["sequences"]), int(kept["steps"]), None)
    except UserError as error:
        raise UserError(f"{error}; remove {file.parent} to begin anew") from None
    say(f"going on with what an earlier run has chosen, in {file.parent}")
    return found


def remember(file: Path, chosen: Chosen) -> None:
    """Keep a choice beside the output."""
    make_own_folder(file.parent)
    write_json(file, {"sequences": chosen.sequences, "steps": chosen.steps})


def describe_choice(text: str, paced: Paced, tokens: Tensor) -> str:
    """What was chosen, and why."""
    chosen, speed = paced.chosen, paced.speed
    line = f"budget {text}: {len(tokens):,} sequences of {tokens.shape[1]:,} calibration tokens"
    if len(tokens) < chosen.sequences:
        line += f" (all that there are; {chosen.sequences:,} would fit)"
    line += f", {chosen.steps} alignment steps" if chosen.steps else ""
    if speed is None:
        return line
    seconds = speed.seconds(tokens.numel(), chosen.steps)
    return (
        f"{line}; about {seconds:,.0f} s by a probe of this machine: "
        f"{speed.before.fixed + speed.align.fixed:.1f} s for reading and solving, "
        f"{1000 * (speed.before.token + speed.align.token):.2g} ms a token, {speed.step:.2g} s a "
        "step" + (" (to be corrected by what the rest will have taken)" if speed.step else "")
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
