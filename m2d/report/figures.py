"""Figures of a run, each as SVG and PNG; the drawing itself is in plot_*.py."""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

from m2d.errors import UserError
from m2d.progress import say
from m2d.report import plot_experts as experts
from m2d.report import plot_grid as grid
from m2d.report import plot_students as students
from m2d.report.plot_style import message_figure, save
from m2d.report.results import place_of
from m2d.report.tables import add_result_options, make_tables

# Figures of what a teacher's own files hold; with several teachers, one file for each.
# What each lacks where a run has no such file.
OF_A_TEACHER = {
    "grid_heatmap": "no grid",
    "grid_best": "no grid",
    "axis_effects": "no grid",
    "expert_usage": "no routing statistics",
    "gram_similarity": "no Gram statistics",
}
OF_THE_RUN = ("perplexity", "accuracy", "accuracy_and_size", "distillation")
FIGURES = (*OF_A_TEACHER, *OF_THE_RUN)


def read_statistics(file: str | Path) -> pd.DataFrame:
    """The routing statistics: one row per layer and expert."""
    try:
        return pd.read_parquet(file, columns=["layer", "expert", "n_tokens", "n_selected"])
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not routing statistics of m2d stats ({error})") from None


def read_grams(file: str | Path) -> dict[int, experts.Matrix]:
    """The inner products of expert outputs [E, E], by layer."""
    try:
        with safe_open(file, "numpy") as tensors:
            names = [name for name in tensors.keys() if name.endswith(".gram")]  # noqa: SIM118
            return {int(name.split(".")[1]): tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not Gram statistics of m2d gram ({error})") from None


def read_metrics(files: Iterable[str | Path]) -> dict[str, pd.DataFrame]:
    """Loss and learning rate by step, of each distillation by "student, recipe"."""
    curves = {}
    for file in files:
        place = place_of(file)
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
            table = pd.DataFrame([json.loads(line) for line in lines])
            curves[f"{place.student}, {place.variant}"] = table[["tokens", "loss", "lr"]]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file}: not metrics of m2d distill ({error})") from None
    return curves


def make_figures(
    tables: dict[str, pd.DataFrame],
    statistics_files: Iterable[str | Path] = (),
    gram_files: Iterable[str | Path] = (),
    metrics_files: Iterable[str | Path] = (),
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
    tables = make_tables(args.grid, args.perplexity, args.evaluation, args.provenance)
    figures = make_figures(tables, args.statistics, args.gram, args.metrics)
    for name, draw in figures.items():
        save(draw(), args.out, name)
    say(f"{args.out}: " + ", ".join(figures))
