"""A teacher of Qwen3-30B-A3B's whole shape, on the machine at hand: times and peak memory.

A checkpoint of random values (48 layers, 16 shards, 61 GB) goes through m2d inspect, convert
(killed once in the middle, and gone on with), stats, gram, rank, merge and perplexity, beside what
is estimated. The folder keeps what is finished, so that the same command goes on after a stop.
Fewer layers, of the same shape: `--layers 8`; then the lines say so.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import LAYER_SHAPE, on_hub, random_tensor, report
from safetensors.torch import save_file

from m2d.artifacts import atomic_path, read_json, write_json
from m2d.devices import compute_dtype, product_seconds
from m2d.models.checkpoint import INDEX_NAME, plan_shards, write_safetensors
from m2d.models.student import stored_shapes
from m2d.models.teacher import make_skeleton, open_teacher, read_config
from m2d.pipeline import resources
from m2d.pipeline.schema import HardwareSettings

LAYERS, VOCABULARY, SHARD_BYTES = 48, 151_936, 4_000_000_000
WHOLE_NEEDS, LAYER_NEEDS = 75e9, 1.5e9  # bytes of disk
UTILIZATION = 0.6
CPU = torch.device("cpu")


def make_teacher(folder: Path, layers: int) -> Path:
    """The checkpoint in the hub's layout, written shard by shard; finished shards are kept."""
    if (folder / INDEX_NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {**LAYER_SHAPE, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    write_json(folder / "config.json", config)
    shapes = on_hub(stored_shapes(make_skeleton(read_config(folder)[1], folder)))
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    shards = plan_shards(specs, SHARD_BYTES)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        if (folder / file).exists():
            continue
        generator = torch.Generator().manual_seed(number)
        with atomic_path(folder / file) as temporary:
            tensors = (random_tensor(name, shapes[name], generator) for name in names)
            write_safetensors(temporary, {n: specs[n] for n in names}, tensors, {"format": "pt"})
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    return folder


def measured(words: list[Any], kill_when: Path | None = None) -> dict[str, float]:
    """Wall and CPU seconds and peak bytes of `m2d WORDS`; killed as soon as a file says halfway."""
    start = time.monotonic()
    command = [sys.executable, "-m", "m2d.cli", *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    killed = False
    while kill_when is not None and not killed and child.poll() is None:
        time.sleep(0.5)
        if halfway(kill_when):
            child.send_signal(signal.SIGKILL)
            killed = True
    if child.returncode is not None:  # it was polled to its end, before anything was halfway
        raise SystemExit(f"m2d {words[0]}: ended before it could be killed")
    _, status, usage = os.wait4(child.pid, 0)
    if status and not killed:
        raise SystemExit(f"m2d {words[0]}: failed")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def halfway(out: Path) -> bool:
    """Whether the passes kept for `out` are through half of the layers."""
    layers = int(read_json(out.parent / "teacher" / "config.json")["num_hidden_layers"])
    states = out.parent.glob(f".{out.name}.layers-*/finished.json")
    return any(2 * read_json(state)["finished"] >= layers for state in states)


def estimates(teacher: Path, tokens: int) -> dict[str, dict[str, float]]:
    """What m2d estimate's formulas and m2d inspect say, with this machine's speeds."""
    opened = open_teacher(teacher)
    listing = subprocess.run(
        [sys.executable, "-m", "m2d.cli", "inspect", str(teacher), "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    sizes = json.loads(listing.stdout)
    dtype = compute_dtype(None, opened.dtype, CPU)
    flops = 2 * 2048**3 / product_seconds(dtype, CPU, 2048, 2)
    hardware = HardwareSettings(
        flops=flops, utilization=UTILIZATION, disk_gb_per_second=disk_speed(teacher)
    )
    item, student = 2, sizes["student_parameters"]
    jobs = {
        "stats": resources.statistics(sizes, item, tokens),
        "gram": resources.gram(sizes, item, tokens),
        "convert": resources.gram(sizes, item, tokens),
        "merge": resources.merge(sizes, item, sizes["top_k"]),
        "perplexity": resources.perplexity_of_student(student, item, tokens),
    }
    found = {name: {"seconds": need.seconds(hardware)} for name, need in jobs.items()}
    activations = tokens * sizes["hidden_size"] * item
    layers = 2 * sizes["layer_parameters"] * item
    for name in ("stats", "gram", "convert"):
        found[name]["allowed_bytes"] = layers + 1.5e9 + activations
    return found


def disk_speed(teacher: Path) -> float:
    """GB per second that the first shard is read at, cached or not as it happens to be."""
    file = min(teacher.glob("*.safetensors"))
    start, count = time.monotonic(), 0
    with file.open("rb", buffering=0) as stream:
        while part := stream.read(2**24):
            count += len(part)
            if count > 2e9:
                break
    return count / 1e9 / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder to work in and keep (temporary)")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    needed = WHOLE_NEEDS if args.layers == LAYERS else 6e9 + args.layers * LAYER_NEEDS
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="m2d-full-size-"))
    scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(scratch).free
    if free < needed and not (scratch / "teacher" / INDEX_NAME).exists():
        print(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed; skipped")
        return
    try:
        run(scratch, args)
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch)


def run(scratch: Path, args: argparse.Namespace) -> None:
    teacher = make_teacher(scratch / "teacher", args.layers)
    tokens = scratch / "tokens.safetensors"
    shape = (args.sequences, args.length)
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tokens, {"source": "random"})
    student = scratch / "student"
    given = ["--tokens", tokens, "--batch", "1"]
    statistics = ["--statistics", scratch / "s.parquet", "--gram", scratch / "g.safetensors"]
    convert = ["convert", teacher, student, *given]
    steps: dict[str, tuple[list[Any], Path | None]] = {
        "inspect": (["inspect", teacher, "--json"], None),
        "convert, killed halfway": (convert, student),
        "convert, gone on": (convert, None),
        "stats": (["stats", teacher, scratch / "s.parquet", *given], None),
        "gram": (["gram", teacher, scratch / "g.safetensors", *given], None),
        "rank": (["rank", scratch / "r.json", *statistics, "--scoring", "DO-ACP"], None),
        "merge": (
            ["merge", teacher, scratch / "merged", *statistics, "--ranking", scratch / "r.json",
             "--grouping", "RR", "--scaling", "uniform", "--keep", "8"],
            None,
        ),
        "perplexity": (["perplexity", scratch / "merged", *given], None),
    }  # fmt: skip
    expected = estimates(teacher, ids.numel())
    file = scratch / "measured.json"
    done: dict[str, dict[str, float]] = read_json(file) if file.exists() else {}
    for name, (words, kill) in steps.items():
        if name not in done:
            done[name] = measured(words, kill)
            write_json(file, done)
        about = expected.get(name.split(",")[0], {})
        allowed = about.get("allowed_bytes")
        report(
            f"full size: m2d {name}",
            done[name]["peak_bytes"] / allowed if allowed else done[name]["peak_bytes"] / 1e9,
            "<= 1 (2 layers + 1.5 GB)" if allowed else "peak, GB",
            f"{args.layers} of {LAYERS} layers, {ids.numel()} tokens, {torch.get_num_threads()} "
            "threads; ru_maxrss of the command",
            **done[name],
            estimated_seconds=round(about.get("seconds", 0.0), 1),
        )
    kept = [
        [[group["experts"] for group in layer["groups"]] for layer in plan["layers"]]
        for plan in (read_json(folder / "plan.json") for folder in (scratch / "merged", student))
    ]
    report(
        "full size: layers in which the killed conversion kept what the statistics keep",
        sum(a == b for a, b in zip(*kept, strict=True)) / args.layers,
        "= 1",
        "experts of every group, in plan.json",
    )


if __name__ == "__main__":
    main()
