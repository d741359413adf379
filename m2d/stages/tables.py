"""Tables: everything that a run measured, in one long table, and the wide tables made of it.

Every table is written as CSV, Markdown, Parquet, and as an HTML page that sorts and filters.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from m2d.artifacts import atomic_path, write_text
from m2d.choose.names import term
from m2d.errors import UserError
from m2d.progress import say
from m2d.results import (
    PAPER_TASKS,
    as_rows,
    main_scores,
    read_benchmarks,
    read_evaluations,
    read_grid,
    read_perplexities,
    read_provenance,
    read_published,
)
from m2d.table_html import shown, table_html

AXES = ("scoring", "grouping", "scaling", "keep")
STUDENT = ["teacher", "student", "variant"]
PLAN = ["scoring", "grouping", "scaling", "keep", "parameters", "bytes", "tokens", "teacher_top_k"]
# table -> (title, caption)
TABLES = {
    "results": (
        "All results",
        "One row per measured number, in one format. source: measured here, or published.",
    ),
    "grid": (
        "The grid",
        "Perplexity of every configuration before distillation. same_as: an earlier row with the "
        "same student, which was measured once. relative: perplexity over the teacher's best row.",
    ),
    "grid_best": (
        "Best of each choice",
        "For each value of each design axis: its best configuration, and the geometric mean of "
        "the perplexity over all configurations that have it.",
    ),
    "axes": (
        "Effect of each design axis",
        "share_of_variance: the part of the variance of the log-perplexity over the grid that the "
        "means of the axis' values explain; the rest is interaction. spread: the worst value's "
        "geometric mean perplexity over the best value's.",
    ),
    "students": (
        "Teachers and students",
        "Perplexity and accuracy before and after distillation, with standard errors. merged: not "
        "trained further. average: unweighted, over the tasks.",
    ),
    "distilled_grid": (
        "Distilled students by scoring and K",
        "Average accuracy where tasks were evaluated, and perplexity, of the distilled students.",
    ),
    "published": (
        "Published scores beside ours",
        "Accuracies in percent. A row without a column of ours was not measured here.",
    ),
    "teacher_ab": (
        "The same student from different teachers",
        "A column per teacher; rows are students with the same name and recipe.",
    ),
    "expanded_routing": (
        "Distilled from expanded teacher routing",
        "A column per top-k with which the teacher ran while the student was distilled.",
    ),
    "timings": (
        "Wall-clock time",
        "Per rule of the workflow, from Snakemake's benchmark files: number of jobs, seconds, and "
        "the highest memory of a job in MB.",
    ),
}


def grid_best(grid: pd.DataFrame) -> pd.DataFrame:
    """Per teacher, axis and value: the best configuration, and the geometric mean perplexity."""
    columns = ["teacher", "axis", "value", "term", "best_perplexity", "best_configuration"]
    rows = []
    for teacher, part in _by_teacher(grid):
        for axis in AXES:
            for value, group in part.groupby(axis, sort=axis == "keep"):
                best = group.iloc[int(group["perplexity"].to_numpy().argmin())]
                others = "/".join(str(best[other]) for other in AXES if other != axis)
                name = str(value) if axis == "keep" else _term(axis, str(value))
                mean = float(np.exp(np.log(group["perplexity"]).mean()))
                rows.append([teacher, axis, str(value), name, best["perplexity"], others, mean])
    return pd.DataFrame(rows, columns=[*columns, "mean_perplexity"])


def axis_effects(grid: pd.DataFrame) -> pd.DataFrame:
    """Per teacher and axis: how much of the grid's variation in log-perplexity it explains."""
    columns = ["teacher", "axis", "share_of_variance", "spread", "best_value", "worst_value"]
    rows = []
    for teacher, part in _by_teacher(grid):
        logs = np.log(part["perplexity"])
        total = float(((logs - logs.mean()) ** 2).sum())
        for axis in AXES:
            means = logs.groupby(part[axis]).transform("mean")
            between = float(((means - logs.mean()) ** 2).sum())
            by_value = logs.groupby(part[axis]).mean()
            share = between / total if total > 0 else 0.0
            spread = float(np.exp(by_value.max() - by_value.min()))
            best, worst = str(by_value.idxmin()), str(by_value.idxmax())
            rows.append([teacher, axis, share, spread, best, worst])
    return pd.DataFrame(rows, columns=columns)


def students(long: pd.DataFrame) -> pd.DataFrame:
    """One row per teacher and student variant: plan, perplexity, a column per task, average."""
    ours = long[long["source"] == "ours"]
    # Missing values do not join: for the while, a teacher's student is the empty string.
    ours = ours.assign(student=ours["student"].fillna(""))
    index = ours.groupby(STUDENT)[PLAN].first()
    perplexity = ours[ours["measure"] == "perplexity"].set_index(STUDENT)["value"]
    index = index.join(perplexity.rename("perplexity"))
    for task, part in ours[ours["measure"] == "word_perplexity"].groupby("task"):
        index = index.join(part.set_index(STUDENT)["value"].rename(f"{task} word perplexity"))
    scores = main_scores(ours)
    tasks = [t for t in PAPER_TASKS if t in set(scores["task"])]
    tasks += sorted(set(scores["task"]) - set(tasks))
    for task in tasks:
        part = scores[scores["task"] == task].set_index(STUDENT)
        index = index.join(part["value"].rename(task))
        index = index.join(part["stderr"].rename(f"{task} ±"))
    if tasks:
        index["average"] = index[tasks].mean(axis=1, skipna=False)
        errors = index[[f"{task} ±" for task in tasks]].astype(float)
        index["average ±"] = np.sqrt((errors**2).sum(axis=1, skipna=False)) / len(tasks)
    table = index.reset_index()
    table["student"] = table["student"].replace("", pd.NA)
    # The teacher, then each student as merged, then distilled. What was measured comes first.
    first = table["variant"].map({"teacher": 0, "merged": 1}).fillna(2)
    table = table.assign(first=first).sort_values(
        ["teacher", "student", "first", "variant"], na_position="first", ignore_index=True
    )
    measured = [c for c in table if c not in (*STUDENT, *PLAN, "first")]
    return table[[*STUDENT, *measured, *PLAN]]


def distilled_grid(wide: pd.DataFrame) -> pd.DataFrame:
    """Distilled students, a row per teacher, recipe, scoring and grouping, a column per K."""
    distilled = wide[~wide["variant"].isin(["teacher", "merged"])].copy()
    keys = ["teacher", "variant", "scoring", "grouping", "scaling"]
    if distilled.empty:
        return pd.DataFrame(columns=keys)
    distilled[keys] = distilled[keys].fillna("")
    values = [column for column in ("average", "perplexity") if column in distilled]
    wide = distilled.pivot_table(index=keys, columns="keep", values=values, aggfunc="first")
    wide.columns = [", K=".join(map(str, pair)) for pair in wide.columns]
    return wide.reset_index()


def contrast(wide: pd.DataFrame, by: str, keys: list[str]) -> pd.DataFrame:
    """Distilled students that differ in `by` alone, side by side; none if there are no such."""
    distilled = wide[(wide["variant"] != "teacher") & wide["student"].notna()]
    distilled = distilled[distilled[by].notna()].copy()
    values = [column for column in ("average", "perplexity") if column in distilled]
    counts = distilled.groupby(keys, dropna=False)[by].transform("nunique")
    distilled = distilled[counts > 1]
    if distilled.empty:
        return pd.DataFrame(columns=keys)
    distilled[keys] = distilled[keys].astype(object).where(distilled[keys].notna(), "")
    result = distilled.pivot_table(index=keys, columns=by, values=values, aggfunc="first")
    result.columns = [f", {by} ".join(map(str, pair)) for pair in result.columns]
    return result.reset_index()


def published(long: pd.DataFrame) -> pd.DataFrame:
    """Published scores and ours in percent, matched by teacher, scoring and K (or as teachers)."""
    scores = main_scores(long)
    shown = [*PAPER_TASKS, "average"]
    scores = scores[scores["task"].isin(shown) & (scores["variant"] != "merged")].copy()
    percent = (100 * scores["value"]).astype(float)
    model = scores["teacher"].str.rsplit("/").str[-1].str.lower()
    plan = scores["scoring"].fillna("") + "/" + scores["keep"].astype("string").fillna("")
    is_teacher = scores["variant"] == "teacher"
    other = scores["student"].where(scores["scoring"].isna(), plan)
    scores = scores.assign(percent=percent, key=model + "/" + other.mask(is_teacher, "teacher"))
    sides = {}
    for source, part in scores.groupby("source"):
        names = part.groupby("key")[["teacher", "student", "tokens"]].first()
        table = part.pivot_table(index="key", columns="task", values="percent", aggfunc="first")
        table = table.reindex(columns=shown)
        if source == "ours":  # the published averages are rounded from more digits
            table["average"] = table[list(PAPER_TASKS)].mean(axis=1, skipna=False)
        table = table.astype(float).round(2)
        sides[source] = (names, table)
    names, theirs = sides["published"]
    ours_names, ours = sides.get("ours", (names.iloc[:0], theirs.iloc[:0]))
    order = [*dict.fromkeys(scores.loc[scores["source"] == "published", "key"])]
    order += sorted(set(ours.index) - set(order))
    rows = names.reindex(order).combine_first(ours_names).reindex(order)
    for task in shown:
        rows[task] = theirs[task].reindex(order)
        rows[f"{task}, ours"] = ours[task].reindex(order)
    return rows.reset_index(drop=True)


def timings(benchmarks: pd.DataFrame) -> pd.DataFrame:
    """Per rule: jobs, seconds in all, per job and at most, and the highest memory."""
    columns = ["rule", "jobs", "seconds", "mean_seconds", "max_seconds", "max_rss_mb"]
    groups = benchmarks.groupby("rule")
    table = groups.agg(
        jobs=("seconds", "size"),
        seconds=("seconds", "sum"),
        mean_seconds=("seconds", "mean"),
        max_seconds=("seconds", "max"),
        max_rss_mb=("max_rss_mb", "max"),
    ).reset_index()
    table = table.sort_values("seconds", ascending=False, ignore_index=True)
    return table[columns]


def _by_teacher(grid: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    return [] if grid.empty else [(str(name), part) for name, part in grid.groupby("teacher")]


def _term(axis: str, value: str) -> str:
    try:
        return term(axis, value)
    except KeyError:
        return value


def make_tables(
    grid_files: Iterable[str | Path] = (),
    perplexity_files: Iterable[str | Path] = (),
    evaluation_files: Iterable[str | Path] = (),
    provenance_files: Iterable[str | Path] = (),
    benchmarks: str | Path | None = None,
) -> dict[str, pd.DataFrame]:
    """Every table of TABLES, by name, from the files of a run; see m2d.results for the paths."""
    provenance = read_provenance(provenance_files)
    grid = read_grid(grid_files)
    rows = read_perplexities(perplexity_files, provenance)
    rows += read_evaluations(evaluation_files, provenance)
    shared = ["teacher", "scoring", "grouping", "scaling", "keep", "groups", "n_tokens"]
    names = {"n_tokens": "samples"}
    cells = grid[[c for c in shared if c in grid]].rename(columns=names).to_dict("records")
    for cell, perplexity in zip(cells, grid.get("perplexity", ()), strict=True):
        row = {"variant": "grid", "task": "test text", "measure": "perplexity", "source": "ours"}
        rows.append({**{str(k): v for k, v in cell.items()}, **row, "value": perplexity})
    long = as_rows(rows + read_published())
    wide = students(long[long["variant"] != "grid"])
    top_k = wide["teacher_top_k"].astype("string").fillna("as trained")
    routed = wide[wide["tokens"].notna()].assign(teacher_top_k=top_k)
    routing = ["teacher", "scoring", "grouping", "scaling", "keep", "tokens"]
    return {
        "results": long,
        "grid": grid,
        "grid_best": grid_best(grid),
        "axes": axis_effects(grid),
        "students": wide,
        "distilled_grid": distilled_grid(wide),
        "published": published(long),
        "teacher_ab": contrast(wide, "teacher", ["student", "variant"]),
        "expanded_routing": contrast(routed, "teacher_top_k", routing),
        "timings": timings(read_benchmarks(benchmarks)),
    }


def write_table(frame: pd.DataFrame, name: str, folder: Path) -> None:
    """Write one table as NAME.csv, .md, .parquet and .html."""
    title, caption = TABLES[name]
    write_text(folder / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    # For reading, columns without any value are left out; the CSV and Parquet files keep them.
    filled = frame.dropna(axis="columns", how="all") if len(frame) else frame
    text = shown(filled)
    markdown = text.to_markdown(index=False, disable_numparse=True) if len(frame) else "No rows."
    write_text(folder / f"{name}.md", f"# {title}\n\n{caption}\n\n{markdown}\n")
    write_text(folder / f"{name}.html", table_html(filled, title, caption))
    with atomic_path(folder / f"{name}.parquet") as temporary:
        frame.to_parquet(temporary, index=False)


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """The files of a run, for tables and figures alike."""
    parser.add_argument("--grid", nargs="*", default=[], metavar="FILE", help="from m2d grid")
    parser.add_argument(
        "--perplexity", nargs="*", default=[], metavar="FILE", help="from m2d perplexity --out"
    )
    parser.add_argument(
        "--evaluation", nargs="*", default=[], metavar="FILE", help="from m2d evaluate"
    )
    parser.add_argument(
        "--provenance", nargs="*", default=[], metavar="FILE", help="the students' m2d.json"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the folder to write the tables into")
    add_result_options(parser)
    parser.add_argument("--benchmarks", type=Path, help="folder of Snakemake's benchmark files")


def main(args: argparse.Namespace) -> None:
    if args.benchmarks is not None and not args.benchmarks.is_dir():
        raise UserError(f"--benchmarks {args.benchmarks}: no such folder")
    tables = make_tables(
        args.grid, args.perplexity, args.evaluation, args.provenance, args.benchmarks
    )
    for name, frame in tables.items():
        write_table(frame, name, args.out)
    say(f"{args.out}: " + ", ".join(f"{name} ({len(frame)})" for name, frame in tables.items()))
