"""The workflow itself: one complete run on a tiny teacher, and what re-runs after which edit.

The complete run is real throughout. Tests of scheduling start from a copy of its results and put a
stub in the place of every stage but ranking: which jobs run is the question there.
"""

import ast
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM
from workflow_project import (
    environment,
    jobs_of,
    make_project,
    make_stub,
    snakemake,
    write_config,
)

# The runs share one finished project: keep them in one process under pytest-xdist.
pytestmark = [pytest.mark.xdist_group("workflow"), pytest.mark.timeout(1200)]

SCORING = "m2d/choose/scoring.py"
NOTHING = "Nothing to be done"
TABLES = [f"{rule} pipeline=all_wide" for rule in ("draw_figures", "make_tables", "write_cards")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_text: Path) -> Path:
    """A project with `all_tiny` complete, by the real stages."""
    folder = make_project(tmp_path_factory.mktemp("workflow") / "p", tiny_teacher, tiny_text)
    snakemake(folder, "all_tiny", forked=True)
    return folder


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stub(tmp_path_factory.mktemp("stub") / "bin")


@pytest.fixture(scope="module")
def wide(finished: Path, stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy where `all_wide` is complete too, with real rankings and stubs for the rest."""
    folder = tmp_path_factory.mktemp("wide") / "p"
    shutil.copytree(finished, folder)
    snakemake(folder, "all_wide", stub=stub)
    return folder


@pytest.fixture
def project(wide: Path, tmp_path: Path) -> Path:
    """A copy of the complete project, for one test to edit."""
    return Path(shutil.copytree(wide, tmp_path / "p"))


@pytest.fixture
def run(project: Path, stub: Path) -> Callable[..., list[str]]:
    """Run `all_wide` in the project with the stub; returns the jobs that ran."""
    return lambda *options: jobs_of(snakemake(project, "all_wide", *options, stub=stub).stdout)


def edit_function(file: Path, name: str, change: Callable[[str], str]) -> None:
    """Replace a top-level function's `return X` by `change("X")`."""
    source = file.read_text(encoding="utf-8")
    function = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    assert isinstance(function, ast.FunctionDef)
    last = function.body[-1]
    assert isinstance(last, ast.Return)
    assert last.value is not None
    lines = source.splitlines(keepends=True)
    start, end = last.lineno - 1, last.end_lineno
    lines[start:end] = [f"    {change(ast.unparse(last.value))}\n"]
    file.write_text("".join(lines), encoding="utf-8")


def same_ranking(value: str) -> str:
    return f"result = {value}\n    return result"


def other_ranking(value: str) -> str:
    return f"result = {value}\n    return Ranking(result.order[::-1].copy(), result.importance)"


def change_config(project: Path, section: str, name: str, **values: object) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))
    config[section][name] |= values
    write_config(project, config)


def uses_of(student: str) -> list[str]:
    """The jobs on a student that exists already, merged and distilled."""
    return [
        f"{rule} student={student} variant={variant}"
        for rule in ("evaluate_student_demo_continuation", "measure_student")
        for variant in ("merged", "short")
    ]


def test_complete_run(finished: Path) -> None:
    results = finished / "results"
    grid = pd.read_parquet(results / "tiny/grid/gld_reap.parquet")
    assert len(grid) == 4  # 2 groupings x 1 scaling x 2 values of K
    assert (grid["perplexity"] > 1).all()
    for name in ("merged", "short"):
        model = results / "tiny/students/do-acp" / name
        assert {"config.json", "model.safetensors", "plan.json", "m2d.json"} <= {
            file.name for file in model.iterdir()
        }
        assert model.with_suffix(".perplexity.json").is_file()
        assert (model.with_suffix(".eval") / "demo_continuation.json").is_file()
    assert (results / "tables/all_tiny/grid.csv").is_file()
    assert list((results / "figures/all_tiny").glob("*.svg"))
    assert (results / "logs/rank_experts/tiny/gld_reap.log").is_file()
    assert (results / "benchmarks/measure_grid/tiny/gld_reap.tsv").is_file()
    assert not list(results.rglob("*.partial"))


def test_every_student_has_a_card_with_its_scores(finished: Path) -> None:
    students = finished / "results/tiny/students/do-acp"
    for variant, words in (("merged", "not trained further"), ("short", "then distilled")):
        card = (students / variant / "README.md").read_text(encoding="utf-8")
        copy = finished / f"results/cards/all_tiny/tiny.do-acp.{variant}.md"
        assert copy.read_text(encoding="utf-8") == card
        result = json.loads((students / f"{variant}.perplexity.json").read_text(encoding="utf-8"))
        assert f"| perplexity (248 tokens of test text) | {result['perplexity']:.4g} ± " in card
        assert "| demo_continuation, 0-shot, acc_norm |" in card
        assert "text.txt: 8 sequences of 32 tokens" in card
        assert words in card


def test_grid_and_students_agree(finished: Path) -> None:
    """The grid's in-memory student and the written one have one perplexity."""
    grid = pd.read_parquet(finished / "results/tiny/grid/gld_reap.parquet")
    row = grid[(grid["grouping"] == "round_robin") & (grid["keep"] == 4)].iloc[0]
    file = finished / "results/tiny/students/do-acp/merged.perplexity.json"
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert written["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)


def test_shared_statistics_are_those_of_one_job(finished: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(finished, tmp_path / "p"))
    files = [f"results/tiny/{name}" for name in ("statistics.parquet", "gram.safetensors")]
    change_config(project, "teachers", "tiny", batch=4)
    assert len(jobs_of(snakemake(project, *files).stdout)) == 2
    alone = [(project / file).read_bytes() for file in files]
    change_config(project, "teachers", "tiny", shares=2)
    jobs = jobs_of(snakemake(project, "--forcerun", "combine_statistics", "--", *files).stdout)
    assert "compute_share kind=gram share=2 shares=2" in jobs
    assert len(jobs) == 6
    assert [(project / file).read_bytes() for file in files] == alone
    assert not (project / "results/tiny/shares").exists()  # temporary


def test_second_run_does_nothing(finished: Path) -> None:
    assert NOTHING in snakemake(finished, "--dry-run", "all_tiny").stdout


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
            *(
                f"measure_grid scoring={s}"
                for s in ("conditional_prob", "gld_reap", "reap", "selection_freq")
            ),
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
    assert run() == sorted(
        [
            *(f"distill_student recipe=short student={s}" for s in ("do-acp", "sf")),
            *(use for s in ("do-acp", "sf") for use in uses_of(s) if use.endswith("short")),
            *TABLES,
        ]
    )


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


def test_best_students_follow_the_grid(project: Path, stub: Path) -> None:
    """Chosen by perplexity within the run; a new grid re-makes those whose choice it changes."""
    jobs = jobs_of(snakemake(project, "all_best", stub=stub).stdout)
    students = [f"best-gld_reap-{name}" for name in ("round_robin", "weight_cluster")]
    for student in students:
        assert f"merge_student student={student}" in jobs
        assert f"distill_student recipe=short student={student}" in jobs
    assert not [job for job in jobs if job.startswith(("measure_grid", "rank_experts"))]
    assert NOTHING in snakemake(project, "--dry-run", "all_best").stdout
    file = project / "results/tiny/grid/gld_reap.parquet"
    grid = pd.read_parquet(file)
    of_rr = grid["grouping"] == "round_robin"
    worst = grid[of_rr]["perplexity"].idxmax()
    assert grid.loc[worst, "perplexity"] > grid[of_rr]["perplexity"].min()
    grid.loc[worst, "perplexity"] = 1.0
    grid.to_parquet(file)
    jobs = jobs_of(snakemake(project, "all_best", stub=stub).stdout)
    assert f"merge_student student={students[0]}" in jobs
    assert f"distill_student recipe=short student={students[0]}" in jobs
    assert not [job for job in jobs if students[1] in job]


def test_a_student_of_several_grids(
    project: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scoring, too, is known only once they are measured, in the run that then makes it."""
    frequency, reap = (
        project / f"results/tiny/grid/{n}.parquet" for n in ("selection_freq", "gld_reap")
    )
    measured = pd.read_parquet(reap)
    shutil.copyfile(reap, tmp_path / "grid.parquet")
    monkeypatch.setenv("M2D_STUB_GRID", str(tmp_path / "grid.parquet"))
    frequency.unlink()
    told = snakemake(project, "all_top", "--printshellcmds", stub=stub).stdout
    assert {"measure_grid scoring=selection_freq", "merge_student student=top"} <= set(
        jobs_of(told)
    )
    assert "--ranking results/tiny/rankings/gld_reap.json" in told.partition("m2d merge")[2]
    assert NOTHING in snakemake(project, "--dry-run", "all_top").stdout
    better = measured.assign(scoring="selection_freq", perplexity=measured["perplexity"] / 2)
    better.to_parquet(frequency)
    told = snakemake(project, "all_top", "--printshellcmds", stub=stub).stdout
    assert "--ranking results/tiny/rankings/selection_freq.json" in told.partition("m2d merge")[2]
    assert "distill_student recipe=short student=top" in jobs_of(told)


def test_teacher_logits_are_stored_once_for_all_students(finished: Path, tmp_path: Path) -> None:
    """By the real stages: two jobs share them, and an edited recipe leaves them as they are."""
    folder = Path(shutil.copytree(finished, tmp_path / "p"))
    jobs = jobs_of(snakemake(folder, "all_stored", forked=True).stdout)
    store = [f"store_teacher_logits logits=top-8 part={part} parts=2" for part in (1, 2)]
    distill = [f"distill_student recipe=stored student={name}" for name in ("do-acp", "sf")]
    assert {*store, *distill, "clear_teacher_logits logits=top-8"} <= set(jobs)
    for name in ("do-acp", "sf"):
        record = folder / f"results/tiny/students/{name}/stored/m2d.json"
        assert json.loads(record.read_text())["distillation"]["teacher_logits"]["size"] == 8
    assert NOTHING in snakemake(folder, "--dry-run", "all_stored").stdout
    change_config(folder, "recipes", "stored", learning_rate=0.002)
    jobs = jobs_of(snakemake(folder, "--dry-run", "all_stored").stdout)
    assert set(distill) <= set(jobs)
    assert not [job for job in jobs if "logits=" in job]
    # Other tokens: what is there is cleared away first, which the stage itself would refuse.
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["teachers"]["tiny"]["tokens"]["distillation"]["sequences"] = 12
    write_config(folder, config)
    jobs = jobs_of(snakemake(folder, "all_stored", forked=True).stdout)
    assert {*store, *distill, "clear_teacher_logits logits=top-8"} <= set(jobs)


def test_refit_lies_between_merging_and_distilling(project: Path, stub: Path) -> None:
    jobs = jobs_of(snakemake(project, "all_solved", stub=stub).stdout)
    assert {
        "measure_neurons neurons=greedy-width-24",
        "merge_neurons student=neurons",
        "refit_student student=neurons",
        "measure_student student=neurons variant=refit",
    } <= set(jobs)
    assert "merge_student student=neurons" not in jobs
    student = project / "results/tiny/students/solved"
    for name in ("merged", "refit", "short"):
        assert (student / name / "m2d.json").is_file()
        assert f"measure_student student=solved variant={name}" in jobs
    assert NOTHING in snakemake(project, "--dry-run", "all_solved").stdout
    change_config(project, "students", "solved", refit="sequential")
    jobs = jobs_of(snakemake(project, "--dry-run", "all_solved", stub=stub).stdout)
    assert {"refit_student student=solved", "distill_student recipe=short student=solved"} <= set(
        jobs
    )
    assert "merge_student student=solved" not in jobs
    change_config(project, "students", "neurons", width=32)
    jobs = jobs_of(snakemake(project, "--dry-run", "all_solved", stub=stub).stdout)
    assert "measure_neurons neurons=greedy-width-32" in jobs


def test_fold_and_align_are_jobs_of_their_own(project: Path, stub: Path) -> None:
    """Changing the alignment repeats neither statistics, the choice nor the fold."""
    jobs = jobs_of(snakemake(project, "all_aligned", stub=stub).stdout)
    assert {
        "fold_teacher fold=neuron",
        "measure_neurons neurons=greedy-width-24-fold-neuron",
        "merge_neurons student=aligned",
        "refit_student student=aligned",
        "align_student student=aligned",
        "distill_student recipe=short student=aligned",
        "measure_student student=aligned variant=align",
    } <= set(jobs)
    change_config(project, "students", "aligned", align=5)
    jobs = jobs_of(snakemake(project, "--dry-run", "all_aligned", stub=stub).stdout)
    assert {"align_student student=aligned", "distill_student recipe=short student=aligned"} <= set(
        jobs
    )
    others = ("fold", "merge", "refit", "compute", "rank", "measure_grid", "measure_n", "make_tok")
    assert not [job for job in jobs if job.startswith(others)]
    change_config(project, "pipelines", "all_aligned", students=["folded"])
    jobs = jobs_of(snakemake(project, "--dry-run", "all_aligned", stub=stub).stdout)
    assert {
        "fold_teacher fold=layer",
        "compute_folded_gram fold=layer",
        "rank_folded_experts fold=layer scoring=gld_reap",
        "merge_student student=folded",
    } <= set(jobs)


def test_baselines_are_made_and_distilled_like_any_student(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "p"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    dense = {**config["teachers"]["tiny"], "model": "dense"}
    config["teachers"]["tiny-dense"] = {
        key: value for key, value in dense.items() if key not in ("experts", "top_k", "keeps")
    }
    sizes = {"layers": 1, "hidden_size": 24, "heads": 2, "kv_heads": 2, "intermediate_size": 20}
    config["students"] |= {"fresh": {"baseline": "random_ffn"}, "d2d": {"baseline": "d2d", **sizes}}
    config["pipelines"]["all_baselines"] = {
        "teachers": ["tiny", "tiny-dense"],
        "students": ["do-acp"],
        "distill": [{"student": name, "recipe": "short"} for name in ("do-acp", "fresh", "d2d")],
    }
    write_config(folder, config)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(**settings, eos_token_id=0)).save_pretrained(folder / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "teacher" / file, folder / "dense" / file)

    jobs = jobs_of(snakemake(folder, "all_baselines", forked=True).stdout)
    assert [job for job in jobs if job.startswith(("merge", "prune", "initialise", "distill"))] == [
        "distill_student recipe=short student=d2d teacher=tiny-dense",
        "distill_student recipe=short student=fresh",
        "initialise_student student=fresh",
        "prune_student student=d2d teacher=tiny-dense",
    ]
    assert not any(job.startswith("compute") for job in jobs)
    table = pd.read_parquet(folder / "results" / "tables" / "all_baselines" / "students.parquet")
    rows = table[table["student"].notna()]
    assert set(zip(rows["teacher"], rows["student"], rows["variant"], strict=True)) == {
        (teacher, student, variant)
        for teacher, student, first in (
            ("tiny", "do-acp", "merged"),
            ("tiny", "fresh", "initial"),
            ("tiny-dense", "d2d", "pruned"),
        )
        for variant in (first, "short")
    }
    assert rows["perplexity"].notna().all()
    assert NOTHING in snakemake(folder, "all_baselines").stdout


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


def test_evaluation_settings_reach_the_command(project: Path) -> None:
    settings = {"backend": "vllm", "datasets": {"allenai/winogrande": "data/my winogrande"}}
    settings |= {"model_args": {"tensor_parallel_size": 4, "quantization": "fp8"}}
    settings |= {"tasks": ["winogrande", "arc_easy"], "together": True, "demo": False, "limit": 9}
    change_config(project, "evaluations", "demo", **settings)
    output = snakemake(project, "--dry-run", "--printshellcmds", "all_wide").stdout
    command = next(line for line in output.splitlines() if "m2d evaluate teacher" in line)
    words = shlex.split(command)
    assert words[2:4] == ["teacher", "results/tiny/teacher.eval"]
    pairs = list(zip(words[4:-2:2], words[5:-2:2], strict=False))
    assert pairs == [
        ("--task", "winogrande"),
        ("--task", "arc_easy"),
        ("--shots", "0"),
        ("--limit", "9"),
        ("--batch-size", "8"),
        ("--backend", "vllm"),
        ("--dataset", "allenai/winogrande=data/my winogrande"),
        ("--model-arg", "tensor_parallel_size=4"),
        ("--model-arg", "quantization=fp8"),
        ("--dtype", "float32"),
    ]


def test_killed_run_resumes(project: Path, stub: Path, run: Callable) -> None:
    edit_function(project / SCORING, "selection_freq", other_ranking)
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "all_wide"],
        cwd=project,
        env={**environment(project, stub), "M2D_STUB_SLEEP": "3"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = project / ".snakemake" / "incomplete"
    wait_until(lambda: any(started.rglob("*")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    locked = snakemake(project, "all_wide", stub=stub, check=False)
    assert locked.returncode == 1
    assert "--unlock" in locked.stdout
    snakemake(project, "--unlock")
    jobs = run()
    assert "rank_experts scoring=selection_freq" in jobs
    assert "make_tables pipeline=all_wide" in jobs
    assert run() == []


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_bad_config_is_one_line(project: Path) -> None:
    change_config(project, "recipes", "short", learning_rat=0.002)
    done = snakemake(project, "--dry-run", "all_wide", check=False)
    assert done.returncode == 1
    assert "recipes.short: unknown key 'learning_rat'; did you mean learning_rate?" in done.stdout
    assert "Traceback" not in done.stdout


def test_statistics_are_shared_between_folders(
    tmp_path: Path, tiny_teacher: Path, tiny_text: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The between-workflow cache: a second results folder computes no statistics."""
    folder = make_project(tmp_path / "p", tiny_teacher, tiny_text)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(tmp_path / "cache"))

    def files_in(results: str, stub: Path) -> list[Path]:
        files = [f"{results}/tiny/statistics.parquet", f"{results}/tiny/gram.safetensors"]
        snakemake(folder, "--cache", "--config", f"results={results}", "--", *files, stub=stub)
        return [folder / file for file in files]

    first = files_in("results", stub)
    for file in first:
        assert file.is_symlink()
    broken = make_stub(tmp_path / "broken")
    text = (broken / "m2d").read_text(encoding="utf-8")
    text = text.replace("case $1 in", "case $1 in\n    stats | gram) exit 1 ;;")
    (broken / "m2d").write_text(text, encoding="utf-8")
    second = files_in("elsewhere", broken)
    assert [f.resolve() for f in first] == [f.resolve() for f in second]
