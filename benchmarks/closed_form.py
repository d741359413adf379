"""What the closed form is worth: perplexity before distillation, and against distillation tokens.

The paper's best recipe against every variant of docs/beyond.md: the same teacher, calibration
and test tokens, and distillation; several seeds. A seed draws the calibration sequences and orders
the distillation's. Every distilled student is distilled with several learning rates, and reported
with the one that suits it. Writes the measurements, a table and a figure; the document shows both.

    python benchmarks/closed_form.py --teacher workflow/resources/demo-teacher --corpus CORPUS
"""

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beyond import load_float32
from closed_form_report import write_report
from torch import Tensor

from m2d.choose.neuron_statistics import CHOICES, NeuronStatistics, neuron_plan
from m2d.choose.neurons import allot_widths, neuron_layer_plan
from m2d.choose.plan import Plan, make_plan
from m2d.choose.scoring import SCORINGS
from m2d.distill.heads import head_of, hidden_states
from m2d.distill.loss import distillation_loss
from m2d.evaluate.perplexity import loaded_nll
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import count_parameters, open_teacher, quiet
from m2d.refit.refit import refit, refit_record, write_refitted
from m2d.statistics.neurons import collect
from m2d.statistics.together import collect_statistics
from m2d.students.merge import write_student
from m2d.tokens.tokenize import tokens_from

CPU = torch.device("cpu")
LENGTH, BATCH = 256, 16
WARM_UP = 4  # steps of distillation


@dataclass(frozen=True)
class Variant:
    """A way to a student. `plan` is a key of `plans`."""

    name: str
    plan: str
    refit: str | None = None
    weighting: str = "equal"
    distilled: bool = False


VARIANTS = (
    Variant("DO-ACP, uniform (the paper's best)", "do-acp", distilled=True),
    Variant("DO-ACP, least-squares scales", "do-acp-ls"),
    Variant("OMP, uniform", "omp"),
    Variant("OMP, least-squares scales", "omp-ls"),
    Variant("DO-ACP, refit by layer", "do-acp-ls", "layer"),
    Variant("DO-ACP, sequential refit", "do-acp-ls", "sequential", distilled=True),
    Variant("DO-ACP, sequential refit, relative weighting", "do-acp-ls", "sequential", "relative"),
    Variant("OMP, refit by layer", "omp-ls", "layer"),
    Variant("OMP, sequential refit", "omp-ls", "sequential", distilled=True),
    Variant("neurons by contribution", "neurons"),
    Variant("neurons by contribution, refit by layer", "neurons", "layer"),
    Variant("neurons by contribution, sequential refit", "neurons", "sequential", distilled=True),
    Variant("greedy neurons, refit by layer", "greedy", "layer"),
    Variant("greedy neurons, sequential refit", "greedy", "sequential", distilled=True),
    Variant("greedy neurons, widths allotted, sequential refit", "allotted", "sequential"),
    Variant("greedy neurons, twice the width, sequential refit", "greedy-2x", "sequential"),
)


def plans(teacher: Path, tokens: Tensor) -> Iterator[tuple[str, Plan, float]]:
    """Name, plan, and the seconds that its calibration took, of every plan in VARIANTS."""
    stream = StreamedTeacher(open_teacher(teacher), torch.float32, CPU)
    start = time.process_time()
    layers = collect_statistics(stream, tokens, BATCH)
    taken = time.process_time() - start
    top_k = stream.teacher.top_k
    for scoring, name in (("gld_reap", "do-acp"), ("omp", "omp")):
        rankings = [SCORINGS[scoring](layer) for layer in layers]
        for scaling, suffix in (("uniform", ""), ("least_squares", "-ls")):
            plan = make_plan(layers, rankings, "round_robin", scaling, top_k, scoring=scoring)
            yield name + suffix, plan, taken
    width = top_k * stream.teacher.expert_width
    start = time.process_time()
    yield "neurons", neuron_plan(collect(stream, tokens, BATCH), width), time.process_time() - start
    start = time.process_time()
    neurons = collect(stream, tokens, BATCH, greedy=2 * width, candidates=8 * width)
    taken = time.process_time() - start
    for name, plan in (
        ("greedy", neuron_plan(neurons, width, "greedy")),
        ("allotted", allotted(neurons, width * len(neurons))),
        ("greedy-2x", neuron_plan(neurons, 2 * width, "greedy")),
    ):
        yield name, plan, taken


def allotted(layers: list[NeuronStatistics], total: int) -> Plan:
    """As many neurons in all, more where they lower a layer's error more.

    No stock class here has layers of unequal width, so the student is padded with zeros: what is
    measured is what such a class would give.
    """
    gains = [layer.greedy_gain for layer in layers if layer.greedy_gain is not None]
    widths = allot_widths(gains, total, multiple=8)
    return Plan(
        "neuron_greedy", "neurons", "mean_weight", None,
        tuple(
            neuron_layer_plan(layer.layer, CHOICES["greedy"](layer, width), layer.mean_weight)
            for layer, width in zip(layers, widths, strict=True)
        ),
    )  # fmt: skip


def perplexity(model: torch.nn.Module, tokens: Tensor) -> float:
    return math.exp(
        float(loaded_nll(model, tokens, BATCH, CPU).sum()) / (len(tokens) * (LENGTH - 1))
    )


class TeacherStates:
    """A teacher's last hidden states on the distillation's sequences, computed once."""

    def __init__(self, teacher: Path):
        self.model = load_float32(teacher)
        self.kept: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, rows: tuple[int, ...], ids: Tensor) -> Tensor:
        if rows not in self.kept:
            self.kept[rows] = hidden_states(self.model, ids).flatten(0, 1)
        return self.kept[rows]


def distill(
    student: torch.nn.Module,
    states: TeacherStates,
    tokens: Tensor,
    seed: int,
    points: list[int],
    learning_rate: float,
    batch: int,
    measure: Callable[[], float],
) -> list[dict[str, float]]:
    """Forward KL with AdamW at a constant rate after a warm-up; perplexity at `points`, in steps.

    The same loss as m2d distill; in memory, so that perplexity can be read on the way. The last
    point has also `kl`, the mean loss per token over the last quarter of the steps: no sequence is
    seen twice, so it measures the student on tokens that it was not trained on.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.AdamW(student.parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARM_UP))
    curve = [{"step": 0, "tokens": 0, "perplexity": measure(), "seconds": 0.0}]
    seconds = 0.0
    losses = []
    for step in range(points[-1]):
        start = time.process_time()
        rows = tuple(order[(step * batch + i) % len(order)] for i in range(batch))
        ids = tokens[list(rows)]
        target = states(rows, ids)
        found = hidden_states(student, ids).flatten(0, 1)
        loss = distillation_loss(found, head_of(student), target, head_of(states.model))
        losses.append(loss.item() / ids.numel())
        optimizer.zero_grad()
        (loss / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if step + 1 in points:
            point = {"step": step + 1, "tokens": (step + 1) * batch * LENGTH}
            curve.append({**point, "perplexity": measure(), "seconds": seconds})
    tail = losses[-(-3 * len(losses) // 4) :]
    curve[-1]["kl"] = sum(tail) / len(tail)
    return curve


def run_seed(args: argparse.Namespace, seed: int, data: dict[str, Tensor]) -> dict[str, Any]:
    """Every variant with one seed, in a process of one thread."""
    torch.set_num_threads(1)
    pool = data["calibration"]
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    calibration = pool[chosen[: args.calibration_sequences]]
    states = TeacherStates(args.teacher)
    rows: dict[str, Any] = {}
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        students: dict[str, tuple[Path, float]] = {}
        for name, plan, seconds in plans(args.teacher, calibration):
            out = write_student(open_teacher(args.teacher), plan, Path(scratch) / name)
            students[name] = (out, seconds)
        for variant in VARIANTS:
            folder, plan_seconds = students[variant.plan]
            row: dict[str, Any] = {"plan_seconds": plan_seconds}
            if variant.refit:
                start = time.process_time()
                teacher = open_teacher(args.teacher)
                found = refit(
                    teacher, folder, calibration, variant.refit,
                    weighting=variant.weighting, dtype=torch.float32, device=CPU, batch=BATCH,
                )  # fmt: skip
                record = refit_record(variant.refit, calibration, found, torch.float32)
                out = Path(scratch) / f"{variant.plan}-{variant.refit}-{variant.weighting}"
                folder = write_refitted(folder, out, teacher.family, found, record)
                row |= {"refit_seconds": time.process_time() - start, "refit": record["layers"]}
            student = load_float32(folder)
            row["parameters"] = count_parameters(student)
            row["perplexity"] = perplexity(student, data["test"])
            for rate in args.learning_rates if variant.distilled else ():
                student = load_float32(folder)
                row.setdefault("curves", {})[f"{rate:g}"] = distill(
                    student.train(), states, data["distillation"], seed, args.points, rate,
                    args.batch, lambda model=student: perplexity(model, data["test"]),  # type: ignore[misc]
                )  # fmt: skip
            rows[variant.name] = row
            lasts = {rate: c[-1]["perplexity"] for rate, c in row.get("curves", {}).items()}
            print(f"seed {seed}: {variant.name}: {row['perplexity']:.1f}, {lasts}", flush=True)
    return rows


def read_data(args: argparse.Namespace) -> dict[str, Tensor]:
    sizes = {
        "calibration": ("calibration", 3 * args.calibration_sequences),
        "test": ("test", args.test_sequences),
        "distillation": ("train", args.points[-1] * args.batch),
    }
    return {
        use: tokens_from(args.teacher, [args.corpus / f"{split}.jsonl"], None, LENGTH, count)
        for use, (split, count) in sizes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("workflow/resources/demo-teacher"))
    parser.add_argument("--corpus", type=Path, default=Path("results/corpus"))
    parser.add_argument("--out", type=Path, default=Path("docs/closed-form.json"))
    parser.add_argument("--document", type=Path, default=Path("docs/beyond.md"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration-sequences", type=int, default=128)
    parser.add_argument("--test-sequences", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a distillation step")
    parser.add_argument("--points", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="to choose from"
    )
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    args = parser.parse_args()
    with quiet():
        data = read_data(args)
        teacher = perplexity(load_float32(args.teacher), data["test"])
    print(f"teacher: {teacher:.2f}", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        waiting = [pool.submit(run_seed, args, seed, data) for seed in range(args.seeds)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        seeds = []
        for future in as_completed(waiting):  # what is done is kept, should the rest be stopped
            seeds.append(future.result())
            found = {"teacher_perplexity": teacher, "settings": settings(args), "seeds": seeds}
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            write_report(args.out, args.document)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("calibration_sequences", "test_sequences", "batch", "points", "learning_rates")
    return {**{name: getattr(args, name) for name in names}, "length": LENGTH}


if __name__ == "__main__":
    main()
