"""The workflow's config: checked against its settings, and the names it uses made plain.

Used by the Snakefile, so nothing here imports torch or numpy.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from m2d.artifacts import reading
from m2d.errors import UserError
from m2d.pipeline.expand import expand_pipelines
from m2d.pipeline.resources import read_sizes
from m2d.pipeline.schema import Settings
from m2d.pipeline.student_settings import PrunedStudent, student_kind
from m2d.pipeline.teachers import completed
from m2d.settings import checked, unknown
from m2d.students.variants import UNDISTILLED

__all__ = ["SHAPE", "check_config", "load_config", "student_kind"]

Config = dict[str, Any]

# Names of folders beside the teachers', and of results beside the recipes'.
RESERVED = {
    "teachers": {"corpus", "tasks", "tables", "figures", "cards", "benchmarks", "logs"},
    "recipes": set(UNDISTILLED),
}
# What a recipe with stored teacher outputs may say of its loss, all of it the default.
STORED_GOES_WITH = {
    "loss": "forward_kl",
    "loss_implementation": "chunked",
    "temperature": 1.0,
    "cross_entropy_weight": 0,
    "hidden_loss_weight": 0,
}
# What a teacher's tokens are where the config says nothing: the paper's, for 0.3B of distillation.
PAPER_DATASETS = {
    "fineweb-edu": {"hub": "HuggingFaceFW/fineweb-edu@sample-10BT:train:text"},
    "wikitext-2": {"hub": "Salesforce/wikitext@wikitext-2-raw-v1:test:text"},
}
PAPER_TOKENS = {
    "calibration": {"dataset": "fineweb-edu", "sequences": 512, "length": 2048},
    "test": {"dataset": "wikitext-2", "sequences": 140, "length": 2048},
    "distillation": {"dataset": "fineweb-edu", "sequences": 146304, "length": 2048},
}
# Sizes of a student by structured pruning.
SHAPE = tuple(name for name in PrunedStudent.model_fields if name != "baseline")


def has_experts(teacher: Mapping[str, Any]) -> bool:
    """Whether a teacher's entry is of a Mixture-of-Experts model."""
    return "experts" in teacher


def goes_with(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    """Whether a student is made from such a teacher: d2d from dense ones, all others from MoEs."""
    return (student_kind(student) == "d2d") != has_experts(teacher)


def load_config(path: str | Path) -> Config:
    """Read and check a config file; see `check_config`."""
    with reading(path, "a config in YAML"):
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except yaml.YAMLError as error:  # which says on several lines where
            raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return check_config(values)


def check_config(values: Any) -> Config:
    """The config with all defaults filled in and all methods by identifier; a copy.

    Keys that are left out and have no default are absent. Raises UserError, one line that names the
    key, its value and what is allowed.
    """
    settings = checked(Settings, values, "config: ")
    config: Config = settings.model_dump(exclude_none=True)
    _complete(config)
    expand_pipelines(config)
    _check_names(config)
    _check_sizes(config)
    return config


def _complete(config: Config) -> None:
    """Fill in, in place, what a teacher's entry leaves out. Raises where that is not possible."""
    if "tokens" not in config:
        config["tokens"] = PAPER_TOKENS
    used = {t["dataset"] for t in config["tokens"].values()} & PAPER_DATASETS.keys()
    config["datasets"] = {n: PAPER_DATASETS[n] for n in sorted(used)} | config["datasets"]
    for name, teacher in config["teachers"].items():
        try:
            config["teachers"][name] = completed({"tokens": config["tokens"], **teacher})
        except UserError as error:
            raise UserError(f"config: teachers.{name}: {error}") from None


def evaluation_jobs(config: Mapping[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Name -> (evaluation, tasks) of every job that scores a model: a job per task.

    One for all tasks of an evaluation that is `together`, by its name.
    """
    jobs: dict[str, tuple[str, list[str]]] = {}
    for name, settings in config["evaluations"].items():
        if settings["together"]:
            jobs[name] = (name, settings["tasks"])
        else:
            jobs |= {task: (name, [task]) for task in settings["tasks"]}
    return jobs


def logits_name(recipe: Mapping[str, Any]) -> str:
    """The name of a recipe's stored teacher outputs: top-64, sampled-32-top-k-16-float32."""
    settings = recipe["teacher_logits"]
    parts = [settings["kind"], str(settings["size"])]
    parts += ["top-k", str(recipe["teacher_top_k"])] if "teacher_top_k" in recipe else []
    dtype = recipe.get("teacher_dtype", "auto")
    return "-".join([*parts, *([] if dtype == "auto" else [dtype])])


def logits_names(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of stored teacher outputs -> a recipe that has them."""
    stored = [recipe for recipe in config["recipes"].values() if "teacher_logits" in recipe]
    return {logits_name(recipe): recipe for recipe in stored}


def _check_names(config: Config) -> None:
    """Every name that is used is defined, and none is taken twice."""

    def known(section: str, name: str, key: str) -> None:
        if name not in config[section]:
            text = unknown(name, f"name in {section}", config[section])
            raise UserError(f"config: {key}: {text}")

    for section, names in RESERVED.items():
        for name in names & set(config[section]):
            raise UserError(f"config: {section}.{name}: this name is reserved; choose another")
    for name, teacher in config["teachers"].items():
        for use, tokens in teacher["tokens"].items():
            known("datasets", tokens["dataset"], f"teachers.{name}.tokens.{use}.dataset")
    for name, dataset in config["datasets"].items():
        for part in dataset.get("mix", ()):
            key = f"datasets.{name}.mix.{part}"
            known("datasets", part, key)
            inner = config["datasets"][part]
            if "mix" in inner or len(inner.get("files", ())) > 1:
                raise UserError(f"config: {key}: is itself of several parts; name them here")
    where: dict[str, str] = {}
    for name, evaluation in config["evaluations"].items():
        for task in evaluation["tasks"]:
            if task in where:
                raise UserError(
                    f"config: evaluations.{name}.tasks: {task} stands in evaluations.{where[task]} "
                    "already; scores go by task, so each may stand in one evaluation"
                )
            where[task] = name
    for name, evaluation in config["evaluations"].items():
        if evaluation["together"] and where.get(name, name) != name:
            raise UserError(
                f"config: evaluations.{name}: {name} is a task of evaluations.{where[name]}; an "
                "evaluation that is `together` needs another name"
            )
    for name, pipeline in config["pipelines"].items():
        key = f"pipelines.{name}"
        if not name.startswith("all_"):
            raise UserError(f"config: {key}: a pipeline is a target; its name must begin with all_")
        for section in ("teachers", "students", "evaluations"):
            for i, item in enumerate(pipeline[section]):
                known(section, item, f"{key}.{section}.{i}")
        for i, entry in enumerate(pipeline["distill"]):
            known("students", entry["student"], f"{key}.distill.{i}.student")
            known("recipes", entry["recipe"], f"{key}.distill.{i}.recipe")
        if "best" in pipeline:
            known("recipes", pipeline["best"], f"{key}.best")
        if pipeline["distill"] or "best" in pipeline:
            for teacher in pipeline["teachers"]:
                if "distillation" not in config["teachers"][teacher]["tokens"]:
                    raise UserError(
                        f"config: {key}.distill: teachers.{teacher}.tokens has no `distillation`; "
                        "add it"
                    )


def _check_sizes(config: Config) -> None:
    """Numbers that must agree with one another."""
    for name, teacher in config["teachers"].items():
        _check_sizes_file(name, teacher)
        if not has_experts(teacher):
            continue
        experts, top_k = teacher["experts"], teacher["top_k"]
        if top_k > experts:
            raise UserError(
                f"config: teachers.{name}.top_k: {top_k} is more than its {experts} experts"
            )
        sequences = teacher["tokens"]["calibration"]["sequences"]
        batches = -(-sequences // teacher["batch"])
        if teacher.get("shares", 1) > batches:
            raise UserError(
                f"config: teachers.{name}.shares: {teacher['shares']} jobs cannot share {batches} "
                f"batches ({sequences} calibration sequences, {teacher['batch']} at once)"
            )
        for i, keep in enumerate(teacher["keeps"]):
            _check_keep({"keep": keep}, name, teacher, f"teachers.{name}.keeps.{i}")
    for name, recipe in config["recipes"].items():
        key = f"config: recipes.{name}"
        steps, peak = recipe["steps"], recipe.get("learning_rate", math.inf)
        used = recipe.get("warmup_steps", 0) + recipe.get("decay_steps", 0)
        if used > steps:
            raise UserError(
                f"{key}.steps: {steps} is less than warmup_steps + decay_steps = {used}"
            )
        if recipe.get("min_learning_rate", 0) > peak:
            raise UserError(
                f"{key}.min_learning_rate: {recipe['min_learning_rate']:g} is more than "
                f"learning_rate = {peak:g}"
            )
        if "teacher_logits" in recipe:
            parts = recipe["teacher_logits"]["parts"]
            same = logits_names(config)[logits_name(recipe)]["teacher_logits"]["parts"]
            if parts != same:
                raise UserError(
                    f"{key}.teacher_logits.parts: {parts}, but {same} in another recipe with the "
                    "same outputs"
                )
            for other, allowed in STORED_GOES_WITH.items():
                if recipe[other] != allowed:
                    raise UserError(
                        f"{key}.{other}: {recipe[other]}, but with teacher_logits it is {allowed}"
                    )
        at_once = recipe["device_batch"] * max(recipe.get("gpus", 1), 1)
        if recipe["batch"] % at_once:
            raise UserError(
                f"{key}.batch: {recipe['batch']} is not a multiple of device_batch times gpus = "
                f"{at_once}"
            )
    for name, pipeline in config["pipelines"].items():
        used_students = [*pipeline["students"], *(e["student"] for e in pipeline["distill"])]
        teachers = {t: config["teachers"][t] for t in pipeline["teachers"]}
        with_experts = [t for t, entry in teachers.items() if has_experts(entry)]
        if (pipeline["scorings"] or "best" in pipeline) and not with_experts:
            raise UserError(f"config: pipelines.{name}.scorings: none of its teachers has experts")
        for student in dict.fromkeys(used_students):
            _check_student(config, name, student)
        recipes = {e["recipe"] for e in pipeline["distill"]} | {pipeline.get("best")} - {None}
        for teacher, entry in teachers.items():
            if "sizes" not in entry:
                for recipe in sorted(recipes):
                    _require_resources(config["recipes"][recipe], f"recipes.{recipe}", teacher)


def _check_student(config: Config, pipeline: str, name: str) -> None:
    """A student that a pipeline uses is made from one of its teachers, which has enough experts."""
    student, teachers = config["students"][name], config["pipelines"][pipeline]["teachers"]
    fitting = [t for t in teachers if goes_with(student, config["teachers"][t])]
    if teachers and not fitting:
        kind = "is dense" if student_kind(student) == "d2d" else "has experts"
        raise UserError(
            f"config: pipelines.{pipeline}: students.{name} is made from no teacher of it; none of "
            f"{', '.join(teachers)} {kind}"
        )
    for teacher in fitting:
        if "keep" in student:
            key = f"pipelines.{pipeline}: students.{name}.keep"
            _check_keep(student, teacher, config["teachers"][teacher], key)
            keeps = config["teachers"][teacher]["keeps"]
            if "best_of" in student and student["keep"] not in keeps:
                raise UserError(
                    f"config: {key}: {student['keep']} is not among teachers.{teacher}.keeps, "
                    f"{', '.join(map(str, keeps))}, of which the grids are"
                )


def _check_sizes_file(name: str, teacher: Mapping[str, Any]) -> None:
    """The file of `sizes` is of a model with these experts; without one, resources are stated."""
    if "sizes" not in teacher:
        _require_resources(teacher.get("resources", {}), f"teachers.{name}.resources", name)
        return
    try:
        sizes = read_sizes(teacher["sizes"])
    except UserError as error:
        raise UserError(f"config: teachers.{name}.sizes: {error}") from None
    for key, found in (("experts", sizes.get("num_experts")), ("top_k", sizes.get("top_k"))):
        if teacher.get(key) != found:
            raise UserError(
                f"config: teachers.{name}.{key}: {teacher.get(key)}, but {teacher['model']} has "
                f"{found}"
            )


def _require_resources(stated: Mapping[str, Any], key: str, teacher: str) -> None:
    missing = [name for name in ("gpus", "mem_mb", "runtime") if name not in stated]
    if missing:
        raise UserError(
            f"config: {key}: the key {missing[0]} is missing; state it, or give teachers.{teacher} "
            "its `sizes`, from which it follows"
        )


def _check_keep(
    student: Mapping[str, Any], name: str, teacher: Mapping[str, Any], key: str
) -> None:
    keep, high = student["keep"], teacher["experts"]
    what = "groups" if "groups" in student else "top_k"
    low = {**teacher, **student}[what]
    if not low <= keep <= high:
        raise UserError(
            f"config: {key}: {keep} experts cannot be kept of {name}; from {low} (its {what}) to "
            f"{high} (its experts) are allowed"
        )
