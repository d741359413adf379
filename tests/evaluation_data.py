"""Data of lm-eval's tasks, made up; not a test."""

import json
import random
from pathlib import Path

import pytest
from conftest import make_teacher

WORDS = ["expert", "router", "token", "layer", "dense", "sparse", "merge", "score", "large"]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_split(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def winogrande(rng: random.Random) -> dict:
    return {
        "sentence": f"The {words(rng, 2)} is a _ because {words(rng, 3)}.",
        "option1": words(rng, 1),
        "option2": words(rng, 2),
        "answer": rng.choice("12"),
    }


def make_dataset(folder: Path, make, splits: dict[str, int], seed: int = 0) -> dict:
    rng = random.Random(seed)
    rows = {split: [make(rng) for _ in range(count)] for split, count in splits.items()}
    for split, documents in rows.items():
        write_split(folder, split, documents)
    return rows


@pytest.fixture(scope="session")
def scored_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context takes lm-eval's prompts; tests must not write into it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_teacher(folder, seed=3, max_position_embeddings=4096)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of `datasets` for the test alone."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
