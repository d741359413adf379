"""Which methods, families and strategies a job uses: what `code` in the rules' params is told.

An edit to any other re-runs nothing (m2d/pipeline/digest.py). Used by the Snakefile, so nothing
here imports torch.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.methods import TABLES
from m2d.pipeline.choices import from_grids, settings_of
from m2d.pipeline.resources import read_sizes
from m2d.pipeline.runs import UNDISTILLED, runs_of, scorings_used

Uses = dict[str, list[str] | None]


def by_teacher(teacher: Mapping[str, Any]) -> Uses:
    """The family of a teacher; every family where neither its folder nor its sizes say."""
    with suppress(UserError, KeyError):
        kind = str(read_json(Path(teacher["model"]) / "config.json")["model_type"])
        # A text model's has a suffix, which m2d.models.sibling drops.
        return {"family": sorted({kind, kind.removesuffix("_text")})}
    with suppress(UserError, KeyError):
        return {"family": [read_sizes(teacher["sizes"])["family"]]}
    return {"family": None}


def by_recipe(recipe: Mapping[str, Any]) -> Uses:
    """What a distillation uses. How many processes run is not known before: both ways count."""
    several = recipe.get("gpus", 2) > 1
    strategies = {"auto": ["single", "zero2"], "ddp": ["single", "ddp"]} if several else {}
    strategy = recipe["strategy"]
    alone = [strategy] if strategy.startswith("zero") else ["single"]
    return {
        "divergence": [recipe["loss"]],
        "optimizer": [recipe["optimizer"]],
        "strategy": strategies.get(strategy, alone),
    }


def by_pipeline(config: Mapping[str, Any], pipeline: str) -> Uses:
    """What the students of a pipeline were made by."""
    found: dict[str, set[str]] = {kind: set() for kind in TABLES}
    found["scoring"] |= set(scorings_used(config, pipeline))
    for _, name, variant in runs_of(config, pipeline):
        student = settings_of(config, name)
        chosen = not student or from_grids(config, name) is not None
        for kind in ("grouping", "scaling"):
            of_grid = config["grid"][f"{kind}s"] if chosen else []
            found[kind].update([student[kind]] if kind in student else of_grid)
        if "neurons" in student:
            found["neurons"].add(student["neurons"])
        if variant not in UNDISTILLED:
            recipe = config["recipes"][variant]
            found["divergence"].add(recipe["loss"])
            found["optimizer"].add(recipe["optimizer"])
    return {kind: sorted(names) for kind, names in found.items()}
