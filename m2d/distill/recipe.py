"""What a distillation does, worked out from its options, the tokens and the student."""

import argparse
import os
from collections.abc import Collection
from typing import Any

from m2d.distill.settings import DistillSettings
from m2d.errors import UserError
from m2d.options import AUTO
from m2d.settings import Count, NotNegative, Positive, Whole

# Defaults, of which docs/distillation.md has the evidence. One of so many steps is warm-up (the
# paper's 100 of 3000), such a share decay; and no more sequences a step than leave that many steps.
WARMUP_SHARE, DECAY_SHARE = 30, 0.3
MOST_BATCH, LEAST_STEPS = 384, 1000
# The peak: the paper's, and lower for a student that starts better, by the last of its repairs.
LEARNING_RATE, REPAIRED = 1e-4, {"align": 1 / 4, "refit": 1 / 2}


class Recipe(DistillSettings):
    """What determines the weights that come out, besides the student, the teacher and the tokens.

    The settings with what is worked out from them; `batch` is the sequences of one step over all
    processes and accumulation together.
    """

    steps: Count
    batch: Count
    learning_rate: Positive
    min_learning_rate: NotNegative
    warmup_steps: Whole
    decay_steps: Whole
    strategy: str  # type: ignore[assignment]  # as started: also "single"
    processes: Count

    @property
    def accumulation(self) -> int:
        """Micro-batches that a process sums up before each step."""
        return self.batch // (self.device_batch * self.processes)


def chosen_batch(sequences: int, steps: int | None, at_once: int) -> int:
    """Sequences of a step: one pass over all of them in `steps`, or in LEAST_STEPS or more.

    A multiple of `at_once`, those on all devices at a time, and at most MOST_BATCH.
    """
    wanted = min(MOST_BATCH, sequences // (steps or LEAST_STEPS))
    return max(wanted // at_once, 1) * at_once


def make_recipe(
    args: argparse.Namespace,
    strategy: str,
    sequences: int,
    precision: str,
    teacher_dtype: str,
    repairs: Collection[str] = (),
) -> Recipe:
    """The recipe of the command line; `sequences` are those of the token file.

    precision and teacher_dtype: what `auto` stands for on this device. repairs: the student's, of
    REPAIRED.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = args.device_batch * processes
    batch = args.batch or chosen_batch(sequences, args.steps, at_once)
    if batch % at_once:
        raise UserError(
            f"--batch {batch}: must be a multiple of --device-batch {args.device_batch} "
            f"times {processes} process{'es' * (processes > 1)}"
        )
    steps = args.steps or sequences // batch
    if not steps:
        raise UserError(
            f"{args.tokens}: its {sequences} sequences do not fill one step of --batch "
            f"{batch}; give more tokens, a smaller --batch, or --steps"
        )
    if steps * batch >= 2**62:
        raise UserError(f"--steps {steps} of --batch {batch}: more sequences than there can be")
    shares = [share for repair, share in REPAIRED.items() if repair in repairs]
    peak = args.learning_rate or LEARNING_RATE * (shares[0] if shares else 1)
    warmup = steps // WARMUP_SHARE if args.warmup_steps is None else args.warmup_steps
    decay = int(steps * DECAY_SHARE) if args.decay_steps is None else args.decay_steps
    if warmup + decay > steps:
        raise UserError(
            f"--warmup-steps {warmup} and --decay-steps {decay} are more than the {steps} steps"
        )
    floor = 0.0 if args.min_learning_rate is None else args.min_learning_rate
    if floor > peak:
        raise UserError(f"--min-learning-rate {floor:g}: is above --learning-rate {peak:g}")
    given = {name: getattr(args, name) for name in DistillSettings.model_fields}
    worked_out = {
        "steps": steps,
        "batch": batch,
        "learning_rate": peak,
        "min_learning_rate": floor,
        "warmup_steps": warmup,
        "decay_steps": decay,
        "strategy": strategy,
        "processes": processes,
        "precision": precision,
        "teacher_dtype": teacher_dtype,
    }
    return Recipe(**(given | worked_out))


def precision_on(asked: str, device: Any) -> str:
    """bf16 or fp32: as asked, or what this device is fast in."""
    import torch

    from m2d.devices import multiplies_fast

    return asked if asked != AUTO else "bf16" if multiplies_fast(torch.bfloat16, device) else "fp32"
