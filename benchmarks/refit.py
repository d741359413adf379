"""Refit at Qwen3-30B-A3B's layer shape (width 6144, hidden size 2048): its time and peak memory.

Time is taken apart: sums over tokens grow with the tokens, solving does not. Beside each stands the
time of a plain matrix product of the same size, so that the ratio says what is ours to save.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import (
    COMPUTE,
    CPU,
    clock_of,
    device_option,
    peak_memory,
    real_shape_teacher,
    report,
    scratch_folder,
    scratch_option,
    side_by_side,
)
from merge import plan_for

from m2d.choose.plan import plan_from_dict
from m2d.models.teacher import open_teacher
from m2d.refit.refit import refit, refit_record, write_refitted
from m2d.refit.ridge import solve_ridge
from m2d.statistics.moments import Moments
from m2d.students.merge import write_student

WIDTH, HIDDEN = 6144, 2048
PAPER_TOKENS = 512 * 2048
RIDGES_OF_BENCHMARK = (1e-2, 1e-3)


def sums(tokens: int, device: torch.device) -> None:
    """Adding a block of tokens to the moments, against its two matrix products in float32."""
    h, y = (torch.randn(tokens, columns, device=device) for columns in (WIDTH, HIDDEN))
    moments = Moments.zero(WIDTH, HIDDEN, device)
    times = side_by_side(
        {"add": lambda: moments.add(h, y), "products": lambda: (h.T @ h, h.T @ y)},
        repeats=2,
        clock=clock_of(False, device)[0],
    )
    report(
        "refit sums / matrix products",
        times["add"] / times["products"],
        "<= 1.3",
        f"{tokens} tokens of width {WIDTH}, float32 products added to float64 totals",
        seconds=round(times["add"], 4),
        seconds_per_layer_at_512x2048_tokens=round(times["add"] * PAPER_TOKENS / tokens, 1),
        operations_per_token=2 * WIDTH * (WIDTH + HIDDEN),
        threads=torch.get_num_threads(),
    )


def solution(device: torch.device) -> None:
    """One ridge, against one float64 matrix product [W, W] x [W, H] times the operations' ratio."""
    make = {"dtype": torch.float64, "device": device}
    noise = torch.randn(WIDTH, WIDTH, **make)
    hth = noise + noise.T + 4 * WIDTH**0.5 * torch.eye(WIDTH, **make)
    hty = torch.randn(WIDTH, HIDDEN, **make)
    times = side_by_side(
        {"solve": lambda: solve_ridge(hth, hty, 1e-3, hty), "product": lambda: hth @ hty},
        repeats=1,
        warm_up=device.type == "cuda",
        clock=clock_of(False, device)[0],
    )
    operations = WIDTH**3 / 3 + 2 * WIDTH**2 * HIDDEN
    product = times["product"] * operations / (2 * WIDTH**2 * HIDDEN)
    report(
        "refit solution / matrix product of as many operations",
        times["solve"] / product,
        "<= 2",
        f"one Cholesky factor [{WIDTH}, {WIDTH}] and {HIDDEN} solutions, float64",
        seconds=round(times["solve"], 3),
        threads=torch.get_num_threads(),
    )


def whole(folder: Path, sequences: int, length: int) -> None:
    """What the child process of `memory` runs."""
    teacher = open_teacher(folder)
    tokens = torch.randint(0, 8192, (sequences, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        plan = plan_from_dict(plan_for(1), num_experts=teacher.num_experts)
        student = write_student(teacher, plan, Path(scratch) / "student")
        found = refit(
            open_teacher(folder), student, tokens, "sequential",
            dtype=COMPUTE, device=CPU, batch=2, ridges=RIDGES_OF_BENCHMARK,
        )  # fmt: skip
        record = refit_record("sequential", tokens, found, COMPUTE)
        write_refitted(student, Path(scratch) / "refit", teacher.family, found, record)


def memory(folder: Path, sequences: int, length: int) -> None:
    size = ["--sequences", str(sequences), "--length", str(length)]
    peak, seconds = peak_memory([__file__, "--whole", str(folder), *size])
    one = WIDTH**2 * 8
    report(
        "refit peak memory in matrices [W, W] of float64",
        peak / one,
        "stated, none set",
        f"a process that merges and refits (sequential) a one-layer teacher on {sequences} x "
        f"{length} tokens, {len(RIDGES_OF_BENCHMARK)} ridges",
        peak_megabytes=round(peak / 1e6),
        cpu_seconds=round(seconds, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scratch_option(parser)
    device_option(parser)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--whole", type=Path, metavar="TEACHER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.whole:
        whole(args.whole, args.sequences, args.length)
        return
    sums(2048, args.device)
    solution(args.device)
    if args.device != CPU:  # peak memory is this machine's
        return
    with scratch_folder(args.scratch) as scratch:
        memory(real_shape_teacher(scratch, 1), args.sequences, args.length)


if __name__ == "__main__":
    main()
