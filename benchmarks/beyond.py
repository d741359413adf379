"""What fold, refit and align are worth: perplexity, KL and tasks against distillation tokens.

Each student is made from one seed's calibration tokens, distilled by forward KL, and measured at
every budget: the learning rate is constant until 70 % of the budget and falls linearly to 0, so
budgets share the constant part. Each result is a line of RESULTS; what is there is not repeated, so
a run may be stopped and started at will. `beyond_report.py` makes the tables and the figure.

    python benchmarks/beyond.py WORK --teacher TEACHER --corpus CORPUS --students do-acp best
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from beyond_students import STUDENTS, make_student
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from m2d.devices import pick_device
from m2d.distill.heads import head_of, hidden_states
from m2d.distill.loss import distillation_loss
from m2d.evaluate.perplexity import loaded_nll
from m2d.models.teacher import count_parameters, quiet
from m2d.tokens.tokenize import tokens_from

CPU = torch.device("cpu")
LENGTH = 256
DECAY = 0.3  # the last share of a budget, in which the learning rate falls
WARM_UP = 8  # steps
SEQUENCES = {"calibration": 900, "test": 32, "train": 2560}


def load_float32(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def read_data(args: argparse.Namespace) -> dict[str, Tensor]:
    file = args.work / "tokens.pt"
    if not file.exists():
        data = {
            split: tokens_from(args.teacher, [args.corpus / f"{split}.jsonl"], None, LENGTH, count)
            for split, count in SEQUENCES.items()
        }
        torch.save(data, file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def last_states(model: Any, tokens: Tensor) -> Tensor:
    return torch.cat([hidden_states(model, ids.to(model.device)).cpu() for ids in tokens.split(16)])


def teacher_states(args: argparse.Namespace, model: nn.Module, data: dict[str, Tensor]) -> Any:
    """The teacher's last hidden states on train and test tokens, computed once; on a GPU if any."""
    file = args.work / "states.pt"
    if not file.exists():
        model = copy.deepcopy(model).to(pick_device(None))
        states = {split: last_states(model, data[split]).bfloat16() for split in ("train", "test")}
        torch.save(states, file)
    return torch.load(file, weights_only=True, mmap=True)


@torch.no_grad()
def measure(model: Any, teacher: Any, states: Tensor, tokens: Tensor) -> dict[str, float]:
    """Perplexity, and KL(teacher || student) per token in nats."""
    model.eval()
    nll = float(loaded_nll(model, tokens, 16, CPU).sum()) / (len(tokens) * (LENGTH - 1))
    total = 0.0
    for ids, target in zip(tokens.split(16), states.split(16), strict=True):
        ours = head_of(model).logits(hidden_states(model, ids).flatten(0, 1)).log_softmax(-1)
        theirs = head_of(teacher).logits(target.float().flatten(0, 1)).log_softmax(-1)
        total += float(functional.kl_div(ours, theirs, log_target=True, reduction="sum"))
    model.train()
    return {"perplexity": math.exp(nll), "kl": total / tokens.numel()}


def train(
    student: Any,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rate: Callable[[int], float],
    batch_of: Callable[[int], tuple[Tensor, Tensor]],
    head: Any,
) -> float:
    """Distil over `steps`; returns CPU seconds."""
    start = time.process_time()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        ids, target = batch_of(step)
        with torch.autocast("cpu", torch.bfloat16):
            found = hidden_states(student, ids).flatten(0, 1)
        loss = distillation_loss(found.bfloat16(), head_of(student), target.flatten(0, 1), head)
        (loss / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.process_time() - start


def curve(
    args: argparse.Namespace, about: dict[str, Any], folder: Path, teacher: Any,
    states: Any, data: dict[str, Tensor], write: Callable[[dict[str, Any]], None], done: set[int],
) -> None:  # fmt: skip
    """Every budget of one student, seed and learning rate that is not yet done."""
    student: Any = load_float32(folder).train()
    seed, top, batch = about["seed"], about["learning_rate"], args.batch
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(seed))
    head = head_of(teacher)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        rows = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        return data["train"][rows], states["train"][rows]

    def warm(step: int) -> float:
        return top * min(1.0, (step + 1) / WARM_UP)

    optimizer = torch.optim.AdamW(student.parameters(), top, betas=(0.9, 0.95), weight_decay=0.0)
    at, seconds = 0, 0.0
    for budget in args.budgets:
        steps = budget // (batch * LENGTH)
        turn = round((1 - DECAY) * steps)
        if budget in done:
            continue
        if budget:
            seconds += train(student, optimizer, range(at, turn), warm, batch_of, head)
            at = turn
        branch = copy.deepcopy(student)
        own = torch.optim.AdamW(branch.parameters(), top, betas=(0.9, 0.95), weight_decay=0.0)
        own.load_state_dict(optimizer.state_dict())

        def falling(step: int, steps: int = steps, turn: int = turn) -> float:
            return min(warm(step), top * (steps - step) / (steps - turn))

        extra = train(branch, own, range(turn, steps), falling, batch_of, head)
        found = measure(branch, teacher, states["test"], data["test"])
        kept = args.work / "kept" / f"{about['student']}-{seed}-{top:g}-{batch}-{budget}.pt"
        kept.parent.mkdir(exist_ok=True)
        torch.save(branch.state_dict(), kept)
        write({**about, "batch": batch, "tokens": budget, "seconds": seconds + extra, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of students, states and results")
    parser.add_argument("--teacher", type=Path, default=Path("workflow/resources/demo-teacher"))
    parser.add_argument("--corpus", type=Path, default=Path("results/corpus"))
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 65536, 131072, 327680])
    parser.add_argument("--learning-rate", type=float, help="(default: the student's own)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    with quiet():
        data = read_data(args)
        teacher = load_float32(args.teacher)
        states = teacher_states(args, teacher, data)
        for seed in args.seeds:
            for name in args.students:
                folder, cost = make_student(args, name, seed, data["calibration"])
                rate = args.learning_rate or STUDENTS[name].learning_rate
                about = {"student": name, "seed": seed, "learning_rate": rate}
                lines = results.read_text().splitlines() if results.exists() else []
                done = {
                    row["tokens"]
                    for row in map(json.loads, lines)
                    if {**about, "batch": args.batch}.items() <= row.items()
                }
                if done.issuperset(args.budgets):
                    continue
                size = count_parameters(load_float32(folder))
                about |= {"parameters": size, "cost": cost}

                def write(row: dict[str, Any]) -> None:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print({k: v for k, v in row.items() if k != "cost"}, flush=True)

                curve(args, about, folder, teacher, states, data, write, done)


if __name__ == "__main__":
    main()
