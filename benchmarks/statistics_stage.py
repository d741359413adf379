"""Streamed statistics against the fully loaded model; memory; growth with layers and tokens."""

import argparse
from pathlib import Path

import torch
from common import (
    COMPUTE,
    CPU,
    LAYER_BYTES,
    LAYER_SHAPE,
    clock_of,
    cpu_time_option,
    peak_memory,
    real_shape_teacher,
    report,
    scratch_folder,
    scratch_option,
    side_by_side,
)
from transformers import AutoModelForCausalLM

from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.statistics.routing import RoutingTotals
from m2d.statistics.together import collect_statistics

LENGTH, BATCH, HIDDEN = 512, 4, 2048


def tokens_of(sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, int(LAYER_SHAPE["vocab_size"]), (sequences, LENGTH), generator=generator
    )


def against_loaded(folder: Path, cpu_time: bool) -> None:
    clock, timing = clock_of(cpu_time)
    tokens = tokens_of(8)

    def streamed() -> None:
        teacher = open_teacher(folder)
        stream = StreamedTeacher(teacher, COMPUTE, CPU)
        stream.run(tokens, BATCH, RoutingTotals(teacher).visit)

    @torch.no_grad()
    def loaded() -> None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=COMPUTE, experts_implementation="grouped_mm"
        ).eval()
        for ids in tokens.split(BATCH):
            model(ids, use_cache=False, logits_to_keep=1)

    times = side_by_side({"streamed": streamed, "loaded": loaded}, repeats=3, clock=clock)
    report(
        "streamed statistics / loaded forward",
        times["streamed"] / times["loaded"],
        "<= 1.1",
        f"2 layers of Qwen3-30B-A3B's shape, {tokens.numel()} tokens, both with loading; the "
        f"loaded model with its grouped_mm experts and no statistics; medians of 3 in turns; "
        f"{timing}",
        seconds={name: round(value, 2) for name, value in times.items()},
    )


def collect(folder: Path, sequences: int) -> None:
    """Statistics and Gram in one pass; run in a process of its own."""
    if not sequences:
        return
    stream = StreamedTeacher(open_teacher(folder), COMPUTE, CPU)
    collect_statistics(stream, tokens_of(sequences), BATCH)


def growth(scratch: Path) -> None:
    """Time and memory for more layers and more tokens, in a process each."""

    def run(layers: int, sequences: int) -> tuple[float, float]:
        folder = real_shape_teacher(scratch, layers)
        return peak_memory([__file__, "--collect", str(folder), str(sequences)])

    _, start = run(2, 0)  # imports and the skeleton only
    for layers, sequences in ((2, 2), (3, 2), (4, 2), (2, 4), (2, 8)):
        peak, seconds = run(layers, sequences)
        activations = sequences * LENGTH * HIDDEN * COMPUTE.itemsize
        allowed = 2 * LAYER_BYTES + activations + 1e9
        report(
            f"statistics + Gram peak memory, {layers} layers, {sequences * LENGTH} tokens",
            peak / allowed,
            "<= 1",
            "ru_maxrss, everything included, against 2 layers' weights + activations + 1 GB; "
            "CPU seconds of the process less those of one without tokens",
            peak_megabytes=round(peak / 1e6),
            allowed_megabytes=round(allowed / 1e6),
            cpu_seconds=round(seconds - start, 1),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scratch_option(parser)
    cpu_time_option(parser)
    parser.add_argument(
        "--collect", nargs=2, metavar=("FOLDER", "SEQUENCES"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.collect:
        collect(Path(args.collect[0]), int(args.collect[1]))
        return
    with scratch_folder(args.scratch) as scratch:
        growth(scratch)  # first: a process's peak counts what its parent held when it began
        against_loaded(real_shape_teacher(scratch, 2), args.cpu_time)


if __name__ == "__main__":
    main()
