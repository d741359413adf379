"""Everything that is made from a teacher, by the commands; not a test."""

import shutil
from pathlib import Path
from typing import Any

from conftest import make_teacher

from m2d.cli import main

Run = dict[str, Path]


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def make_run(folder: Path, seed: int, source: Path) -> Run:
    """Everything that is made from one teacher."""
    teacher = make_teacher(folder / "teacher", seed=seed)
    tokens = Path(shutil.copy(source, folder / "tokens.safetensors"))
    names = ("stats.parquet", "gram.safetensors", "rank.json", "neurons.safetensors")
    found: Run = {"teacher": teacher, "tokens": tokens}
    found |= {name.partition(".")[0]: folder / name for name in names}
    found |= {name: folder / name for name in ("student", "refit", "logits", "fold.safetensors")}
    found["fold"] = found.pop("fold.safetensors")
    with_tokens = ("--tokens", tokens, "--dtype", "float32")
    for command in ("stats", "gram", "neurons", "fold"):
        assert run(command, teacher, found[command], *with_tokens) == 0
    pair = ("--statistics", found["stats"], "--gram", found["gram"])
    assert run("rank", found["rank"], *pair, "--scoring", "SF") == 0
    assert run("merge", teacher, found["student"], *chosen(found)) == 0
    assert run("refit", found["student"], teacher, found["refit"], *with_tokens) == 0
    assert run("teacher-logits", teacher, found["logits"], *with_tokens, "--rows", 4) == 0
    found["plan"] = found["student"] / "plan.json"
    return found


def chosen(one: Run) -> list[Any]:
    files = {"--statistics": one["stats"], "--gram": one["gram"], "--ranking": one["rank"]}
    methods = ["--grouping", "RR", "--scaling", "uniform", "--keep", 4]
    return [*(word for pair in files.items() for word in pair), *methods]


DISTILL = ("--steps", 1, "--batch", 4, "--device-batch", 4, "--precision", "fp32")


def flip(file: Path, place: float) -> None:
    """Flip one bit of a file, at that share of its length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)
