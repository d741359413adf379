"""The workflow itself: one complete run on a tiny teacher, and every kind of pipeline.

The complete run is real throughout. Tests of scheduling start from a copy of its results and put a
stub in the place of every stage but ranking: which jobs run is the question there.
"""

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
    NOTHING,
    SCORING,
    change_config,
    edit_function,
    environment,
    jobs_of,
    make_project,
    make_stub,
    other_ranking,
    snakemake,
    write_config,
)

pytestmark = pytest.mark.timeout(1200)


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
