"""What a run measured, gathered from its files into rows of one format.

Where a file stands says what it is about (the path grammar of the workflow):

  {teacher}/grid/{scoring}.parquet
  {teacher}/perplexity.json                            {teacher}/teacher.eval/{task}.json
  {teacher}/students/{student}/{variant}.perplexity.json
  {teacher}/students/{student}/{variant}.eval/{task}.json
  {teacher}/students/{student}/{variant}/m2d.json
  benchmarks/{rule}/....tsv

A variant is "merged", "refit" (down projections solved anew) or "align" (FFNs trained layer by
layer), none of them distilled, or the name of
a distillation recipe. The teacher's own variant is "teacher".
"""

import importlib.resources
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from m2d.artifacts import finite, read_json, reading
from m2d.errors import UserError
from m2d.methods import table
from m2d.progress import say
from m2d.sealed import noted_tokens, notes_of, read_rows, require_same_tokens
from m2d.students.record import DistillationPart, PlanPart, StudentRecord, read_record
from m2d.students.variants import ALIGN, INITIAL, MERGED, PRUNED, REFIT, first_variant

# Columns of the long format: one row per measured number, whatever was measured.
COLUMNS = {
    "teacher": "string",
    "student": "string",
    "variant": "string",
    "start": "string",
    "baseline": "string",
    "scoring": "string",
    "grouping": "string",
    "scaling": "string",
    "keep": "Int64",
    "groups": "Int64",
    "parameters": "Int64",
    "bytes": "Int64",
    "tokens": "Int64",
    "teacher_top_k": "Int64",
    "task": "string",
    "shots": "Int64",
    "measure": "string",
    "value": "Float64",
    "stderr": "Float64",
    "samples": "Int64",
    "source": "string",
}
PAPER_TASKS = ("winogrande", "hellaswag", "arc_easy", "arc_challenge", "mmlu")
# The verbs of rules that write a student -> its variant.
MADE_BY = {"merge": MERGED, "prune": PRUNED, "initialise": INITIAL, "refit": REFIT, "align": ALIGN}
# Accuracy of guessing, where a task has the same number of choices throughout.
CHANCE = {
    "winogrande": 0.5,
    **dict.fromkeys(("hellaswag", "arc_easy", "arc_challenge", "mmlu"), 0.25),
    **dict.fromkeys(("demo_continuation", "demo_package", "demo_parameter"), 0.25),
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A task's score is the first of these that it has, as in the paper.
SCORES = ("acc_norm", "acc", "exact_match", "f1")


@dataclass(frozen=True)
class Place:
    """What a result file is about; empty strings where that does not apply."""

    teacher: str
    student: str
    variant: str
    task: str = ""
    scoring: str = ""


def place_of(path: str | Path) -> Place:
    """What the file at `path` is about; UserError names the file where the grammar has no place."""
    path = Path(path)
    parts = ("", "", "", "", *path.absolute().parts)
    name, folder = parts[-1], parts[-2]
    in_student = parts[-4] == "students"
    if folder == "grid" and name.endswith(".parquet"):
        return Place(parts[-3], "", "", scoring=path.stem)
    if folder == "teacher.eval" and name.endswith(".json"):
        return Place(parts[-3], "", "teacher", task=path.stem)
    if folder.endswith(".eval") and name.endswith(".json") and in_student:
        return Place(parts[-5], parts[-3], folder.removesuffix(".eval"), task=path.stem)
    if name == "perplexity.json":
        return Place(folder, "", "teacher")
    if name.endswith(".perplexity.json") and parts[-3] == "students":
        return Place(parts[-4], folder, name.removesuffix(".perplexity.json"))
    if name in ("m2d.json", "metrics.jsonl") and in_student:
        return Place(parts[-5], parts[-3], folder)
    raise UserError(
        f"{path}: not where a result belongs, which is such as "
        "TEACHER/students/STUDENT/merged.eval/TASK.json"
    )


def as_rows(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """A frame in the long format, its rows in a fixed order."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS)).astype(COLUMNS)
    keys = ["source", "teacher", "student", "variant", "task", "measure", "scoring", "keep"]
    return frame.sort_values(keys, kind="stable", na_position="first", ignore_index=True)


def read_grid(files: Iterable[str | Path]) -> pd.DataFrame:
    """Every configuration of every grid file, with the file's teacher, in order of presentation.

    `same_as` names the first configuration that gives the same student, `relative` is the
    perplexity over the best one of that teacher.
    """
    frames = []
    for file in files:
        read_rows(file)  # which compares them with their digest
        with reading(file, "readable as Parquet"):
            frame = pd.read_parquet(file)
        missing = {"scoring", "grouping", "scaling", "keep", "plan", "perplexity", "stderr"}
        missing -= set(frame)
        if missing:
            raise UserError(f"{file}: lacks the columns {', '.join(sorted(missing))}")
        with reading(file, "a grid of m2d grid"):
            texts = ("scoring", "grouping", "scaling", "plan")
            nothing = frame["perplexity"].isna()
            if nothing.any():  # a student whose weights overflowed, say
                say(f"{file}: {nothing.sum()} of {len(frame)} rows have no perplexity; left out")
                frame = frame[~nothing]
            types: dict[str, Any] = dict.fromkeys(texts, str)
            types |= {"keep": int, "groups": int, "n_tokens": int}
            types |= {"perplexity": float, "stderr": float}
            known = {k: v for k, v in types.items() if k in frame and frame[k].notna().all()}
            frame = frame.astype(known)
            if not np.isfinite(frame["perplexity"]).all():
                raise ValueError("a perplexity is NaN or infinite")
            if np.isinf(frame.select_dtypes("number").astype(float)).any(axis=None):
                raise ValueError("a number in it is infinite")
        frames.append(frame.assign(teacher=place_of(file).teacher))
    if not frames:
        return pd.DataFrame()
    grid = pd.concat(frames, ignore_index=True)
    for kind in ("scoring", "grouping", "scaling"):
        unknown = sorted(set(grid[kind]) - set(table(kind)))
        grid[kind] = pd.Categorical(grid[kind], categories=[*table(kind), *unknown])
    keys = ["teacher", "scoring", "grouping", "scaling", "keep"]
    grid = grid.sort_values(keys, ignore_index=True)
    grid = grid.astype({"scoring": str, "grouping": str, "scaling": str})
    label = grid[["scoring", "grouping", "scaling"]].agg("/".join, axis=1)
    label += "/" + grid["keep"].astype(str)
    first = label.groupby([grid["teacher"], grid["plan"]]).transform("first")
    grid["same_as"] = first.where(first != label, "")
    best = grid.groupby("teacher")["perplexity"].transform("min")
    grid["relative"] = grid["perplexity"] / best
    leading = [*keys, "perplexity", "stderr", "relative", "same_as"]
    return grid[leading + [column for column in grid if column not in leading]]


def require_comparable(files: Iterable[str | Path]) -> None:
    """Raise a UserError where a teacher's grids and perplexities are of different tokens."""
    by_teacher: dict[str, dict[str, str | None]] = {}
    for file in files:
        by_teacher.setdefault(place_of(file).teacher, {})[str(file)] = noted_tokens(file)
    for noted in by_teacher.values():
        require_same_tokens(noted)


def require_one_source(files: Iterable[str | Path]) -> None:
    """Raise a UserError where files that stand in one model's place note different weights.

    Of a teacher: its grids, statistics and results, and the teacher that its students' m2d.json
    names; of a student, its results.
    """
    first: dict[Place, tuple[str, str | Path]] = {}
    for file in files:
        for place, noted in _noted_weights(file):
            known, other = first.setdefault(place, (noted, file))
            if known != noted:
                raise UserError(
                    f"{file}: is of other weights than {other} (fingerprint {noted[:12]}, not "
                    f"{known[:12]}); give files of one run"
                )


def _noted_weights(file: str | Path) -> Iterator[tuple[Place, str]]:
    """The models that a file names by their fingerprints; of a damaged one its own reader tells."""
    try:
        about = notes_of(file)
    except UserError:
        return
    if not about.keys() & {"teacher", "teacher_fingerprint", "model_fingerprint"}:
        return
    statistics = "teacher_fingerprint" in about and Path(file).parent.name != "grid"
    place = Place(Path(file).absolute().parent.name, "", "") if statistics else place_of(file)
    section = about.get("teacher")
    of_teacher = section.get("fingerprint") if isinstance(section, dict) else None
    of_teacher = of_teacher or about.get("teacher_fingerprint")
    if isinstance(of_teacher, str):
        yield Place(place.teacher, "", "teacher"), of_teacher
    own = about.get("model_fingerprint")
    if isinstance(own, str):
        yield Place(place.teacher, place.student, place.variant), own


PLAN_KEYS = ("scoring", "grouping", "scaling", "keep", "groups")


def read_provenance(files: Iterable[str | Path]) -> dict[Place, dict[str, Any]]:
    """What the m2d.json of each student says of it and of its teacher, as columns of the format."""
    found: dict[Place, dict[str, Any]] = {}
    for file in files:
        record = read_record(file)
        plan, distillation = record.plan or PlanPart(), record.distillation or DistillationPart()
        size = DTYPE_BYTES.get(str(record.dtype).removeprefix("torch."))
        place = place_of(file)
        found[place] = {
            **{key: getattr(plan, key) or None for key in PLAN_KEYS},
            **_sizes(record.student.parameters, size),
            "start": _start_of(record),
            "baseline": record.baseline.kind if record.baseline else None,
            "tokens": distillation.tokens,
            "teacher_top_k": distillation.teacher_top_k,
        }
        sizes = _sizes(record.teacher.parameters, size)
        found[Place(place.teacher, "", "teacher")] = {**sizes, "bytes_per_weight": size}
    return found


def typed(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if its values are of its columns' types; else ValueError."""
    for name, value in row.items():
        kind = COLUMNS[name]
        if value is None:
            continue
        if kind == "string":
            if not isinstance(value, str):
                raise ValueError(f"{name} is {str(value)[:40]!r}, and must be text")
        elif kind == "Int64":
            if type(value) is not int or abs(value) >= 2**63:
                raise ValueError(f"{name} is {str(value)[:40]!r}, and must be a whole number")
        else:
            finite(value, name)
    return row


def _start_of(record: StudentRecord) -> str | None:
    """The variant that a distilled student's training began with."""
    if not record.distillation:
        return None
    if record.align:
        return ALIGN
    if record.refit:
        return REFIT
    return first_variant(record.baseline.kind if record.baseline else None)


def _sizes(parameters: int | None, bytes_per_weight: int | None) -> dict[str, int | None]:
    """Parameters and bytes of a model that m2d.json describes."""
    if parameters is None or bytes_per_weight is None:
        return {"parameters": parameters, "bytes": None}
    return {"parameters": parameters, "bytes": parameters * bytes_per_weight}


def about(place: Place, provenance: dict[Place, dict[str, Any]]) -> dict[str, Any]:
    """The columns that say what a number is about."""
    key = Place(place.teacher, place.student, place.variant)
    names = {"teacher": place.teacher, "student": place.student or None, "variant": place.variant}
    return {**names, **provenance.get(key, {}), "source": "ours"}


def read_perplexities(
    files: Iterable[str | Path], provenance: dict[Place, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per perplexity.json."""
    rows = []
    for file in files:
        content = read_json(file)
        if "perplexity" not in content:
            raise UserError(f"{file}: holds no perplexity; make it with m2d perplexity --out")
        row = {"task": "test text", "measure": "perplexity", "value": content["perplexity"]}
        row |= {"samples": content.get("n_tokens"), "stderr": content.get("stderr")}
        with reading(file, "a result of m2d perplexity"):
            rows.append({**about(place_of(file), provenance), **typed(row)})
    return rows


def read_evaluations(
    files: Iterable[str | Path], provenance: dict[Place, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per measure of the task that each file is named after."""
    rows: list[dict[str, Any]] = []
    for file in files:
        content = read_json(file)
        with reading(file, "a result of m2d evaluate"):
            rows += _scores_in(file, content, provenance)
    return rows


def _scores_in(
    file: str | Path, content: dict[str, Any], provenance: dict[Place, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of one file; any exception where it is no result."""
    place = place_of(file)
    results = content.get("results", {})
    if place.task not in results:
        raise UserError(f"{file}: holds no result of {place.task}; make it with m2d evaluate")
    shots = content.get("n-shot", {}).get(place.task)
    count = content.get("n-samples", {}).get(place.task, {}).get("effective")
    setup = content.get("config", {})  # its sizes hold for teachers and baselines too
    size = DTYPE_BYTES.get(str(setup.get("model_dtype")).removeprefix("torch."))
    own = provenance.get(Place(place.teacher, place.student, place.variant), {})
    size = own.get("bytes_per_weight", size)  # as stored, not as evaluated
    sizes = _sizes(setup.get("model_num_parameters"), size)
    for key, value in results[place.task].items():
        measure, _, metric_filter = key.partition(",")
        if not metric_filter or measure.endswith("_stderr"):
            continue
        error = results[place.task].get(f"{measure}_stderr,{metric_filter}")
        row = {"task": place.task, "shots": shots, "measure": measure, "value": value}
        row |= {"stderr": error if isinstance(error, float) else None, "samples": count}
        known = {k: v for k, v in about(place, provenance).items() if v is not None}
        yield {**typed(sizes), **known, **typed(row)}


def read_published() -> list[dict[str, Any]]:
    """The published scores (fractions, like ours), a row per task and one for the average."""
    file = importlib.resources.files("m2d").joinpath("report/published_results.csv")
    with importlib.resources.as_file(file) as path:
        table = pd.read_csv(path)
    plain = table.astype(object).where(table.notna(), None)
    rows = []
    for record in plain.to_dict("records"):
        shared = {key: value for key, value in record.items() if key in COLUMNS}
        shared["variant"] = record["kind"]
        for task in (*PAPER_TASKS, "average"):
            row = {"task": task, "measure": "score", "value": record[task] / 100}
            rows.append({**shared, **row, "source": "published"})
    return rows


def read_benchmarks(folder: str | Path | None) -> pd.DataFrame:
    """Snakemake's benchmark files: rule, job, seconds and highest memory (MB) of every job."""
    columns = ["rule", "job", "seconds", "max_rss_mb"]
    rows = []
    for file in sorted(Path(folder).rglob("*.tsv")) if folder is not None else []:
        relative = file.relative_to(Path(folder or ".")).with_suffix("")
        with reading(file, "a Snakemake benchmark"):
            table = pd.read_csv(file, sep="\t", na_values=["-"])
            seconds, memory = float(table["s"].sum()), float(table["max_rss"].max())
        job = "/".join(relative.parts[1:])
        rows.append([relative.parts[0], job, seconds, memory])
    return pd.DataFrame(rows, columns=columns)


def seconds_by_model(benchmarks: pd.DataFrame) -> pd.DataFrame:
    """Seconds that each model took to be made (`made_s`) and measured (`measured_s`).

    From the jobs' names: TEACHER/STUDENT where one is written, TEACHER/STUDENT/RECIPE where it is
    distilled, TEACHER[/STUDENT/VARIANT][/EVALUATION] where a model is measured.
    """
    rows = []
    for rule, job, seconds in benchmarks[["rule", "job", "seconds"]].itertuples(index=False):
        verb, _, what = rule.partition("_")
        parts = job.split("/")
        column = "measured_s" if verb in ("measure", "evaluate") else "made_s"
        if what == "teacher":
            rows.append([parts[0], "", "teacher", column, seconds])
        elif (what == "student" or rule == "merge_neurons") and len(parts) > 1:
            variant = parts[2] if len(parts) > 2 else MADE_BY[verb]
            rows.append([parts[0], parts[1], variant, column, seconds])
    table = pd.DataFrame(rows, columns=["teacher", "student", "variant", "column", "seconds"])
    wide = table.pivot_table(
        index=["teacher", "student", "variant"], columns="column", values="seconds", aggfunc="sum"
    )
    return wide.reindex(columns=["made_s", "measured_s"]).astype("Float64")


def main_scores(long: pd.DataFrame) -> pd.DataFrame:
    """The rows of `long` that hold each task's score: the first of SCORES that the task has."""
    order = {"score": 0, **{name: number for number, name in enumerate(SCORES, 1)}}
    found = long[long["measure"].isin(list(order))].copy()
    found["rank"] = found["measure"].map(order)
    keys = ["source", "teacher", "student", "variant", "task", "tokens"]
    best = found.groupby(keys, dropna=False)["rank"].transform("min")
    return found[found["rank"] == best].drop(columns="rank")
