"""Whether the hidden states' distance helps a distillation: KL after 65,536 tokens, by its weight.

Two students of the demo teacher, of the paper's recipe and of the best one, are distilled by
`m2d distill` with each weight and seed. Prints a row per student and weight: the mean and standard
deviation over the seeds of KL(teacher || student) on the test tokens, and CPU seconds.

    python benchmarks/hidden_loss.py CORPUS [--seeds 0 1 2] [--weights 0 0.1 1]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shared_gate import log_probabilities
from torch.nn import functional

import m2d
from m2d.cli import main as run
from m2d.models.teacher import quiet
from m2d.tokens.tokenize import tokens_from

TEACHER = Path("workflow/resources/demo-teacher")
LENGTH, STEPS, BATCH = 256, 64, 4
# The recipe of m2d convert, and the learning rate that is best for its student.
STUDENTS = {"paper": "2e-3", "best": "5e-4"}


def distilled(student: Path, out: Path, tokens: Path, *more: Any) -> float:
    """Distil a student; CPU seconds."""
    start = time.process_time()
    words: list[Any] = ["distill", student, TEACHER, out, "--tokens", tokens, "--steps", STEPS]
    words += ["--batch", BATCH, "--device-batch", BATCH, "--warmup-steps", STEPS // 8]
    if run([str(word) for word in (*words, *more)]):
        raise SystemExit("a distillation failed")
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="from m2d demo corpus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = tokens_from(TEACHER, [args.corpus / "test.jsonl"], None, LENGTH, 32)
    theirs = log_probabilities(TEACHER, test)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        work = Path(scratch)
        text = {
            split: ["--text", args.corpus / f"{split}.jsonl", "--length", LENGTH]
            for split in ("train", "calibration")
        }
        counted = ["--sequences", STEPS * BATCH]
        run([str(w) for w in ("tokenize", TEACHER, work / "tokens", *text["train"], *counted)])
        for name, rate in STUDENTS.items():
            student = work / name
            m2d.convert(
                TEACHER, student, text=[args.corpus / "calibration.jsonl"],
                sequences=128, length=LENGTH, recipe=name,
            )  # fmt: skip
            for weight in args.weights:
                kls, seconds = [], []
                for seed in args.seeds:
                    out = work / f"{name}-{weight}-{seed}"
                    more = ("--seed", seed, "--hidden-loss-weight", weight, "--learning-rate", rate)
                    seconds.append(distilled(student, out, work / "tokens", *more))
                    ours = log_probabilities(out, test)
                    kl = functional.kl_div(ours, theirs, log_target=True, reduction="sum")
                    kls.append(float(kl) / test.numel())
                row = {"student": name, "weight": weight, "kl": statistics.mean(kls)}
                row |= {"spread": statistics.stdev(kls) if len(kls) > 1 else None, "kls": kls}
                print(json.dumps({**row, "cpu_seconds": statistics.mean(seconds)}), flush=True)


if __name__ == "__main__":
    main()
