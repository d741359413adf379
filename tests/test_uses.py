"""Which methods, families and strategies a job is said to use."""

import json
from pathlib import Path

import pytest

from m2d.pipeline.settings import load_config
from m2d.pipeline.uses import by_pipeline, by_recipe, by_teacher

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("gpus", "strategy", "expected"),
    [
        (0, "auto", ["single"]),
        (1, "ddp", ["single"]),
        (1, "zero3", ["zero3"]),  # also one process is started by DeepSpeed
        (8, "auto", ["single", "zero2"]),
        (8, "ddp", ["single", "ddp"]),
        (8, "zero3", ["zero3"]),
        (None, "auto", ["single", "zero2"]),  # as many as the sizes ask for
    ],
)
def test_strategies(gpus: int | None, strategy: str, expected: list[str]) -> None:
    recipe = {"loss": "forward_kl", "optimizer": "adamw", "strategy": strategy}
    found = by_recipe(recipe if gpus is None else {**recipe, "gpus": gpus})
    assert found == {"divergence": ["forward_kl"], "optimizer": ["adamw"], "strategy": expected}


def test_families(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}), encoding="utf-8")
    assert by_teacher({"model": str(tmp_path)}) == {"family": ["olmoe"]}
    assert by_teacher({"model": "some/where"}) == {"family": None}  # unknown: all of them count


def test_pipelines() -> None:
    config = load_config(REPOSITORY / "config.yaml")
    found = by_pipeline(config, "all_closed_form")
    assert found["scoring"] == ["gld_reap", "omp"]
    assert found["scaling"] == ["least_squares", "uniform"]
    assert found["neurons"] == ["greedy"]
    assert found["divergence"] == ["forward_kl"]
