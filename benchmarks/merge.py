"""Merge against `cp` of the bytes it must read and write; its peak memory for 2 and 4 layers."""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

from common import (
    clock_of,
    cpu_time_option,
    peak_memory,
    real_shape_teacher,
    report,
    scratch_folder,
    scratch_option,
    side_by_side,
)

from m2d.artifacts import flush_to_disk
from m2d.choose.plan import plan_from_dict
from m2d.models.checkpoint import Checkpoint
from m2d.models.teacher import open_teacher
from m2d.students.merge import write_student

KEEP = 8
REPEATS = 5


def plan_for(layers: int) -> dict:
    """The first experts of each layer, every one its own group."""
    groups = [{"experts": [e], "weights": [1.0], "scale": 1 / KEEP} for e in range(KEEP)]
    return {
        "format": 1,
        "scoring": "gld_reap",
        "grouping": "round_robin",
        "scaling": "uniform",
        "keep": KEEP,
        "layers": [{"layer": layer, "groups": groups} for layer in range(layers)],
    }


def against_cp(folder: Path, layers: int, scratch: Path, cpu_time: bool) -> None:
    clock, timing = clock_of(cpu_time)
    plan = plan_from_dict(plan_for(layers), num_experts=128)
    student, copied = scratch / "student", scratch / "copied"

    def merge() -> None:
        shutil.rmtree(student, ignore_errors=True)
        write_student(open_teacher(folder), plan, student)

    merge()
    # A file with the student's bytes is what `cp` copies: as many read as written.
    source = scratch / "source"
    shutil.copyfile(student / "model.safetensors", source)

    def copy() -> None:
        copied.unlink(missing_ok=True)
        subprocess.run(["cp", "--reflink=never", source, copied], check=True)
        flush_to_disk(copied)

    times = side_by_side({"merge": merge, "cp": copy}, repeats=REPEATS, clock=clock)
    nbytes = sum(entry.nbytes for entry in Checkpoint(student).entries.values())
    report(
        f"merge / cp, {layers} layers",
        times["merge"] / times["cp"],
        "<= 1.3",
        f"{layers} layers of Qwen3-30B-A3B's shape, K={KEEP}, in one process, files in the page "
        f"cache, both with fsync, opening the teacher included, imports not; medians of {REPEATS} "
        f"in turns; {timing}",
        seconds={name: round(value, 3) for name, value in times.items()},
        student_bytes=nbytes,
    )
    for path in (source, copied):
        path.unlink()
    shutil.rmtree(student)


def memory(scratch: Path) -> None:
    peaks = {}
    for layers in (2, 4):
        plan = scratch / "plan.json"
        plan.write_text(json.dumps(plan_for(layers)))
        out = scratch / f"student-{layers}"
        teacher = real_shape_teacher(scratch, layers)
        command = ["-m", "m2d.cli", "merge", str(teacher), str(out), "--plan", str(plan)]
        peaks[layers], _ = peak_memory(command)
        shutil.rmtree(out)
    report(
        "merge peak memory / 1 GB",
        max(peaks.values()) / 1e9,
        "<= 1, the same for 2 and 4 layers",
        "ru_maxrss of `m2d merge --plan`, the interpreter and its libraries included",
        peak_megabytes={layers: round(peak / 1e6) for layers, peak in peaks.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scratch_option(parser)
    cpu_time_option(parser)
    args = parser.parse_args()
    with scratch_folder(args.scratch) as scratch:
        memory(scratch)  # first: a process's peak counts what its parent held when it began
        for layers in (2, 3, 4):
            against_cp(real_shape_teacher(scratch, layers), layers, scratch, args.cpu_time)


if __name__ == "__main__":
    main()
