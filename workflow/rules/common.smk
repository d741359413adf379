# What all rules share: the checked config, paths, and what decides whether a result is up to date.
# What one rule alone needs stands with it; what needs no Snakemake is Python, in m2d/pipeline/.

import gc
import hashlib
import os
import re
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError

from m2d.errors import UserError
from m2d.pipeline import choices, commands, runs
from m2d.pipeline.digest import PACKAGE, code_digest
from m2d.pipeline.jobs import resources_of
from m2d.students.variants import UNDISTILLED
from m2d.pipeline.place import environment_file
from m2d.pipeline.settings import check_config, logits_names, student_kind
from m2d.settings import as_options
from m2d.pipeline.uses import by_pipeline, by_recipe, by_teacher

# Jobs inherit this. The C library would hand the memory of every tensor above 128 kB back to the
# kernel and fetch fresh pages for the next, a third of the time of a job with a small model.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(64 * 2**20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 * 2**20))

# A graph of thousands of jobs is many objects and no garbage: looking for it at the default's rate
# takes a fifth of the time that Snakemake needs to see that there is nothing to do.
gc.set_threshold(1_000_000)

# The environment of every rule under `--software-deployment-method conda`, with this m2d in it.
# Written here, since a file of the workflow cannot know where the workflow lies.
ENVIRONMENT = os.path.abspath(".snakemake/m2d.yaml")
environment_file(ENVIRONMENT)

# The priority of what students are made with and of, up to distillation, the longest. What only
# measures waits, and fills the cores at the end.
FIRST = 1

# The folder of the Snakefile, also where another workflow takes it as a module.
WORKFLOW = Path(str(workflow.current_basedir)).parent

try:
    config = check_config(config)
except UserError as error:
    # One line for the user, instead of a traceback of the parser.
    raise WorkflowError(str(error)) from None


def any_of(names):
    """A wildcard's constraint: one of these names; nothing at all where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


pathvars:
    results=config["results"],
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",


wildcard_constraints:
    teacher=any_of(config["teachers"]),
    student="|".join([any_of(config["students"]), choices.BEST, choices.DESCRIBED]),
    recipe=any_of(config["recipes"]),
    variant=any_of([*UNDISTILLED, *config["recipes"]]),
    tokens="calibration|test|distillation",
    scoring="[a-z0-9_]+",
    logits=any_of(logits_names(config)),
    part="[0-9]+",
    parts="[0-9]+",
    fold="fixed|layer|neuron",
    neurons="(contribution|greedy(-(width|params|multiple)-[0-9]+)*)(-fold-(fixed|layer|neuron))?",


def teacher_of(wildcards):
    return config["teachers"][wildcards.teacher]


def model_of(wildcards):
    """A teacher as commands take it: its folder, or its name on the hub."""
    return teacher_of(wildcards)["model"]


def teacher_files(wildcards):
    """The files of a teacher in a local folder, so that a new teacher re-runs everything.

    Of one on the hub, the mark that it was fetched, never a reason to re-run.
    """
    folder = Path(model_of(wildcards))
    if not folder.is_dir():
        return ancient(f"<results>/{wildcards.teacher}/downloaded")
    return sorted(
        str(file)
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".json", ".model", ".jinja")
    )


def student_of(wildcards):
    """A student's settings, chosen by the grids where the config says so."""
    return choices.student_of(config, wildcards.teacher, wildcards.student)


def compute_options(wildcards):
    return commands.compute_options(teacher_of(wildcards))


def script(name):
    """The path of a script of the workflow."""
    # Not workflow.source_path: a copy in a cache, not executable, at another place in every run.
    return os.path.relpath(WORKFLOW / "scripts" / name)


def sized(rule, what, **names):
    """What a job of a rule asks for, by the sizes of its teacher; see m2d/pipeline/jobs.py."""

    def ask(wildcards, attempt):
        wanted = {**dict(wildcards.items()), **names}
        return resources_of(config, rule, wanted, attempt)[what]

    return ask


def code(entry, words=False, **uses):
    """The digest of the code that a command runs; `uses` names what of its tables it will use.

    By kind: scoring=["reap"], or [] for none. Of a kind that is not named all counts; see
    m2d/pipeline/digest.py.
    """
    frozen = [(k, None if v is None else tuple(v)) for k, v in sorted(uses.items())]
    return cached_digest(entry, words, tuple(frozen))


def teacher_code(entry, **uses):
    """As `code`, of a job on a teacher: of all model families, its own counts."""
    return lambda wildcards: code(entry, **by_teacher(teacher_of(wildcards)), **uses)


@cache
def cached_digest(entry, words, chosen):
    return code_digest(entry, dict(chosen), words=words)
