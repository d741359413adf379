"""Which student a name means: the config's, one that its name describes, or what grids say is best.

Used by the Snakefile, so nothing here imports torch.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from m2d.errors import UserError
from m2d.methods import table
from m2d.pipeline.best import best_configuration

Config = Mapping[str, Any]
Student = dict[str, Any]

# Students that a grid chooses, by scoring and grouping.
BEST = "best-[a-z_]+-[a-z_]+"
# Students that their names describe; see `described`.
DESCRIBED = "[a-z][a-z0-9_]*(-[a-z][a-z0-9_]*)*-k[0-9]+"
DEFAULTS = {"grouping": "round_robin", "scaling": "uniform"}


def described(name: str) -> Student | None:
    """The student that a name describes: {scoring}[-{grouping}][-{scaling}]-k{keep}.

    In lower case, by identifier or the paper's term: do-acp-k8, sf-wc-k16,
    gld_reap-round_robin-proportional-k8. What is left out is round robin and uniform. None for a
    name of another form.
    """
    found = re.fullmatch(r"(.+)-k([1-9][0-9]*)", name)
    if found is None or not re.fullmatch(DESCRIBED, name):
        return None
    parts = found[1].split("-")
    for end in range(len(parts), 0, -1):
        student: Student = {}
        with suppress(UserError):
            student["scoring"] = table("scoring").resolve("-".join(parts[:end]))
            for part in parts[end:]:
                _add_method(student, part)
            return (
                student
                | {k: v for k, v in DEFAULTS.items() if k not in student}
                | {"keep": int(found[2])}
            )
    return None


def _add_method(student: Student, name: str) -> None:
    """Add a grouping or scaling that is not there yet; raises UserError for any other name."""
    for kind in DEFAULTS:
        if kind not in student:
            with suppress(UserError):
                student[kind] = table(kind).resolve(name)
                return
    raise UserError(f"{name}: neither a grouping nor a scaling")


def settings_of(config: Config, name: str) -> Student:
    """A student's settings as the config or its name has them; empty for a grid's choice."""
    return dict(config["students"].get(name) or described(name) or {})


def from_grids(config: Config, name: str) -> tuple[list[str], dict[str, Any]] | None:
    """(scorings, what is given): of whose grids a student is the best, among the rows with that.

    None for a student that no grid chooses.
    """
    student = settings_of(config, name)
    if not student:
        _, scoring, grouping = name.split("-")
        return [scoring], {"grouping": grouping}
    if "best_of" in student:
        return student["best_of"], {"keep": student["keep"]}
    return None


def grids_of(config: Config, teacher: str, scorings: list[str]) -> list[str]:
    """The files of a teacher's grids."""
    return [f"{config['results']}/{teacher}/grid/{scoring}.parquet" for scoring in scorings]


def student_of(config: Config, teacher: str, name: str) -> Student:
    """A student's settings, those that grids choose included.

    Before the grids exist, or have such rows, what they will choose is empty.
    """
    choice = from_grids(config, name)
    if choice is None:
        return settings_of(config, name)
    scorings, given = choice
    grids = grids_of(config, teacher, scorings)
    if all(Path(grid).is_file() for grid in grids):
        with suppress(UserError):
            return best_configuration(grids, **given)
    scoring = scorings[0] if len(scorings) == 1 else ""
    return {"scoring": scoring, "grouping": "", "scaling": "", "keep": 0, **given}


def scorings_of(config: Config, teacher: str, name: str) -> list[str]:
    """The scoring that a student is made from; before it is chosen, all that it may be."""
    scoring = student_of(config, teacher, name)["scoring"]
    choice = from_grids(config, name)
    return [scoring] if scoring or choice is None else choice[0]
