"""What re-runs after which edit of the workflow, in a project that is complete."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from workflow_project import (
    NOTHING,
    SCORING,
    TABLES,
    change_config,
    edit_function,
    jobs_of,
    other_ranking,
    same_ranking,
    snakemake,
    write_config,
)

pytestmark = pytest.mark.timeout(1200)


def uses_of(student: str) -> list[str]:
    """The jobs on a student that exists already, merged and distilled."""
    return [
        f"{rule} student={student} variant={variant}"
        for rule in ("evaluate_student_demo_continuation", "measure_student")
        for variant in ("merged", "short")
    ]


def test_comments_and_docstrings_rerun_nothing(project: Path) -> None:
    for file in (project / "m2d").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        file.write_text(source.replace('"""', '"""Edited. ', 1) + "# edited\n", encoding="utf-8")
    assert NOTHING in snakemake(project, "--dry-run", "all_wide").stdout


def edited(project: Path, file: str, before: str, after: str) -> None:
    """Replace what stands once in a file of the project."""
    source = (project / file).read_text(encoding="utf-8")
    assert source.count(before) >= 1, f"{before} is not in {file}"
    (project / file).write_text(source.replace(before, after, 1), encoding="utf-8")


# Edits that cannot change an output of `all_wide`, by what they are an example of.
WITHOUT_EFFECT = {
    "error text": ("m2d/options.py", "is not a whole number", "must be a whole number"),
    "error text of a stage": ("m2d/models/widths.py", "raise UserError(", 'raise UserError("!"'),
    "log text": ("m2d/distill/run.py", "going on from", "continuing from"),
    "progress text": ("m2d/students/merge.py", '"writing, tensors"', '"tensors written"'),
    "help text": ("m2d/students/merge.py", 'help="the folder to write"', 'help="where to"'),
    "type": ("m2d/students/merge.py", "out: str | Path", "out: Path"),
    "docstring": ("m2d/distill/trainer.py", '"""Distillation by', '"""Training by'),
    "comment": ("m2d/distill/loss.py", "# Logits of one chunk", "# One chunk's logits"),
    "another scoring": (
        SCORING,
        "def conditional_probability(",
        '@SCORINGS.method("NEW", "anything")\ndef new(layer):\n    return reap(layer)\n\n\n'
        "def conditional_probability(",
    ),
    "another divergence": (
        "m2d/distill/divergences.py",
        '@DIVERGENCES.method("reverse KL"',
        '@DIVERGENCES.method("none", "nothing")\ndef none(z, t):\n    return 0 * z.sum(), 0 * z\n'
        '\n\n@DIVERGENCES.method("reverse KL"',
    ),
    "a divergence that no recipe has": ("m2d/distill/divergences.py", "loss = 0.5 *", "loss = 2 *"),
    "another family": (
        "m2d/models/families.py",
        "FAMILIES = {",
        'NEW = Family("new", "new", "New", "e", "k", "i")\nFAMILIES = {',
    ),
    "a sibling of another family": (
        "m2d/models/families.py",
        '"qwen2_moe": "qwen2"',
        '"qwen2_moe": "llama"',
    ),
    "a strategy that no recipe has": ("m2d/distill/trainer.py", '"stage": 3', '"stage": 1'),
    "an option that no recipe has": (
        "m2d/distill/settings.py",
        "    seed: Seed = 0",
        "    ema: NotNegative | None = None\n    seed: Seed = 0",
    ),
    "a setting's description": ("m2d/distill/settings.py", "Peak of the schedule", "The peak"),
    "words of a method that no student has": (SCORING, "whose outputs together best", "that best"),
    "the launcher": ("workflow/scripts/launch.sh", "#!/bin/", "#!/usr/bin/env -S /bin/"),
}


DISTILLED = [f"distill_student recipe=short student={s}" for s in ("do-acp", "sf")]


AFTER_DISTILLATION = [
    *DISTILLED,
    *(use for s in ("do-acp", "sf") for use in uses_of(s) if use.endswith("short")),
    *TABLES,
]


GRIDS = ("conditional_prob", "gld_reap", "reap", "selection_freq")


# Edits that can, and the jobs that they repeat.
WITH_EFFECT = {
    "the divergence": (
        ("m2d/distill/divergences.py", "log_q.exp_().sub_(p)", "log_q.exp_().sub_(2 * p)"),
        AFTER_DISTILLATION,
    ),
    "the optimizer": (
        ("m2d/distill/optimizers.py", "(0.9, 0.999)", "(0.9, 0.99)"),
        AFTER_DISTILLATION,
    ),
    "a default": (
        ("m2d/distill/settings.py", "weight_decay: NotNegative = 0.0", "weight_decay: Share = 0.1"),
        AFTER_DISTILLATION,
    ),
    "an option's default": (
        ("m2d/distill/run.py", "default=15.0", "default=10.0"),
        AFTER_DISTILLATION,
    ),
    "a condition": (
        ("m2d/distill/loss.py", "LARGEST_CHUNK = 256", "LARGEST_CHUNK = 1"),
        AFTER_DISTILLATION,
    ),
    "words of a card": ((SCORING, "their router probability where selected, t", "T"), TABLES[2:]),
    "a grouping": (
        ("m2d/choose/grouping.py", "argsort(-importance[kept]", "argsort(importance[kept]"),
        [
            *(f"measure_grid scoring={s}" for s in GRIDS),
            "merge_student student=do-acp",
            "distill_student recipe=short student=do-acp",
            *uses_of("do-acp"),
            *TABLES,
        ],
    ),
}


def test_edits_without_effect_rerun_nothing(project: Path) -> None:
    for edit in WITHOUT_EFFECT.values():
        edited(project, *edit)
    config = yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))
    write_config(project, {**config, "launcher": "my-launcher --now"})
    assert jobs_of(snakemake(project, "--dry-run", "all_wide").stdout) == []


@pytest.mark.parametrize("kind", WITH_EFFECT)
def test_edits_with_effect_rerun_what_they_concern(project: Path, run: Callable, kind: str) -> None:
    edit, jobs = WITH_EFFECT[kind]
    edited(project, *edit)
    assert run("--dry-run") == sorted(jobs)


def test_equal_ranking_reruns_nothing_further(project: Path, run: Callable) -> None:
    edit_function(project / SCORING, "selection_freq", same_ranking)
    assert run() == ["rank_experts scoring=selection_freq"]
    assert run() == []


def test_changed_ranking_reruns_what_uses_it(project: Path, run: Callable) -> None:
    edit_function(project / SCORING, "selection_freq", other_ranking)
    assert run() == sorted(
        [
            "rank_experts scoring=selection_freq",
            "measure_grid scoring=selection_freq",
            "merge_student student=sf",
            "distill_student recipe=short student=sf",
            *uses_of("sf"),
            *TABLES,
        ]
    )
    assert run() == []


def test_learning_rate_reruns_distillation_alone(project: Path, run: Callable) -> None:
    change_config(project, "recipes", "short", learning_rate=0.002)
    assert run() == sorted(AFTER_DISTILLATION)


def test_ranking_and_learning_rate_in_one_run(project: Path, run: Callable) -> None:
    """A job waits until it is known whether what it reads will change."""
    edit_function(project / SCORING, "selection_freq", other_ranking)
    edit_function(project / SCORING, "gld_reap", same_ranking)
    change_config(project, "recipes", "short", learning_rate=0.002)
    jobs = run()
    assert "merge_student student=sf" in jobs
    assert "merge_student student=do-acp" not in jobs
    assert jobs.count("distill_student recipe=short student=sf") == 1
    assert run() == []


def test_shared_helper_concerns_every_method_that_calls_it(project: Path, run: Callable) -> None:
    edit_function(project / SCORING, "conditional_probability", same_ranking)
    assert run("--dry-run") == [
        f"rank_experts scoring={name}" for name in ("conditional_prob", "gld_reap", "reap")
    ]


def test_forced_rankings_rerun_nothing_further(run: Callable) -> None:
    jobs = run("--forcerun", "rank_experts")
    assert [job.split()[0] for job in jobs] == ["rank_experts"] * 4


def test_broken_scoring_method_costs_its_ranking_only(
    project: Path, stub: Path, run: Callable
) -> None:
    """A method that fails removes its ranking; mended, it re-runs nothing further."""
    source = (project / SCORING).read_text(encoding="utf-8")
    edit_function(project / SCORING, "selection_freq", lambda value: f"return {value} / None")
    failed = snakemake(project, "all_wide", stub=stub, check=False)
    assert failed.returncode == 1
    assert not (project / "results/tiny/rankings/selection_freq.json").exists()
    (project / SCORING).write_text(source, encoding="utf-8")
    assert run() == ["rank_experts scoring=selection_freq"]


def test_stage_edit_reruns_that_stage_and_what_follows(project: Path, run: Callable) -> None:
    edit_function(project / "m2d/models/student.py", "student_width", same_ranking)
    jobs = run("--dry-run")
    assert {"merge_student student=sf", "measure_grid scoring=reap", *TABLES} <= set(jobs)
    assert not [job for job in jobs if job.split()[0].startswith(("compute", "rank", "make_tok"))]


def test_a_task_added_to_an_evaluation_is_scored_alone(project: Path, run: Callable) -> None:
    change_config(project, "evaluations", "demo", tasks=["demo_continuation", "demo_package"])
    models = [f"student={s} variant={v}" for s in ("do-acp", "sf") for v in ("merged", "short")]
    expected = [f"evaluate_student_demo_package {model}" for model in models]
    assert run() == sorted([*expected, "evaluate_teacher_demo_package", *TABLES])
    kept = project / "results/tiny/students/sf/short.eval"
    assert {file.stem for file in kept.iterdir()} == {"demo_continuation", "demo_package"}


def test_edited_published_figures_and_cards_remake_those_alone(
    project: Path, run: Callable
) -> None:
    edits = {
        "report/published_results.csv": ("63.1", "63.2"),
        "students/card.py": ("How", "Just how"),
    }
    for name, (before, after) in edits.items():
        file = project / "m2d" / name
        file.write_text(file.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    assert run() == ["make_tables pipeline=all_wide", "write_cards pipeline=all_wide"]
