"""Every path on a GPU that one GPU can show, on a random teacher of Qwen3-30B-A3B's layer shape.

Prints one JSON line a path, then a table. A number stands beside what it should be: losses beside
those of the plainest training, speeds beside a large product's, and perplexities and files of a few
tokens beside those that the same command gives on the CPU. A path that fails is named, and the
others go on. `--device cpu --layers 1 --tokens 2,64` runs all but what needs a GPU, to see that the
commands are right.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from common import LAYER_SHAPE, real_shape_teacher, scratch_folder, scratch_option
from safetensors.torch import load_file, save_file

from m2d.devices import compute_dtype, product_seconds

STEPS = 4


@dataclass
class Row:
    """One path: the command, how long it took, and its number beside the one expected."""

    name: str
    command: str
    seconds: float
    number: str
    expected: str


class Table:
    """Runs commands one after the other and notes what came out."""

    def __init__(self, device: str):
        self.device, self.rows = device, list[Row]()

    def run(
        self,
        name: str,
        words: list[Any],
        number: Callable[[str], str],
        expected: str,
        launch: tuple[str, ...] = ("-m", "m2d.cli"),
    ) -> None:
        """One command; number(stdout) is what it gives."""
        command = [sys.executable, *launch, *map(str, words)]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        shown = "m2d " + " ".join(Path(w).name if "/" in str(w) else str(w) for w in words)
        try:
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no word"]
                raise RuntimeError(lines[-1][:150])
            found = number(done.stdout)
        except Exception as error:
            found = f"FAILED: {error}"
        self.add(Row(name, shown, round(seconds, 1), found, expected))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(json.dumps(vars(row)), flush=True)

    def __str__(self) -> str:
        head = "| path | seconds | number | should be |\n|---|---:|---|---|\n"
        return head + "\n".join(
            f"| {r.name} | {r.seconds} | {r.number} | {r.expected} |" for r in self.rows
        )


def speeds(table: Table, device: torch.device) -> None:
    """Large products by dtype: what this device is."""
    size = 8192 if device.type == "cuda" else 512
    for dtype in (torch.float32, torch.bfloat16):
        seconds = product_seconds(dtype, device, size, 3)
        number = f"{2 * size**3 / seconds / 1e12:.2f} TFLOP/s"
        expected = "H100: 38 (float32), 620 to 720 (bfloat16)"
        name = f"product of {size}, {str(dtype).removeprefix('torch.')}"
        table.add(Row(name, "", round(seconds, 4), number, expected))
    chosen = str(compute_dtype(None, torch.bfloat16, device)).removeprefix("torch.")
    table.add(Row("dtype of --dtype auto", "", 0.0, chosen, "bfloat16"))


def last_loss(out: Path) -> Callable[[str], str]:
    def read(_: str) -> str:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return f"loss {rows[-1]['loss']:.5f}, {rows[-1].get('tokens_per_second', 0):.0f} tokens/s"

    return read


def arrays_of(file: Path) -> dict[str, torch.Tensor]:
    """The numbers of a file that a command wrote, by name."""
    if file.suffix == ".safetensors":
        found = load_file(file)
    elif file.suffix == ".parquet":
        table = pq.read_table(file).to_pandas()
        found = {c: torch.tensor(table[c].tolist()) for c in table.select_dtypes("number")}
    else:
        found = {"perplexity": torch.tensor(json.loads(file.read_text())["perplexity"])}
    return {name: value.double() for name, value in found.items()}


def difference(ours: Path, theirs: Path) -> tuple[str, float]:
    """The array that differs most, by its norm against the other's."""
    left, right = arrays_of(ours), arrays_of(theirs)
    if left.keys() != right.keys():
        raise ValueError(f"other arrays: {sorted(left.keys() ^ right.keys())}")
    found = {
        name: float((left[name] - right[name]).norm() / right[name].norm().clamp(min=1e-30))
        for name in left
        if left[name].shape == right[name].shape
    }
    if len(found) < len(left):
        raise ValueError(f"other shapes: {sorted(left.keys() - found.keys())}")
    worst = max(found, key=lambda name: found[name])
    return worst, found[worst]


def against_cpu(table: Table, teacher: Path, place: Path) -> None:
    """A few tokens through the same commands on the device and on the CPU."""
    tokens = place / "few.safetensors"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, int(LAYER_SHAPE["vocab_size"]), (4, 128), generator=generator)
    save_file({"input_ids": ids}, tokens, {"source": "random"})
    student = place / "student"
    commands: dict[str, Callable[[str], list[Any]]] = {
        "perplexity of the teacher": lambda at: ["perplexity", teacher, "--out", f"{at}-t.json"],
        "perplexity of the student": lambda at: ["perplexity", student, "--out", f"{at}-s.json"],
        "routing statistics": lambda at: ["stats", teacher, f"{at}.parquet"],
        "Gram": lambda at: ["gram", teacher, f"{at}-gram.safetensors"],
        "neurons": lambda at: ["neurons", teacher, f"{at}-neurons.safetensors"],
        "fold": lambda at: ["fold", teacher, f"{at}-fold.safetensors", "--mode", "layer"],
    }
    options = ["--tokens", tokens, "--batch", 2, "--device"]
    for name, words in commands.items():
        both = [words(str(place / f"few-{where}")) for where in (table.device, "cpu")]
        ours, theirs = (next(Path(w) for w in line if "few-" in str(w)) for line in both)
        command = [sys.executable, "-m", "m2d.cli", *map(str, [*both[1], *options, "cpu"])]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)

        def compare(_: str, ours: Path = ours, theirs: Path = theirs) -> str:
            worst, error = difference(ours, theirs)
            return f"{error:.1e} ({worst})"

        line = [*both[0], *options, table.device]
        table.run(f"{name}, against the CPU", line, compare, "2e-2 or less: bf16 rounding")


def perplexity(text: str) -> str:
    return f"{json.loads(text)['perplexity']:.1f}"


def there(path: Path) -> Callable[[str], str]:
    return lambda _: "written" if path.exists() else "MISSING"


def everything(table: Table, scratch: Path, layers: int, shape: tuple[int, int]) -> None:
    """All commands that run a model, on the device."""
    teacher = real_shape_teacher(scratch, layers)
    place = scratch / "gpu"
    place.mkdir(exist_ok=True)
    tokens = place / "tokens.safetensors"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(LAYER_SHAPE["vocab_size"]), shape, generator=generator)
    save_file({"input_ids": ids}, tokens, {"source": "random"})
    on = ["--tokens", tokens, "--device", table.device, "--batch", 2]
    measured = [*on, "--json"]

    table.run(
        "streamed teacher",
        ["perplexity", teacher, *measured],
        perplexity,
        "stated",
    )
    statistics = ["--statistics", place / "s.parquet", "--gram", place / "g.safetensors"]
    table.run(
        "routing statistics",
        ["stats", teacher, place / "s.parquet", *on],
        there(place / "s.parquet"),
        "written",
    )
    table.run(
        "Gram",
        ["gram", teacher, place / "g.safetensors", *on],
        there(place / "g.safetensors"),
        "written",
    )
    ranking = ["--ranking", place / "r.json"]
    table.run(
        "ranking (CPU)",
        ["rank", place / "r.json", *statistics, "--scoring", "DO-ACP"],
        there(place / "r.json"),
        "written",
    )
    plan = [*statistics, *ranking, "--grouping", "RR", "--scaling", "uniform", "--keep", 8]
    table.run(
        "merge (CPU)",
        ["merge", teacher, place / "student", *plan],
        there(place / "student"),
        "written",
    )
    table.run(
        "student in memory",
        ["perplexity", place / "student", *measured],
        perplexity,
        "stated",
    )
    against_cpu(table, teacher, place)
    grid = ["grid", teacher, place / "grid.parquet", *statistics, *ranking, *on]
    grid += ["--keeps", "8,16", "--groupings", "RR,WC", "--scalings", "uniform"]
    table.run("grid", grid, there(place / "grid.parquet"), "written")
    fold = place / "fold.safetensors"
    table.run("fold", ["fold", teacher, fold, *on, "--mode", "layer"], there(fold), "written")
    neurons = place / "n.safetensors"
    table.run(
        "neurons, greedy",
        ["neurons", teacher, neurons, *on, "--choice", "greedy", "--width", 512],
        there(neurons),
        "written",
    )
    table.run(
        "refit",
        ["refit", place / "student", teacher, place / "refit", *on],
        there(place / "refit"),
        "written",
    )
    table.run(
        "align",
        ["align", place / "student", teacher, place / "align", *on, "--steps", 4],
        there(place / "align"),
        "written",
    )

    logits = ["teacher-logits", teacher, place / "logits", *on, "--kind", "sampled", "--size", 64]
    table.run("teacher logits", logits, there(place / "logits"), "written")
    trainings: dict[str, list[Any]] = {
        "distillation": [],
        "from stored logits": ["--teacher-logits", place / "logits"],
        "gradient checkpointing": ["--gradient-checkpointing"],
        "ZeRO-2, one process": ["--strategy", "zero2"],
        "ZeRO-3, one process": ["--strategy", "zero3"],
        "torch.compile": ["--compile"],
    }
    if importlib.util.find_spec("liger_kernel"):
        trainings["liger"] = ["--loss-implementation", "liger"]
    for number, (name, options) in enumerate(trainings.items()):
        out = place / f"distilled-{number}"
        words = ["distill", place / "student", teacher, out, "--tokens", tokens]
        words += ["--device", table.device, "--steps", STEPS, "--batch", 2, "--device-batch", 1]
        expected = "the first one's loss, to 1 %" if number else "a falling loss"
        if "--teacher-logits" in options:
            expected = "another loss: of sampled logits"
        table.run(name, [*words, *options], last_loss(out), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scratch_option(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", default="16,1024", help="sequences and their length")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu runs what needs none")
    sequences, length = (int(part) for part in args.tokens.split(","))
    table = Table(args.device)
    speeds(table, device)
    with scratch_folder(args.scratch) as scratch:
        everything(table, scratch, args.layers, (sequences, length))
    print(table)
    failed = [row.name for row in table.rows if row.number.startswith(("FAILED", "MISSING"))]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
