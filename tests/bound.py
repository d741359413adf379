"""Everything that is made from a teacher, by the commands; not a test."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher, write_tokens

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


@pytest.fixture(scope="session")
def both_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """What is made from each of two teachers of one shape; tests must not write into it."""
    folder = tmp_path_factory.mktemp("bound")
    ids = torch.randint(1, 300, (8, 12), generator=torch.Generator().manual_seed(0))
    write_tokens(folder / "tokens", ids.int(), {"source": "random"})
    runs = ((1, "a"), (2, "b"))
    first, second = (make_run(folder / name, seed, folder / "tokens") for seed, name in runs)
    return first, second


@pytest.fixture
def own_run(both_runs: tuple[Run, Run], tmp_path: Path) -> Run:
    """The first of them, which a test may spoil; the paths of its artifacts."""
    source = both_runs[0]["teacher"].parent
    shutil.copytree(source, tmp_path / "a")
    return {key: tmp_path / "a" / path.relative_to(source) for key, path in both_runs[0].items()}
