"""What happens around the steps of a distillation: metrics, progress, checkpoints, signals."""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2d.distill.processes import agree
from m2d.errors import UserError
from m2d.progress import SECONDS_BETWEEN_LINES, say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# sysexits.h EX_TEMPFAIL: try again. A workflow's retry, or a requeued job, goes on from there.
EXIT_STOPPED = 75


class StopRequest:
    """Remembers a signal until the step is over. A second one of the same kind acts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])


class Watch(TrainerCallback):
    """Writes metrics and progress, and asks for checkpoints when they are due.

    Every process has one; they agree on each decision, since a checkpoint needs all of them.
    """

    def __init__(
        self,
        metrics: Path,
        tensorboard: Path | None,
        checkpoint_minutes: float,
        tokens_per_step: int,
        stop: StopRequest,
        end: float = float("inf"),
    ) -> None:
        """end: when to stop with a checkpoint, on the clock of time.monotonic."""
        self.metrics = metrics
        self.tensorboard = tensorboard
        self.seconds_between_checkpoints = checkpoint_minutes * 60
        self.tokens_per_step = tokens_per_step
        self.stop = stop
        self.end = end
        self.bar: Any = None
        self.writer: Any = None
        self.stopped = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.begin = self.last_log = self.last_line = time.monotonic()
        self.last_checkpoint = self.begin
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        keep_metrics(self.metrics, state.global_step)
        if self.tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.tensorboard), purge_step=state.global_step + 1)
        if sys.stderr.isatty():
            self.bar = tqdm(
                desc="distill",
                total=state.max_steps * self.tokens_per_step,
                initial=state.global_step * self.tokens_per_step,
                unit="tok",
                unit_scale=True,
                file=sys.stderr,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        now = time.monotonic()
        due = now - self.last_checkpoint >= self.seconds_between_checkpoints
        stop, due = agree([self.stop.signal is not None or now >= self.end, due], args.device)
        if state.global_step >= state.max_steps:
            return control  # all done: the student itself comes next
        if stop:
            self.stopped = control.should_training_stop = True
        if stop or due:
            control.should_save = True
        return control

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.last_checkpoint = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        if not abs(loss) < float("inf"):
            raise UserError(
                f"the loss is {loss} at step {step}; give a lower --learning-rate or more "
                "--warmup-steps"
            )
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": loss,
            "lr": float(logs["learning_rate"]),
            "grad_norm": float(logs.get("grad_norm", float("nan"))),
            "tokens_per_second": round(self.tokens_per_step / max(now - self.last_log, 1e-9), 1),
        }
        self.last_log = now
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
                self.writer.add_scalar(name, row[name], step)
        self._show(step, state.max_steps, loss, now)

    def _show(self, step: int, steps: int, loss: float, now: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self.bar.update(step * self.tokens_per_step - self.bar.n)
        elif step == steps or now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (step - self.first_step) / (now - self.begin)
            say(
                f"distill: step {step}/{steps}, loss {loss:.4f}, "
                f"{rate * self.tokens_per_step:,.0f} tokens/s, {(steps - step) / rate:.0f}s left"
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()


def keep_metrics(metrics: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will make again, and a line cut by a kill."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    metrics.write_text("".join(kept), encoding="utf-8")
