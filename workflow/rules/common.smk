# What the rules share: the checked config, paths, and what decides whether a result is up to date.

import hashlib
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError

from m2d.config import check_config
from m2d.digest import code_digest
from m2d.errors import UserError

try:
    config = check_config(config, workflow.source_path("../schemas/config.schema.yaml"))
except UserError as error:
    # One line for the user, instead of a traceback of the parser.
    raise WorkflowError(str(error)) from None


pathvars:
    results=config["results"],
    logs=config["results"] + "/logs",
    benchmarks=config["results"] + "/benchmarks",


wildcard_constraints:
    teacher="|".join(config["teachers"]),
    student="|".join(config["students"]),
    recipe="|".join(config["recipes"]),
    variant="|".join(["merged", *config["recipes"]]),
    tokens="calibration|test|distillation",
    scoring="[a-z_]+",
    task="|".join(config["tasks"]),


def teacher_of(wildcards):
    return config["teachers"][wildcards.teacher]


def teacher_files(wildcards):
    """The files of a teacher in a local folder, so that a new teacher re-runs everything."""
    folder = Path(teacher_of(wildcards)["model"])
    return sorted(
        str(file)
        for file in (folder.iterdir() if folder.is_dir() else [])
        if file.suffix in (".safetensors", ".json", ".model", ".jinja")
    )


def compute_options(wildcards):
    teacher = teacher_of(wildcards)
    return f"--dtype {teacher['dtype']} --batch {teacher['batch']}"


def gpus(wildcards):
    return teacher_of(wildcards)["resources"]["gpus"]


def memory(wildcards, attempt):
    return teacher_of(wildcards)["resources"]["mem_mb"] * attempt


def minutes(wildcards, attempt):
    return teacher_of(wildcards)["resources"]["runtime"] * attempt


def code(entry, **chosen):
    """The digest of the code behind a command; `chosen` as in m2d.digest, kind=[method, ...]."""
    return cached_digest(
        entry, tuple((kind, tuple(names)) for kind, names in chosen.items())
    )


@cache
def cached_digest(entry, chosen):
    return code_digest(entry, dict(chosen))
