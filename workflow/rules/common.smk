# What the rules share: the checked config, paths, and what decides whether a result is up to date.

import gc
import hashlib
import json
import os
import re
import shlex
from contextlib import suppress
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError

from m2d.pipeline.best import best_configuration
from m2d.pipeline.settings import (
    SHAPE,
    check_config,
    evaluation_jobs,
    goes_with,
    has_experts,
    logits_name,
    logits_names,
    student_kind,
)
from m2d.pipeline.jobs import resources_of
from m2d.pipeline.digest import PACKAGE, code_digest
from m2d.errors import UserError
from m2d.distill.settings import DistillSettings
from m2d.settings import as_options
from m2d.tokens.text import text_files as files_below

# Jobs inherit this. The C library would hand the memory of every tensor above 128 kB back to the
# kernel and fetch fresh pages for the next, a third of the time of a job with a small model.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(64 * 2**20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 * 2**20))

# A graph of thousands of jobs is many objects and no garbage: looking for it at the default's rate
# takes a fifth of the time that Snakemake needs to see that there is nothing to do.
gc.set_threshold(1_000_000)

try:
    config = check_config(config)
except UserError as error:
    # One line for the user, instead of a traceback of the parser.
    raise WorkflowError(str(error)) from None


def any_of(names):
    """A wildcard's constraint: one of these names; nothing at all where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


# Students that the grid chooses, by scoring and grouping.
BEST = "best-[a-z_]+-[a-z_]+"


pathvars:
    results=config["results"],
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",


wildcard_constraints:
    teacher="|".join(config["teachers"]),
    student="|".join([*config["students"], BEST]),
    recipe="|".join(config["recipes"]),
    variant="|".join(["merged", "refit", *config["recipes"]]),
    tokens="calibration|test|distillation",
    scoring="[a-z_]+",
    logits=any_of(logits_names(config)),
    part="[0-9]+",
    parts="[0-9]+",
    neurons="contribution|greedy(-width-[0-9]+|-params-[0-9]+)?",


def teacher_of(wildcards):
    return config["teachers"][wildcards.teacher]


def teacher_files(wildcards):
    """The files of a teacher in a local folder, so that a new teacher re-runs everything.

    Of one on the hub, the mark that it was fetched, never a reason to re-run.
    """
    folder = Path(teacher_of(wildcards)["model"])
    if not folder.is_dir():
        return ancient(f"<results>/{wildcards.teacher}/downloaded")
    return sorted(
        str(file)
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".json", ".model", ".jinja")
    )


def compute_options(wildcards):
    teacher = teacher_of(wildcards)
    return f"--dtype {teacher['dtype']} --batch {teacher['batch']}"


def script(name):
    """The path of a script of the workflow."""
    # Not workflow.source_path: a copy in a cache, not executable, at another place in every run.
    return os.path.relpath(Path(workflow.basedir, "scripts", name))


def sized(rule, what, **names):
    """What a job of a rule asks for, by the sizes of its teacher; see m2d/pipeline/jobs.py."""

    def ask(wildcards, attempt):
        wanted = {**dict(wildcards.items()), **names}
        return resources_of(config, rule, wanted, attempt)[what]

    return ask


def code(entry, **chosen):
    """The digest of the code behind a command; `chosen` as in m2d.pipeline.digest, kind=[method, ...]."""
    return cached_digest(
        entry, tuple((kind, tuple(names)) for kind, names in chosen.items())
    )


@cache
def cached_digest(entry, chosen):
    return code_digest(entry, dict(chosen))


# ---- tokens.smk


def token_settings(wildcards):
    return teacher_of(wildcards)["tokens"][wildcards.tokens]


def dataset_of(wildcards):
    return config["datasets"][token_settings(wildcards)["dataset"]]


def files_of(dataset):
    """The files or folders of a text: the corpus', or the config's own."""
    if "corpus" in dataset:
        return [f"{config['results']}/corpus/{dataset['corpus']}.jsonl"]
    return dataset.get("files", [])


def text_files(wildcards):
    """The files behind a dataset, those in its folders one by one: a folder has no checksum."""
    dataset = dataset_of(wildcards)
    parts = [config["datasets"][name] for name in dataset.get("mix", [])]
    named = [Path(file) for part in parts or [dataset] for file in files_of(part)]
    return [
        str(file)
        for name in named
        for file in (files_below([name]) if name.is_dir() else [name])
    ]


def text_source(wildcards):
    dataset = dataset_of(wildcards)
    if "hub" in dataset:
        return f"--dataset {dataset['hub']}"
    if "mix" not in dataset:
        return f"--text {shlex.join(files_of(dataset))}"
    parts = {name: config["datasets"][name] for name in dataset["mix"]}
    sources = {
        name: part.get("hub") or files_of(part)[0] for name, part in parts.items()
    }
    return " ".join(
        f"--mix {weight} {sources[name]}" for name, weight in dataset["mix"].items()
    )


# ---- statistics.smk


def shares_of(teacher):
    """Jobs that share a teacher's statistics; None where one takes all."""
    return config["teachers"][teacher].get("shares")


# The command that takes shares of a statistics file.
SHARED_BY = {"statistics.parquet": "stats", "gram.safetensors": "gram"}
SHARE_CODE = {"stats": "m2d.statistics.routing", "gram": "m2d.statistics.gram"}


def share_files(wildcards):
    kind, shares = SHARED_BY[wildcards.statistics], shares_of(wildcards.teacher)
    return [
        f"<results>/{wildcards.teacher}/shares/{kind}-{i}-of-{shares}.safetensors"
        for i in range(1, shares + 1)
    ]


# ---- rank.smk, merge.smk


def from_grids(name):
    """(scorings, what is given): of whose grids a student is the best, among the rows with that.

    None for a student that no grid chooses.
    """
    if name not in config["students"]:
        _, scoring, grouping = name.split("-")
        return [scoring], {"grouping": grouping}
    student = config["students"][name]
    if student_kind(student) == "chosen":
        return student["best_of"], {"keep": student["keep"]}
    return None


def student_of(wildcards):
    """A student's settings: the config's, or what the grids say is best.

    Before the grids exist, or have such rows, what they will choose is empty.
    """
    choice = from_grids(wildcards.student)
    if choice is None:
        return config["students"][wildcards.student]
    scorings, given = choice
    grids = grids_in(config["results"], wildcards.teacher, scorings)
    if all(Path(grid).is_file() for grid in grids):
        with suppress(UserError):
            return best_configuration(grids, **given)
    scoring = scorings[0] if len(scorings) == 1 else ""
    return {"scoring": scoring, "grouping": "", "scaling": "", "keep": 0, **given}


def grids_in(results, teacher, scorings):
    return [f"{results}/{teacher}/grid/{scoring}.parquet" for scoring in scorings]


def rankings_in(results, wildcards):
    """The ranking that a grid or a student is made from; before it is chosen, all it may be."""
    scoring = wildcards.get("scoring") or student_of(wildcards)["scoring"]
    scorings = [scoring] if scoring else from_grids(wildcards.student)[0]
    return [f"{results}/{wildcards.teacher}/rankings/{name}.json" for name in scorings]


def ranking_of(wildcards):
    """That ranking, never a reason to re-run by its age."""
    return ancient(rankings_in("<results>", wildcards))


def ranking_digest(wildcards):
    """Digest of that ranking's content, empty before it exists."""
    files = [Path(file) for file in rankings_in(config["results"], wildcards)]
    if len(files) > 1 or not files[0].is_file():
        return ""
    return hashlib.sha256(files[0].read_bytes()).hexdigest()[:16]


def choice_of(wildcards):
    """What a student's making was decided from: its ranking, and the grids where those chose it."""
    if student_kind(student_of(wildcards)) != "experts":
        return []
    scorings, _ = from_grids(wildcards.student) or ([], {})
    return ancient(
        rankings_in("<results>", wildcards)
        + grids_in("<results>", wildcards.teacher, scorings)
    )


def merge_settings(wildcards):
    """What of a student's settings its merging reads."""
    student = student_of(wildcards)
    return {key: student[key] for key in ("scoring", "grouping", "scaling", "keep")}


def merge_code(wildcards):
    student = student_of(wildcards)
    return code(
        "m2d.students.merge", grouping=[student["grouping"]], scaling=[student["scaling"]]
    )


# ---- neurons.smk, baselines.smk


def students_of_kind(*kinds):
    """A wildcard constraint: the config's students of these kinds."""
    return any_of(n for n, s in config["students"].items() if student_kind(s) in kinds)


def size_options(student):
    """--width or --params of a student of single neurons, where the config has one."""
    return "".join(
        f" --{key} {student[key]}" for key in ("width", "params") if key in student
    )


def neurons_name(wildcards):
    """The neuron statistics of a student: any width has the same, but the greedy order's."""
    student = student_of(wildcards)
    if student["neurons"] == "contribution":
        return "contribution"
    size = size_options(student).replace(" --", "-").replace(" ", "-")
    return f"greedy{size}"


def neurons_options(wildcards):
    """The name of neuron statistics as options: greedy-width-512 is --choice greedy --width 512."""
    choice, *size = wildcards.neurons.split("-")
    return f"--choice {choice}" + (f" --{size[0]} {size[1]}" if size else "")


def shape_options(wildcards):
    """A d2d student's sizes as options: hidden_size: 160 is --hidden-size 160."""
    student = student_of(wildcards)
    return " ".join(f"--{key.replace('_', '-')} {student[key]}" for key in SHAPE)


# ---- refit.smk, distill.smk


def refit_of(student):
    """A student's variant of refit; None where there is none, as in best-SCORING-GROUPING."""
    return config["students"].get(student, {}).get("refit")


def refit_options(wildcards):
    student = config["students"][wildcards.student]
    return (
        f"--variant {student['refit']} --weighting {student.get('weighting', 'equal')}"
    )


def undistilled(wildcards):
    """The student that distillation starts from: refitted where the config asks for it."""
    variant = "refit" if refit_of(wildcards.student) else "merged"
    return f"<results>/{wildcards.teacher}/students/{wildcards.student}/{variant}"


def recipe_of(wildcards):
    return config["recipes"][wildcards.recipe]


def recipe_options(wildcards):
    """The recipe as options of `m2d distill`: learning_rate: 1e-4 is --learning-rate 1e-4."""
    recipe = dict(recipe_of(wildcards))
    names = list(DistillSettings.model_fields)
    if "teacher_logits" in recipe:
        recipe["teacher_logits"] = logits_folder(wildcards)
        names = [n for n in names if n not in OF_TEACHER] + ["teacher_logits"]
    return shlex.join(as_options(recipe, names))


# Of a recipe's keys, those that say how the teacher runs.
OF_TEACHER = ("teacher_top_k", "teacher_dtype")


def logits_folder(wildcards):
    name = logits_name(recipe_of(wildcards))
    return f"{config['results']}/{wildcards.teacher}/teacher-logits/{name}"


def stored_logits(wildcards):
    """What says that a recipe's stored outputs are complete."""
    if "teacher_logits" not in recipe_of(wildcards):
        return []
    return f"{logits_folder(wildcards)}/complete"


def parts_of_logits(wildcards):
    recipe = logits_names(config)[wildcards.logits]
    return expand(
        "<results>/{{teacher}}/teacher-logits/{{logits}}/{part}-of-{parts}.done",
        part=range(1, recipe["teacher_logits"]["parts"] + 1),
        parts=recipe["teacher_logits"]["parts"],
    )


def logits_options(wildcards):
    """Options of `m2d teacher-logits`, from a recipe whose outputs have this name."""
    recipe = logits_names(config)[wildcards.logits]
    settings, teacher = recipe["teacher_logits"], teacher_of(wildcards)
    options = f"--kind {settings['kind']} --size {settings['size']}"
    options += f" --batch {teacher['batch']}"
    if "teacher_top_k" in recipe:
        options += f" --teacher-top-k {recipe['teacher_top_k']}"
    return options + (
        f" --dtype {recipe['teacher_dtype']}" if "teacher_dtype" in recipe else ""
    )


def launcher():
    """The script that starts a distillation, on any number of GPUs and nodes."""
    return config.get("launcher", script("launch.sh"))


# ---- evaluate.smk


def task_definitions(evaluation):
    """The folder of the demo's tasks, for those."""
    return "<results>/tasks" if config["evaluations"][evaluation]["demo"] else []


def scores_of(model, tasks):
    return [f"{model}.eval/{task}.json" for task in tasks]


def evaluation_out(wildcards, output):
    """`m2d evaluate` takes a file for one task and a folder for several."""
    return output[0] if len(output) == 1 else str(Path(output[0]).parent)


def evaluation_options(evaluation, tasks):
    settings = config["evaluations"][evaluation]
    options = [("task", task) for task in tasks]
    if settings["demo"]:
        options += [("include", f"{config['results']}/tasks")]
    options += [
        (key.replace("_", "-"), settings[key])
        for key in ("shots", "limit", "batch_size", "backend")
        if key in settings
    ]
    options += [
        ("dataset", f"{k}={v}") for k, v in settings["datasets"].items()
    ]
    for key, value in settings["model_args"].items():
        text = value if isinstance(value, str) else json.dumps(value)
        options.append(("model-arg", f"{key}={text}"))
    return shlex.join(word for k, v in options for word in (f"--{k}", str(v)))


# ---- tables.smk


def package_file(name):
    """Digest of a file of the package that a job reads."""
    return hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest()[:16]
