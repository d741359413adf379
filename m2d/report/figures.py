"""Figures of a run, each as SVG and PNG; the drawing itself is in plot_*.py."""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from safetensors import safe_open

from m2d.artifacts import reading, renewed_folder
from m2d.progress import say
from m2d.report import plot_experts as experts
from m2d.report import plot_grid as grid
from m2d.report import plot_repair as repair
from m2d.report import plot_students as students
from m2d.report.plot_style import message_figure, save
from m2d.report.results import place_of, require_one_source
from m2d.report.tables import add_result_options, make_tables
from m2d.students.record import read_record

# Figures of what a teacher's own files hold; with several teachers, one file for each.
# What each lacks where a run has no such file.
OF_A_TEACHER = {
    "grid_heatmap": "no grid",
    "grid_best": "no grid",
    "axis_effects": "no grid",
    "expert_usage": "no routing statistics",
    "gram_similarity": "no Gram statistics",
}
OF_THE_RUN = ("perplexity", "accuracy", "accuracy_and_size", "distillation", "repair")
FIGURES = (*OF_A_TEACHER, *OF_THE_RUN)


def read_statistics(file: str | Path) -> pd.DataFrame:
    """The routing statistics: one row per layer and expert."""
    with reading(file, "routing statistics of m2d stats"):
        columns = ["layer", "expert", "n_tokens", "n_selected"]
        return pd.read_parquet(file, columns=columns).astype("int64")


def read_grams(file: str | Path) -> dict[int, experts.Matrix]:
    """The inner products of expert outputs [E, E], by layer."""
    with reading(file, "Gram statistics of m2d gram"), safe_open(file, "numpy") as tensors:
        names = [name for name in tensors.keys() if name.endswith(".gram")]  # noqa: SIM118
        found = {int(n.split(".")[1]): tensors.get_tensor(n).astype(float) for n in names}
        for layer, gram in found.items():
            if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.isfinite(gram).all():
                raise ValueError(f"that of layer {layer} is no square matrix of numbers")
        return found


def read_metrics(files: Iterable[str | Path]) -> dict[str, pd.DataFrame]:
    """Loss and learning rate by step, of each distillation by "student, recipe"."""
    curves = {}
    for file in files:
        place = place_of(file)
        with reading(file, "metrics of m2d distill"):
            lines = Path(file).read_text(encoding="utf-8").splitlines()
            table = pd.DataFrame([json.loads(line) for line in lines])
            columns = table[["tokens", "loss", "lr"]].astype(float)
            if not np.isfinite(columns.to_numpy()).all():
                raise ValueError("a number is NaN or infinite")
            curves[f"{place.student}, {place.variant}"] = columns
    return curves


def read_repairs(files: Iterable[str | Path]) -> tuple[repair.Changes, repair.Changes]:
    """What folding and alignment did to each layer, from m2d.json of every model.

    By student, those with the same numbers together; of several teachers, with the teacher's name.
    """
    places = {Path(file): place_of(file) for file in files}
    several = len({place.teacher for place in places.values()}) > 1
    found: tuple[dict[Any, list[str]], dict[Any, list[str]]] = ({}, {})
    for file, place in places.items():
        record = read_record(file)
        name = f"{place.teacher}, {place.student}" if several else place.student
        folds = record.fold.layers if record.fold else []
        aligned = record.align.layers if record.align else []
        changes = (
            tuple(repair.LayerChange(x.layer, x.r2_before, x.r2_after) for x in folds),
            tuple(repair.LayerChange(x.layer, x.before, x.after) for x in aligned),
        )
        for kind, rows in zip(found, changes, strict=True):
            if rows and name not in kind.setdefault(rows, []):
                kind[rows].append(name)
    folds_by, aligned_by = ({", ".join(n): rows for rows, n in kind.items()} for kind in found)
    return folds_by, aligned_by


def make_figures(
    tables: dict[str, pd.DataFrame],
    statistics_files: Iterable[str | Path] = (),
    gram_files: Iterable[str | Path] = (),
    metrics_files: Iterable[str | Path] = (),
    provenance_files: Iterable[str | Path] = (),
) -> dict[str, Callable[[], Figure]]:
    """What draws each figure, by its name. With several teachers, those of one teacher are named
    NAME_TEACHER; NAME alone is then that of the first.
    """
    table, effects = tables["grid"], tables["axes"]
    by_teacher: dict[str, dict[str, Callable[[], Figure]]] = {}

    def add(teacher: str, name: str, draw: Callable[[], Figure]) -> None:
        by_teacher.setdefault(name, {})[teacher] = draw

    for teacher in sorted(set(table["teacher"])) if len(table) else []:
        part = table[table["teacher"] == teacher]
        own = effects[effects["teacher"] == teacher]
        add(teacher, "grid_heatmap", partial(grid.heat_map, part))
        add(teacher, "grid_best", partial(grid.best_per_scoring, part))
        add(teacher, "axis_effects", partial(grid.axis_effects, part, own))
    for file in statistics_files:
        statistics = read_statistics(file)
        add(Path(file).parent.name, "expert_usage", partial(experts.usage, statistics))
    for file in gram_files:
        grams = read_grams(file)
        add(Path(file).parent.name, "gram_similarity", partial(experts.similarity, grams))
    figures: dict[str, Callable[[], Figure]] = {}
    for name, none in OF_A_TEACHER.items():
        drawings = by_teacher.get(name, {})
        nothing = partial(message_figure, f"{none} in this run")
        figures[name] = next(iter(drawings.values()), nothing)
        if len(drawings) > 1:
            figures |= {f"{name}_{teacher}": draw for teacher, draw in drawings.items()}
    wide = tables["students"]
    curves = read_metrics(metrics_files)
    figures["perplexity"] = partial(students.perplexities, wide)
    figures["accuracy"] = partial(students.accuracies, wide)
    figures["accuracy_and_size"] = partial(students.accuracy_and_size, wide)
    figures["distillation"] = partial(students.distillation, curves)
    figures["repair"] = partial(repair.layers, *read_repairs(provenance_files))
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the folder to write the figures into")
    add_result_options(parser)
    parser.add_argument(
        "--statistics", nargs="*", default=[], metavar="FILE", help="from m2d stats"
    )
    parser.add_argument("--gram", nargs="*", default=[], metavar="FILE", help="from m2d gram")
    parser.add_argument(
        "--metrics", nargs="*", default=[], metavar="FILE", help="metrics.jsonl of m2d distill"
    )


def main(args: argparse.Namespace) -> None:
    pictured = (args.grid, args.statistics, args.gram, args.provenance)
    require_one_source(file for files in pictured for file in files or ())
    tables = make_tables(args.grid, args.perplexity, args.evaluation, args.provenance)
    figures = make_figures(tables, args.statistics, args.gram, args.metrics, args.provenance or [])
    with renewed_folder(args.out) as folder:
        for name, draw in figures.items():
            save(draw(), folder, name)
    say(f"{args.out}: " + ", ".join(figures))
