"""Names in a pipeline that stand for several: `each`, and braces in the names of students.

    {sf,cp,acp}-k{top_k}        sf-k6, cp-k6, acp-k6 for a teacher with top-6
    {sf,cp}-wc-k{2*top_k}       sf-wc-k12, cp-wc-k12

Used by the Snakefile, so nothing here imports torch.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from m2d.errors import UserError
from m2d.pipeline.choices import described

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER = re.compile(r"(?:([1-9][0-9]*)\*)?(top_k|experts)")


def expanded(pattern: str, teacher: Mapping[str, Any]) -> list[str]:
    """The names that a pattern means for a teacher, in order.

    Raises UserError on braces that say nothing, or of a teacher without experts.
    """
    found = BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"{pattern!r}: a brace that is not closed, or not opened")
        return [pattern]
    inner = found[1]
    number = NUMBER.fullmatch(inner)
    if number:
        if number[2] not in teacher:
            raise UserError(f"{pattern!r}: the teacher has no experts")
        values = [str(int(number[1] or 1) * teacher[number[2]])]
    elif "," in inner:
        values = [value.strip() for value in inner.split(",")]
    else:
        raise UserError(f"{{{inner}}}: neither top_k, 2*top_k, experts nor names with commas")
    return [
        name
        for value in values
        for name in expanded(pattern[: found.start()] + value + pattern[found.end() :], teacher)
    ]


def expand_pipelines(config: dict[str, Any]) -> None:
    """Write out, in place, each pipeline of a shape and the students that patterns stand for.

    Students that are described by their names are added to `students`.
    """
    pipelines: dict[str, Any] = {}
    for name, pipeline in config["pipelines"].items():
        for target, one in _targets(name, pipeline).items():
            if target in pipelines:
                raise UserError(f"config: pipelines.{name}: {target} stands there twice")
            pipelines[target] = _with_students(config, target, one)
    config["pipelines"] = pipelines


def _targets(name: str, pipeline: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Target -> its pipeline: one, or one for each teacher."""
    rest = {key: value for key, value in pipeline.items() if key != "each"}
    if "each" not in pipeline:
        return {name: rest}
    return {
        target: {**rest, "teachers": [teachers] if isinstance(teachers, str) else teachers}
        for target, teachers in pipeline["each"].items()
    }


def _with_students(config: dict[str, Any], name: str, pipeline: dict[str, Any]) -> dict[str, Any]:
    teachers = [config["teachers"][t] for t in pipeline["teachers"] if t in config["teachers"]]
    moe = [teacher for teacher in teachers if "experts" in teacher]

    def names(pattern: str, key: str) -> list[str]:
        try:
            ways = [expanded(pattern, teacher) for teacher in moe or [{}]]
        except UserError as error:
            raise UserError(f"config: pipelines.{name}.{key}: {error}") from None
        if any(way != ways[0] for way in ways):
            raise UserError(
                f"config: pipelines.{name}.{key}: {pattern}: not the same for all its teachers; "
                "write `each` in place of `teachers`"
            )
        _describe(config, ways[0])
        return ways[0]

    students = [s for i, p in enumerate(pipeline["students"]) for s in names(p, f"students.{i}")]
    distill = [
        {**entry, "student": student}
        for i, entry in enumerate(pipeline["distill"])
        for student in names(entry["student"], f"distill.{i}.student")
    ]
    return {**pipeline, "students": students, "distill": distill}


def _describe(config: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in config["students"] and (student := described(name)):
            config["students"][name] = student
