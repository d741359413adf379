"""Tables with a row per model, all in one format: ours, and published figures beside them.

Columns: what the model is, its perplexity, for each task its score, standard error and published
score (percent), their unweighted average, the seconds that it took, and its plan.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from m2d.report.results import PAPER_TASKS, main_scores
from m2d.students.variants import REPAIRS, UNDISTILLED

MODEL = ["source", "teacher", "student", "variant"]
TIMES = ["made_s", "measured_s"]
PLAN = [
    "start",
    "baseline",
    "scoring",
    "grouping",
    "scaling",
    "keep",
    "tokens",
    "teacher_top_k",
    "parameters",
    "bytes",
]
FAMILY = "family_"  # then a teacher's name
# Of the four headline students (arXiv:2605.28207); the families' students had 0.3B.
HEADLINE_TOKENS = 4_000_000_000
# Budgets are whole numbers of steps, which come near the paper's round numbers.
NEAR = 0.05


def model_rows(long: pd.DataFrame, seconds: pd.DataFrame) -> pd.DataFrame:
    """A row per model of `long`, published ones last; `seconds` as seconds_by_model gives it."""
    long = long[long["variant"] != "grid"]
    # Missing values do not join: for the while, a teacher's student is the empty string.
    long = long.assign(student=long["student"].fillna(""))
    table = long.groupby(MODEL)[PLAN].first()
    perplexity = long[long["measure"] == "perplexity"].set_index(MODEL)
    both = perplexity[["value", "stderr"]].set_axis(["perplexity", "perplexity ±"], axis=1)
    table = table.join(both.astype(float))
    for task, part in long[long["measure"] == "word_perplexity"].groupby("task"):
        table = table.join(part.set_index(MODEL)["value"].rename(f"{task} word perplexity"))
    scores = main_scores(long).set_index(MODEL)
    ours = scores[scores.index.get_level_values("source") == "ours"]
    found = sorted(set(ours["task"]) - set(PAPER_TASKS))
    shown = [*PAPER_TASKS, *found, "average"]
    for task in shown:
        part = 100 * scores.loc[scores["task"] == task, ["value", "stderr"]].astype(float)
        table = table.join(part.set_axis([task, f"{task} ±"], axis=1))
    # The paper's average is over its five tasks; a run without all of them has its own.
    paper = set(PAPER_TASKS) <= set(ours["task"])
    tasks = [*PAPER_TASKS] if paper else [t for t in shown if t in set(ours["task"])]
    errors = table[[f"{task} ±" for task in tasks]].astype(float)
    count = len(tasks)
    # Of published scores the average is given, rounded from more digits.
    table["average ±"] = np.nan
    if tasks:  # the sum of none would be 0
        table["average"] = table["average"].fillna(table[tasks].sum(axis=1, skipna=False) / count)
        table["average ±"] = np.sqrt((errors**2).sum(axis=1, skipna=False)) / count
    table = table.reset_index()
    table = table.merge(seconds.reset_index().assign(source="ours"), on=MODEL, how="left")
    table["student"] = table["student"].replace("", pd.NA).astype("string")
    table = _with_published(table, shown)
    made = ["teacher", *UNDISTILLED]
    first = table["variant"].map({name: i for i, name in enumerate(made)}).fillna(len(made))
    order = ["source", "teacher", "student", "first", "variant"]
    table = table.assign(first=first).sort_values(order, na_position="first", ignore_index=True)
    extra = ["perplexity", "perplexity ±"]
    extra += [str(column) for column in table if str(column).endswith("word perplexity")]
    scored = [name for task in shown for name in (task, f"{task} ±", f"{task} published")]
    return table[[*MODEL, *extra, *scored, *TIMES, *PLAN, "repeated"]]


def _with_published(table: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """The table with columns of published scores; rows of ours have those of the same model.

    A published row has its scores in those columns alone. `repeated`: a row of ours has them too.
    """
    ours, theirs = table[table["source"] == "ours"], table[table["source"] == "published"]
    records = _records(theirs)
    matches = [
        next((n for n, record in enumerate(records) if same_model(row, record)), -1)
        for row in _records(ours)
    ]
    figures = theirs[shown].astype(float).round(4).add_suffix(" published")
    beside = figures.reset_index(drop=True).reindex(matches).set_axis(ours.index)
    table = table.join(pd.concat([beside, figures]))
    table.loc[theirs.index, shown] = np.nan
    again = theirs.index[[number in matches for number in range(len(records))]]
    return table.assign(repeated=table.index.isin(again))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries, None for what is missing."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]


def same_model(ours: dict[str, Any], published: dict[str, Any]) -> bool:
    """Whether ours is the published model: teacher, method, K, size and token budget."""
    if _name_of(ours["teacher"]) != _name_of(published["teacher"]):
        return False
    if published["variant"] == "teacher" or ours["variant"] == "teacher":
        return bool(published["variant"] == ours["variant"])
    stated = ("baseline", "scoring", "grouping", "scaling", "keep")
    if any(published[key] not in (None, ours[key]) for key in stated):
        return False
    near = all(
        ours[key] and abs(ours[key] / published[key] - 1) < NEAR
        for key in ("tokens", "parameters")
        if published[key]
    )
    trained = (
        ours["start"] is not None and ours["start"] not in REPAIRS and ours["teacher_top_k"] is None
    )
    return near and trained and published["variant"] != "reference"


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows to show: each published model once."""
    return rows[~rows["repeated"]].drop(columns="repeated").reset_index(drop=True)


def distilled(rows: pd.DataFrame) -> pd.DataFrame:
    """The students of ours that were distilled, by method and K."""
    mask = (rows["source"] == "ours") & ~rows["variant"].isin(["teacher", *UNDISTILLED])
    order = ["teacher", "variant", "scoring", "grouping", "scaling", "keep"]
    return plain(rows[mask].sort_values(order, kind="stable"))


def published(rows: pd.DataFrame) -> pd.DataFrame:
    """Every published model once, with ours in the same row where this run has it."""
    return plain(rows[rows["average published"].notna()])


def headline(rows: pd.DataFrame) -> pd.DataFrame:
    """The published headline students and references, ours, and what ours were before."""
    theirs = rows[rows["average published"].notna()]
    tokens = theirs["tokens"].astype(float)
    near = (tokens / HEADLINE_TOKENS - 1).abs() < NEAR
    chosen = theirs[near | (theirs["variant"] == "reference")]
    return _with_origins(rows, chosen)


def families(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """FAMILY + teacher -> its models; for teachers with published students, and several of ours."""
    ours, theirs = rows[rows["source"] == "ours"], rows[rows["source"] == "published"]
    teachers = set(theirs.loc[theirs["variant"] == "student", "teacher"])
    if ours["teacher"].nunique() > 1:
        teachers |= set(ours["teacher"])
    named = rows["teacher"].map(_name_of)
    names = sorted({_name_of(teacher) for teacher in teachers})
    return {FAMILY + name: plain(rows[named == name]) for name in names}


def _name_of(teacher: Any) -> str:
    """A teacher's name without its owner, in lower case."""
    return str(teacher).rsplit("/", maxsplit=1)[-1].lower()


def _with_origins(rows: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """`chosen` and, of ours among them, the teacher and the student before distillation."""
    ours = chosen[chosen["source"] == "ours"]
    students = set(zip(ours["teacher"], ours["student"], strict=True))
    pairs = zip(rows["teacher"], rows["student"], strict=True)
    origin = rows["variant"].isin(UNDISTILLED) & pd.Series([p in students for p in pairs])
    teacher = (rows["variant"] == "teacher") & rows["teacher"].isin(set(ours["teacher"]))
    return plain(rows[rows.index.isin(chosen.index) | origin | teacher])


def contrast(rows: pd.DataFrame, by: str, keys: Sequence[str]) -> pd.DataFrame:
    """Students of ours that agree in `keys` and differ in `by`, one below the other."""
    students = rows[(rows["source"] == "ours") & rows["student"].notna()]
    value = students[by].astype("string").fillna("as trained")
    groups = [students[key].astype("string").fillna("") for key in keys]
    students = students[value.groupby(groups).transform("nunique") > 1]
    return plain(students.sort_values([*keys, by], na_position="first", kind="stable"))


def teacher_ab(rows: pd.DataFrame) -> pd.DataFrame:
    """The same student and recipe from different teachers."""
    return contrast(rows, "teacher", ["student", "variant"])


def expanded_routing(rows: pd.DataFrame) -> pd.DataFrame:
    """Distilled students that differ in the number of experts that their teacher ran."""
    trained = rows[rows["tokens"].notna()]
    return contrast(trained, "teacher_top_k", ["teacher", "student", "tokens"])
