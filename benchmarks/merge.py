"""Merge against `cp` of the bytes it must read and write; its peak memory for 2 and 4 layers."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from common import peak_memory, real_shape_teacher, report, side_by_side

from m2d.artifacts import flush_to_disk
from m2d.choose.plan import plan_from_dict
from m2d.models.checkpoint import Checkpoint
from m2d.models.teacher import open_teacher
from m2d.stages.merge import write_student

KEEP = 8


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


def against_cp(folder: Path, layers: int, scratch: Path) -> None:
    teacher = open_teacher(real_shape_teacher(folder, layers))
    plan = plan_from_dict(plan_for(layers), num_experts=teacher.num_experts)
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
        shutil.copyfile(source, copied)
        flush_to_disk(copied)

    times = side_by_side({"merge": merge, "cp": copy}, repeats=5)
    nbytes = sum(entry.nbytes for entry in Checkpoint(student).entries.values())
    report(
        "merge / cp",
        times["merge"] / times["cp"],
        "<= 1.3",
        f"{layers} layers of Qwen3-30B-A3B's shape, K={KEEP}, in one process, files in the page "
        "cache, both with fsync, opening the teacher included, imports not; medians of 5 in turns",
        merge_seconds=round(times["merge"], 3),
        cp_seconds=round(times["cp"], 3),
        student_bytes=nbytes,
    )


def memory(folders: dict[int, Path], scratch: Path) -> None:
    peaks = {}
    for layers, folder in folders.items():
        plan = scratch / f"plan-{layers}.json"
        plan.write_text(json.dumps(plan_for(layers)))
        out = scratch / f"student-{layers}"
        peaks[layers], _ = peak_memory(
            ["-m", "m2d.cli", "merge", str(real_shape_teacher(folder, layers)), str(out),
             "--plan", str(plan)]
        )  # fmt: skip
    report(
        "merge peak memory, 4 layers / 2 layers",
        peaks[4] / peaks[2],
        "1.0, and each <= 1 GB",
        "ru_maxrss of `m2d merge --plan`, the interpreter and its libraries included",
        peak_megabytes={layers: round(peak / 1e6) for layers, peak in peaks.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teachers", type=Path, default=Path("results/benchmarks/teachers"))
    args = parser.parse_args()
    folders = {layers: args.teachers / f"qwen3-30b-a3b-{layers}-layers" for layers in (2, 4)}
    args.teachers.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.teachers) as scratch:
        against_cp(folders[4], 4, Path(scratch))
        memory(folders, Path(scratch))


if __name__ == "__main__":
    main()
