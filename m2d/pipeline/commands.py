"""Settings of the config as words of commands: what the rules' params hold.

Every function returns a list of words. Rules put them into their shell commands with `:q`, so a
value may hold anything that the shell would take apart or run.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m2d.distill.settings import DistillSettings
from m2d.errors import UserError
from m2d.settings import as_options

# Of token sequences, all but the text itself; keys left out say nothing.
OF_TOKENS = ("sequences", "length", "column", "bos", "loss_on")
# Of a recipe's keys, those that say how the teacher runs.
OF_TEACHER = ("teacher_top_k", "teacher_dtype")


def compute_options(teacher: Mapping[str, Any]) -> list[str]:
    """How a teacher and its students are computed."""
    return as_options(teacher, ("dtype", "batch"))


def token_options(tokens: Mapping[str, Any]) -> list[str]:
    """How `m2d tokenize` cuts a text."""
    return as_options(tokens, OF_TOKENS)


def text_files_of(config: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str]:
    """The files or folders of a text: the corpus', or the config's own; none of a mixture."""
    if "corpus" in dataset:
        return [f"{config['results']}/corpus/{dataset['corpus']}.jsonl"]
    return list(dataset.get("files", []))


def text_options(config: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str]:
    """Where `m2d tokenize` reads a text."""
    if "hub" in dataset:
        return ["--dataset", dataset["hub"]]
    if "mix" not in dataset:
        return ["--text", *text_files_of(config, dataset)]
    found = []
    for name, weight in dataset["mix"].items():
        part = config["datasets"][name]
        found += ["--mix", str(weight), part.get("hub") or text_files_of(config, part)[0]]
    return found


# Of a student of single neurons: the keys that say how many it keeps.
SIZE_KEYS = ("width", "params", "multiple")


def neurons_options(name: str) -> list[str]:
    """The name of neuron statistics as options: greedy-width-512 is --choice greedy --width 512.

    What its -fold-... says is an input of its own.
    """
    choice, *size = name.partition("-fold-")[0].split("-")
    words = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(size)]
    return ["--choice", choice, *words]


def neurons_name(student: Mapping[str, Any]) -> str:
    """The neuron statistics of a student: any width has the same, but the greedy order's."""
    fold = [f"-fold-{student['fold']}"] if "fold" in student else []
    if student["neurons"] == "contribution":
        return "".join(["contribution", *fold])
    size = [f"-{key}-{student[key]}" for key in SIZE_KEYS if key in student]
    return "".join(["greedy", *size, *fold])


def recipe_options(recipe: Mapping[str, Any], logits: str | None = None) -> list[str]:
    """A recipe as options of `m2d distill`; logits: the folder of stored ones, if it has them."""
    names = [n for n in DistillSettings.model_fields if not (logits and n in OF_TEACHER)]
    if logits:
        return as_options({**recipe, "teacher_logits": logits}, [*names, "teacher_logits"])
    return as_options(recipe, names)


def logits_options(recipe: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """Options of `m2d teacher-logits`, from a recipe that has them stored."""
    settings = {**recipe, **recipe["teacher_logits"], "batch": teacher["batch"]}
    if "teacher_dtype" in recipe:
        settings["dtype"] = recipe["teacher_dtype"]
    return as_options(settings, ("kind", "size", "batch", "teacher_top_k", "dtype"))


def evaluation_options(config: Mapping[str, Any], name: str, tasks: Iterable[str]) -> list[str]:
    """Options of `m2d evaluate` for some tasks of an evaluation."""
    settings = config["evaluations"][name]
    found = [word for task in tasks for word in ("--task", task)]
    if settings["demo"]:
        found += ["--include", f"{config['results']}/tasks"]
    found += as_options(settings, ("shots", "limit", "batch_size", "backend"))
    for dataset, folder in settings["datasets"].items():
        found += ["--dataset", f"{dataset}={folder}"]
    for key, value in settings["model_args"].items():
        found += ["--model-arg", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return found


def launcher_words(launcher: str) -> list[str]:
    """The config's launcher: a file, or a command with arguments as a shell would split it."""
    if Path(launcher).is_file():
        return [launcher]
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"config: launcher: {launcher!r}: {error}") from None
