"""What the processes of tests/test_distill.py run, under torchrun: a training by each strategy.

ZeRO-2 trains a second time with a SIGTERM that reaches one process alone in the middle, followed by
the same command again.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from m2d.cli import main
from m2d.distill import trainer, watch

STOP_AT = 3
ADAM_EPSILON = 0.1


@contextlib.contextmanager
def large_epsilon() -> Iterator[None]:
    """Trainings whose result can be compared between ways of adding up the same gradients.

    AdamW divides a gradient g by |g| + 1e-8, so that where g is as small as its own rounding, any
    two runs part by whole steps. With 0.1 instead, an error e of a gradient moves a weight by no
    more than e times 10 learning rates a step, too little for the runs to drift apart; and
    gradients that are too large by a factor, which AdamW hides, show.
    """
    original = trainer.OPTIMIZERS

    def changed(learning_rate: float) -> tuple[Any, dict[str, Any]]:
        kind, settings = original["adamw"](learning_rate)
        return kind, {**settings, "eps": ADAM_EPSILON}

    trainer.OPTIMIZERS = {"adamw": changed}
    yield
    trainer.OPTIMIZERS = original


def train(folder: Path, strategy: str, out: str, steps: int) -> int:
    arguments = ["distill", str(folder / "student"), str(folder / "teacher"), str(folder / out)]
    arguments += ["--tokens", str(folder / "tokens.safetensors"), "--steps", str(steps)]
    arguments += ["--batch", "8", "--device-batch", "2", "--learning-rate", "0.01"]
    arguments += ["--precision", "fp32", "--strategy", strategy]
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def stop_at(step: int) -> Iterator[None]:
    """Send this process, the second alone, a SIGTERM at the end of a step."""
    original = watch.Watch.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    watch.Watch.on_step_end = on_step_end
    yield
    watch.Watch.on_step_end = original


if __name__ == "__main__":
    # All runs share the launcher's one process group.
    torch.distributed.destroy_process_group = lambda: None
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    with large_epsilon():
        for strategy in sys.argv[3:]:
            assert train(folder, strategy, strategy, steps) == 0
            if strategy == "zero2":
                with stop_at(STOP_AT):
                    assert train(folder, strategy, "zero2-stopped", steps) == watch.EXIT_STOPPED
                assert not (folder / "zero2-stopped").exists()
                assert train(folder, strategy, "zero2-stopped", steps) == 0
