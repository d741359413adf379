"""Streamed statistics against the fully loaded model; memory; growth with layers and tokens."""

import argparse
from pathlib import Path

import torch
from common import LAYER_SHAPE, peak_memory, real_shape_teacher, report, side_by_side
from transformers import AutoModelForCausalLM

from m2d.conversion import collect_statistics
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.stages.gram import CHUNK_BYTES
from m2d.stages.stats import RoutingTotals

CPU = torch.device("cpu")
LENGTH, BATCH = 512, 4
LAYER_BYTES = 2 * (128 * 3 * 768 * 2048 + 2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048)


def tokens_of(sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, int(LAYER_SHAPE["vocab_size"]), (sequences, LENGTH), generator=generator
    )


def against_loaded(folder: Path) -> None:
    tokens = tokens_of(8)

    def streamed() -> None:
        teacher = open_teacher(folder)
        stream = StreamedTeacher(teacher, torch.bfloat16, CPU)
        stream.run(tokens, BATCH, RoutingTotals(teacher).visit)

    @torch.no_grad()
    def loaded() -> None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        ).eval()
        for ids in tokens.split(BATCH):
            model(ids, use_cache=False, logits_to_keep=1)

    times = side_by_side({"streamed": streamed, "loaded": loaded}, repeats=3)
    report(
        "streamed statistics / loaded forward",
        times["streamed"] / times["loaded"],
        "<= 1.1",
        f"2 layers of Qwen3-30B-A3B's shape, {tokens.numel()} tokens, both with loading; the "
        "loaded model with its grouped_mm experts and no statistics; medians of 3 in turns",
        seconds={name: round(value, 2) for name, value in times.items()},
    )


def collect(folder: Path, sequences: int) -> None:
    """Statistics and Gram in one pass; run in a process of its own."""
    stream = StreamedTeacher(open_teacher(folder), torch.bfloat16, CPU)
    collect_statistics(stream, tokens_of(sequences), BATCH)


def growth(folders: dict[int, Path]) -> None:
    def run(layers: int, sequences: int) -> tuple[float, float]:
        return peak_memory([__file__, "--collect", str(folders[layers]), str(sequences)])

    base = run(2, 0)  # imports and the skeleton only
    cells = {(n, s): run(n, s) for n, s in ((2, 2), (3, 2), (4, 2), (2, 4), (2, 8))}
    for (layers, sequences), (peak, seconds) in cells.items():
        activations = sequences * LENGTH * 2048 * 2
        allowed = 2 * LAYER_BYTES + activations + 1e9
        report(
            f"statistics + Gram peak memory / allowed, {layers} layers, {sequences} sequences",
            peak / allowed,
            "<= 1",
            "ru_maxrss, everything included; allowed: 2 layers' weights + activations + 1 GB "
            f"(chunk limit {CHUNK_BYTES / 1e6:.0f} MB)",
            peak_megabytes=round(peak / 1e6),
            allowed_megabytes=round(allowed / 1e6),
            seconds_without_start=round(seconds - base[1], 1),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teachers", type=Path, default=Path("results/benchmarks/teachers"))
    parser.add_argument("--collect", nargs=2, metavar=("FOLDER", "SEQUENCES"))
    args = parser.parse_args()
    if args.collect:
        if int(args.collect[1]):
            collect(Path(args.collect[0]), int(args.collect[1]))
        return
    folders = {n: args.teachers / f"qwen3-30b-a3b-{n}-layers" for n in (2, 3, 4)}
    for layers, folder in folders.items():
        real_shape_teacher(folder, layers)
    against_loaded(folders[2])
    growth(folders)


if __name__ == "__main__":
    main()
