"""What a pipeline of the config consists of: which students of which teachers, made how.

Used by the Snakefile, so nothing here imports torch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from m2d.pipeline.choices import settings_of
from m2d.pipeline.settings import goes_with, has_experts, student_kind

Config = Mapping[str, Any]
# Variants of a student that no recipe makes.
UNDISTILLED = ("merged", "refit")


def runs_of(config: Config, pipeline: str) -> list[tuple[str, str, str]]:
    """(teacher, student, variant) of every student of a pipeline, merged and distilled, once.

    Each student from those of its teachers that it goes with.
    """
    settings = config["pipelines"][pipeline]
    pairs = [(student, "merged") for student in settings["students"]]
    for entry in settings["distill"]:
        pairs += [(entry["student"], "merged"), (entry["student"], entry["recipe"])]
    if "best" in settings:
        for scoring in settings["scorings"]:
            for grouping in config["grid"]["groupings"]:
                student = f"best-{scoring}-{grouping}"
                pairs += [(student, "merged"), (student, settings["best"])]
    refitted = [s for s, _ in pairs if "refit" in settings_of(config, s)]
    pairs += [(student, "refit") for student in dict.fromkeys(refitted)]
    return [
        (teacher, *pair)
        for teacher in settings["teachers"]
        for pair in dict.fromkeys(pairs)
        if goes_with(settings_of(config, pair[0]), config["teachers"][teacher])
    ]


def with_experts(config: Config, pipeline: str) -> list[str]:
    """The teachers of a pipeline that have experts."""
    teachers = config["pipelines"][pipeline]["teachers"]
    return [teacher for teacher in teachers if has_experts(config["teachers"][teacher])]


def calibrated(config: Config, pipeline: str) -> list[str]:
    """The teachers of a pipeline with a student that calibration tokens chose."""
    fresh = ("random_ffn", "random_init")
    chosen = [
        teacher
        for teacher, student, _ in runs_of(config, pipeline)
        if student_kind(settings_of(config, student)) not in fresh
    ]
    return list(dict.fromkeys(chosen))


def scorings_used(config: Config, pipeline: str) -> list[str]:
    """The scoring methods behind a pipeline's grids and students, by name."""
    found = set(config["pipelines"][pipeline]["scorings"])
    for _, student, _ in runs_of(config, pipeline):
        settings = settings_of(config, student)
        found |= {settings.get("scoring"), *settings.get("best_of", [])} - {None}
    return sorted(found)


def distilled(runs: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Those of the runs that a recipe makes."""
    return [run for run in runs if run[2] not in UNDISTILLED]
