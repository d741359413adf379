"""Tables: everything that a run measured, in one long table, and the wide tables made of it.

Every table is written as CSV, Markdown, Parquet, and as an HTML page that sorts and filters.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from m2d.artifacts import atomic_path, renewed_folder, write_text
from m2d.errors import UserError
from m2d.methods import table as methods
from m2d.progress import say
from m2d.report import comparisons
from m2d.report.results import (
    as_rows,
    read_benchmarks,
    read_evaluations,
    read_grid,
    read_perplexities,
    read_provenance,
    read_published,
    require_comparable,
    require_one_source,
    seconds_by_model,
)
from m2d.report.table_html import shown, table_html

AXES = ("scoring", "grouping", "scaling", "keep")
MODELS = (
    "Scores in percent, ± one standard error; average: unweighted, of the published over the "
    "paper's five tasks. made_s, measured_s: seconds to make the model and to measure it."
)
# table -> (title, caption)
TABLES = {
    "results": (
        "All results",
        "One row per measured number, in one format. source: measured here, or published.",
    ),
    "grid": (
        "The grid",
        "Perplexity of every configuration before distillation, with its standard error. same_as: "
        "an earlier row with the same student, which was measured once. relative: perplexity over "
        "the teacher's best row.",
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
        f"What this run measured. {MODELS} merged, pruned, initial, refit, align: not distilled; "
        "start: the one of these that distillation began with.",
    ),
    "distilled_grid": ("Distilled students by method and K", MODELS),
    "headline": (
        "Headline students",
        f"The published headline students, dense models for reference, and ours beside. {MODELS}",
    ),
    "published": ("Every published model, and ours", MODELS),
    "teacher_ab": (
        "The same student from different teachers",
        f"Students of the same name and recipe, one below the other. {MODELS}",
    ),
    "expanded_routing": (
        "Distilled from expanded teacher routing",
        "Students that differ only in teacher_top_k, the experts that the teacher ran while they "
        f"were distilled (none: as trained). {MODELS}",
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
                name = str(value) if axis == "keep" else methods(axis).term(str(value))
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


def make_tables(
    grid_files: Iterable[str | Path] = (),
    perplexity_files: Iterable[str | Path] = (),
    evaluation_files: Iterable[str | Path] = (),
    provenance_files: Iterable[str | Path] = (),
    benchmarks: str | Path | None = None,
) -> dict[str, pd.DataFrame]:
    """Every table of TABLES and of the families, by name, from the files of a run.

    See m2d.report.results for the files' paths.
    """
    grid_files, perplexity_files = list(grid_files), list(perplexity_files)
    evaluation_files, provenance_files = list(evaluation_files), list(provenance_files)
    require_one_source([*grid_files, *perplexity_files, *evaluation_files, *provenance_files])
    provenance = read_provenance(provenance_files)
    grid = read_grid(grid_files)
    require_comparable([*grid_files, *perplexity_files])
    rows = read_perplexities(perplexity_files, provenance)
    rows += read_evaluations(evaluation_files, provenance)
    shared = ["teacher", "scoring", "grouping", "scaling", "keep", "groups", "n_tokens", "stderr"]
    names = {"n_tokens": "samples"}
    cells = grid[[c for c in shared if c in grid]].rename(columns=names).to_dict("records")
    for cell, perplexity in zip(cells, grid.get("perplexity", ()), strict=True):
        row = {"variant": "grid", "task": "test text", "measure": "perplexity", "source": "ours"}
        rows.append({**{str(k): v for k, v in cell.items()}, **row, "value": perplexity})
    long = as_rows(rows + read_published())
    jobs = read_benchmarks(benchmarks)
    models = comparisons.model_rows(long, seconds_by_model(jobs))
    return {
        "results": long,
        "grid": grid,
        "grid_best": grid_best(grid),
        "axes": axis_effects(grid),
        "students": comparisons.plain(models[models["source"] == "ours"]),
        "distilled_grid": comparisons.distilled(models),
        "headline": comparisons.headline(models),
        "published": comparisons.published(models),
        **comparisons.families(models),
        "teacher_ab": comparisons.teacher_ab(models),
        "expanded_routing": comparisons.expanded_routing(models),
        "timings": timings(jobs),
    }


def title_of(name: str) -> tuple[str, str]:
    """Title and caption of a table."""
    if name.startswith(comparisons.FAMILY):
        return f"Models from {name.removeprefix(comparisons.FAMILY)}", MODELS
    return TABLES[name]


def write_table(frame: pd.DataFrame, name: str, folder: Path) -> None:
    """Write one table as NAME.csv, .md, .parquet and .html."""
    title, caption = title_of(name)
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
    with renewed_folder(args.out) as folder:
        for name, frame in tables.items():
            write_table(frame, name, folder)
    say(f"{args.out}: " + ", ".join(f"{name} ({len(frame)})" for name, frame in tables.items()))
