"""Muon against AdamW in `m2d align`, on a teacher that AdamW has trained.

The student is greedy neurons, folded and refitted, of a teacher of `second_teacher.py`; it is
aligned by each optimiser at several rates on one draw of the calibration sequences, and at each
one's best rate on two more. Prints a table: the layers' mean error on held-out tokens, perplexity
and KL(teacher || student) on test tokens, and the seconds of the alignment.

    python benchmarks/align_optimisers.py TEACHER CORPUS
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from shared_gate import CALIBRATION, LENGTH, NEURONS, TEST, figures, log_probabilities

import m2d
from m2d.artifacts import read_json
from m2d.cli import main as command
from m2d.tokens.tokenize import tokens_from

RATES = {"muon": (0.01, 0.02, 0.04, 0.08), "adamw": (0.01, 0.02, 0.04, 0.08)}
SEEDS = 3
POOL = 3 * CALIBRATION  # sequences of which each seed draws its own


class Outcome(NamedTuple):
    """What an alignment came to."""

    error: float  # mean over layers of the relative error on held-out tokens
    perplexity: float
    kl: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("corpus", type=Path, help="from m2d demo corpus")
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    test = tokens_from(str(args.teacher), [args.corpus / "test.jsonl"], None, LENGTH, TEST)
    pool = tokens_from(str(args.teacher), [args.corpus / "calibration.jsonl"], None, LENGTH, POOL)
    teacher = log_probabilities(args.teacher, test)
    found: dict[tuple[str, float], list[Outcome]] = {}
    before: list[Outcome] = []

    with tempfile.TemporaryDirectory() as scratch:

        def tokens_of(seed: int) -> Path:
            chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            file = Path(scratch, f"tokens-{seed}.safetensors")
            rows = pool[chosen[:CALIBRATION]].to(torch.int32).contiguous()
            notes = {"sequences": str(CALIBRATION), "length": str(LENGTH), "source": str(seed)}
            save_file({"input_ids": rows}, file, notes)
            return file

        def student_of(seed: int) -> Path:
            out = Path(scratch, f"student-{seed}")
            how: dict[str, Any] = {**NEURONS, "fold": "neuron", "refit": "sequential"}
            m2d.convert(args.teacher, out, tokens=tokens_of(seed), **how)
            scores = figures(teacher, log_probabilities(out, test), test)
            before.append(Outcome(float("nan"), *scores, 0.0))
            return out

        def aligned(student: Path, seed: int, optimiser: str, rate: float) -> None:
            out = Path(scratch, f"{optimiser}-{rate}-{seed}")
            words = ["align", student, args.teacher, out, "--tokens", tokens_of(seed)]
            words += ["--optimiser", optimiser, "--learning-rate", rate, "--steps", args.steps]
            start = time.monotonic()
            if command([str(word) for word in words]):
                raise SystemExit("m2d align failed")
            seconds = time.monotonic() - start
            layers = read_json(out / "m2d.json")["align"]["layers"]
            error = statistics.mean(layer["after"] for layer in layers)
            scores = figures(teacher, log_probabilities(out, test), test)
            found.setdefault((optimiser, rate), []).append(Outcome(error, *scores, seconds))
            print(f"seed {seed}, {optimiser}, {rate}: {found[optimiser, rate][-1]}", flush=True)

        for seed in range(SEEDS):
            student = student_of(seed)
            for optimiser, rates in RATES.items():
                if seed:  # the best rate of the first draw alone
                    rates = (min(rates, key=lambda rate: found[optimiser, rate][0].error),)
                for rate in rates:
                    aligned(student, seed, optimiser, rate)

    print(f"teacher: perplexity {figures(teacher, teacher, test)[0]:.1f}\n")
    print("| optimiser | rate | seeds | held-out error | perplexity | KL | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for (optimiser, rate), outcomes in [(("not aligned", float("nan")), before), *found.items()]:
        cells = [spread(values) for values in zip(*outcomes, strict=True)]
        print(f"| {optimiser} | {rate:g} | {len(outcomes)} | {' | '.join(cells)} |")


def spread(values: tuple[float, ...]) -> str:
    """Mean, and the standard deviation where there are several."""
    if any(map(math.isnan, values)):
        return "-"
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"


if __name__ == "__main__":
    main()
