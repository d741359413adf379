"""What a pipeline of the config consists of: which students of which teachers, made how.

Used by the Snakefile, so nothing here imports torch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from m2d.pipeline.choices import settings_of
from m2d.pipeline.settings import goes_with, has_experts, student_kind
from m2d.students.variants import REPAIRS, UNDISTILLED, first_variant

Config = Mapping[str, Any]


def runs_of(config: Config, pipeline: str) -> list[tuple[str, str, str]]:
    """(teacher, student, variant) of every student of a pipeline, merged and distilled, once.

    Each student from those of its teachers that it goes with.
    """
    settings = config["pipelines"][pipeline]
    pairs = [(student, first_of(config, student)) for student in settings["students"]]
    for entry in settings["distill"]:
        student = entry["student"]
        pairs += [(student, first_of(config, student)), (student, entry["recipe"])]
    if "best" in settings:
        for scoring in settings["scorings"]:
            for grouping in config["grid"]["groupings"]:
                student = f"best-{scoring}-{grouping}"
                pairs += [(student, first_of(config, student)), (student, settings["best"])]
    students = list(dict.fromkeys(student for student, _ in pairs))
    for repair in REPAIRS:
        pairs += [(s, repair) for s in students if repair in settings_of(config, s)]
    return [
        (teacher, *pair)
        for teacher in settings["teachers"]
        for pair in dict.fromkeys(pairs)
        if goes_with(settings_of(config, pair[0]), config["teachers"][teacher])
    ]


def first_of(config: Config, student: str) -> str:
    """The variant in which a student is first written."""
    return first_variant(settings_of(config, student).get("baseline"))


def undistilled(config: Config, student: str) -> str:
    """The variant that a student's distillation starts from: the last that the config asks for."""
    done = [repair for repair in REPAIRS if repair in settings_of(config, student)]
    return done[-1] if done else first_of(config, student)


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
