"""The repository's own pipelines: jobs by rule on the full config, from nothing and no weights.

One dry run of `tables`, the tables of all pipelines, serves most of the tests.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from workflow_project import REPOSITORY

from m2d.pipeline.settings import load_config

PAPER_TEACHERS = {
    "qwen3-30b-a3b", "qwen3-30b-a3b-base", "deepseek-v2-lite", "gpt-oss-20b", "emo", "stdmoe",
}  # fmt: skip
PIPELINES = {
    "all_demo", "all_closed_form", "all_best", "all_grid", "all_grid_distill", "all_headline",
    "all_deepseek", "all_gptoss", "all_baselines", "all_emo", "all_stdmoe", "all_base_ab",
    "all_expanded_routing",
}  # fmt: skip


class Job(NamedTuple):
    rule: str
    wildcards: dict[str, str]
    resources: dict[str, str]


def dry_run(folder: Path, *targets: str) -> list[Job]:
    """The jobs that Snakemake would run, where importing torch fails."""
    (folder / "torch.py").write_text("raise ImportError('torch was imported')\n", encoding="utf-8")
    options = ["--profile", "profiles/local", "--dry-run", "--nolock"]
    options += ["--config", f"results={folder / 'results'}", "--"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *options, *targets],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    found = []
    pattern = r"^(?:local)?(?:rule|checkpoint) (\w+):\n((?:    .*\n)*)"
    for rule, details in re.findall(pattern, done.stdout, re.M):
        fields = dict(line.strip().split(": ", 1) for line in details.splitlines())
        found.append(
            Job(rule, pairs(fields.get("wildcards", "")), pairs(fields.get("resources", "")))
        )
    return found


def pairs(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(", ") if part)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    return dry_run(tmp_path_factory.mktemp("dry"), "tables", "all_evals")


def count(jobs: list[Job], rule: str, **wildcards: str) -> int:
    return sum(
        job.rule.startswith(rule) and wildcards.items() <= job.wildcards.items() for job in jobs
    )


def test_every_pipeline_is_a_target(jobs: list[Job]) -> None:
    assert set(load_config(REPOSITORY / "config.yaml")["pipelines"]) == PIPELINES
    made = {job.wildcards["pipeline"] for job in jobs if job.rule == "make_tables"}
    drawn = {job.wildcards["pipeline"] for job in jobs if job.rule == "draw_figures"}
    assert made == drawn == PIPELINES


@pytest.mark.parametrize("teacher", sorted(PAPER_TEACHERS))
def test_jobs_of_a_teacher(jobs: list[Job], teacher: str) -> None:
    assert count(jobs, "compute_statistics", teacher=teacher) == 1
    assert count(jobs, "compute_gram", teacher=teacher) == 1
    assert count(jobs, "rank_experts", teacher=teacher) == 7
    assert count(jobs, "measure_grid", teacher=teacher) == 7
    assert count(jobs, "measure_teacher", teacher=teacher) == 1
    assert count(jobs, "evaluate_teacher", teacher=teacher) == 6
    assert count(jobs, "make_tokens", teacher=teacher) == 3
    assert count(jobs, "download_teacher", teacher=teacher) == 1


def test_demo(jobs: list[Job]) -> None:
    """Its closed-form students add a scoring method of their own."""
    assert count(jobs, "download_teacher", teacher="demo") == 0
    assert count(jobs, "rank_experts", teacher="demo") == 8
    assert count(jobs, "measure_grid", teacher="demo") == 7


def test_a_grid_has_350_configurations() -> None:
    config = load_config(REPOSITORY / "config.yaml")
    keeps = config["teachers"]["qwen3-30b-a3b"]["keeps"]
    grid = config["grid"]
    scorings = config["pipelines"]["all_grid"]["scorings"]
    each = len(grid["groupings"]) * len(grid["scalings"]) * len(keeps)
    assert len(scorings) * each == 350


@pytest.mark.parametrize(
    ("teacher", "recipe", "number"),
    [
        # 35 of the grid's best pairs, and the best of all at K=8 to compare with the base model's.
        ("qwen3-30b-a3b", "paper-300m", 36),
        ("qwen3-30b-a3b-base", "paper-300m", 1),
        # DO-ACP K=8, SF K=16 in clusters, and new FFNs; D2D is pruned from the dense model.
        ("qwen3-30b-a3b", "paper-4b", 3),
        ("qwen3-32b", "paper-4b", 1),
        ("qwen3-30b-a3b", "paper-4b-expanded", 1),
        # Four scoring methods at two values of K, new FFNs, and everything new.
        ("deepseek-v2-lite", "paper-300m", 10),
        ("gpt-oss-20b", "paper-300m", 10),
        ("emo", "paper-300m", 10),
        ("stdmoe", "paper-300m", 10),
    ],
)
def test_distillations(jobs: list[Job], teacher: str, recipe: str, number: int) -> None:
    assert count(jobs, "distill_student", teacher=teacher, recipe=recipe) == number


def test_the_best_of_every_pair(jobs: list[Job]) -> None:
    best = [j for j in jobs if j.wildcards.get("student", "").startswith("best-")]
    by_rule = Counter(job.rule for job in best)
    assert by_rule["merge_student"] == by_rule["distill_student"] == 35
    assert by_rule["measure_student"] == 70
    assert by_rule["evaluate_student_mmlu"] == 70


def test_headline(jobs: list[Job]) -> None:
    """Every student is merged once, and measured and scored before and after distillation."""
    for student in ("do-acp-k8", "sf-wc-k16"):
        own = {"teacher": "qwen3-30b-a3b", "student": student}
        assert count(jobs, "merge_student", **own) == 1
        for variant in ("merged", "paper-4b"):
            assert count(jobs, "measure_student", **own, variant=variant) == 1
            assert count(jobs, "evaluate_student", **own, variant=variant) == 6
    assert count(jobs, "prune_student", teacher="qwen3-32b") == 1
    assert count(jobs, "initialise_student", teacher="qwen3-30b-a3b") == 1
    assert count(jobs, "compute", teacher="qwen3-32b") == 0


def test_jobs_ask_for_what_their_teacher_needs(jobs: list[Job]) -> None:
    def of(rule: str, **wildcards: str) -> dict[str, str]:
        return next(
            j.resources for j in jobs if j.rule == rule and wildcards.items() <= j.wildcards.items()
        )

    # 61.1 GB of weights in memory, a margin of a quarter, and 2 GB for the process.
    assert of("evaluate_teacher_mmlu", teacher="qwen3-30b-a3b")["mem_mb"] == "79000"
    assert of("evaluate_teacher_mmlu", teacher="deepseek-v2-lite")["mem_mb"] == "42000"
    assert of("compute_gram", teacher="gpt-oss-20b")["gpu"] == "1"
    assert of("merge_student", teacher="gpt-oss-20b").get("gpu") is None
    assert of("compute_gram", teacher="demo") == {
        **of("compute_gram", teacher="demo"), "gpu": "0", "mem_mb": "2000", "runtime": "10"
    }  # fmt: skip
    # Two whole nodes: at 4e14 * 0.4 operations a second one takes 29 hours, more than 24.
    long = of("distill_student", teacher="qwen3-30b-a3b", recipe="paper-4b")
    assert (long["nodes"], long["gres"], "gpu" in long) == ("2", "gpu:8", False)
    pruned = of("distill_student", teacher="qwen3-32b")
    assert (pruned["nodes"], pruned["gres"]) == ("4", "gpu:8")
    short = of("distill_student", teacher="emo", recipe="paper-300m")
    assert (short["nodes"], short["gpu"], "gres" in short) == ("1", "1", False)


def test_the_figure_shows_the_rules(jobs: list[Job]) -> None:
    """`make rulegraph` after a rule is added."""
    figure = (REPOSITORY / "docs" / "figures" / "rulegraph.svg").read_text(encoding="utf-8")
    shown = set(re.findall(r"<title>(\w+)</title>", figure)) - {"rules"}
    names = {re.sub(r"^(evaluate_(?:teacher|student))_\w+$", r"\1", job.rule) for job in jobs}
    assert shown == {n for n in names if not n.startswith("all_")} - {"tables"}
