"""`m2d estimate`: the sums by hand, and the workflow's own jobs."""

import json
from pathlib import Path

import pytest
from test_needs import SMALL
from workflow_project import REPOSITORY

from m2d.cli import main
from m2d.pipeline.estimate import Job, as_text, jobs_of, plan_of

DRY_RUN = """
Building DAG of jobs...
[Mon Jan  1 00:00:00 2024]
checkpoint rank_experts:
    input: a, b
    output: results/small/rankings/reap.json
    jobid: 3
    wildcards: teacher=small, scoring=reap
    resources: tmpdir=/tmp, runtime=10, mem_mb=2000, mem=2 GB, mem_mib=1908
[Mon Jan  1 00:00:00 2024]
localrule all_small:
    input: results/tables/all_small
    jobid: 0
"""


@pytest.fixture
def config(tmp_path: Path) -> dict:
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    return {
        "hardware": {"flops": 1000.0, "utilization": 0.5, "disk_gb_per_second": 1e-6,
                     "gpu_memory_gb": 4},
        "teachers": {
            "small": {
                "model": "owner/small",
                "sizes": str(tmp_path / "small.json"),
                "dtype": "bfloat16",
                "keeps": [2, 4],
                "tokens": {
                    "calibration": {"sequences": 2, "length": 5},
                    "test": {"sequences": 2, "length": 5},
                    "distillation": {"sequences": 2, "length": 10},
                },
            }
        },
        "grid": {"groupings": ["a"], "scalings": ["u"]},
        "students": {},
        "recipes": {"short": {"steps": 3, "batch": 8, "device_batch": 2, "gpus": 4}},
        "evaluations": {"quiz": {"tasks": ["quiz"], "shots": 0, "tokens": 7, "together": False}},
        "pipelines": {"all_small": {}},
    }  # fmt: skip


def job(rule: str, **names: str) -> Job:
    return Job(rule, {"teacher": "small", **names}, 3000, 20)


def test_jobs_of_a_dry_run() -> None:
    rank, target = jobs_of(DRY_RUN)
    assert rank == Job("rank_experts", {"teacher": "small", "scoring": "reap"}, 2000, 10)
    assert target.rule == "all_small"


def test_sums_by_hand(config: dict) -> None:
    jobs = [
        *jobs_of(DRY_RUN),
        job("distill_student", student="x", recipe="short"),
        job("distill_student", student="y", recipe="short"),
        job("evaluate_teacher_quiz"),
        Job("make_tables", {"pipeline": "all_small"}, 4000, 10),
    ]
    plan = plan_of("all_small", jobs, config)
    rows = {row.rule: row for row in plan.rows}
    assert set(rows) == {"rank_experts", "distill_student", "evaluate_teacher_quiz", "make_tables"}
    distil = rows["distill_student"]
    assert (distil.jobs, distil.gpus, distil.tokens) == (2, 4, 2 * 240)
    # 240 tokens x (2 x 600 + 6 x 590) at 4 x 1000 x 0.5 a second; 2000 + 2 x 1180 bytes at 1000.
    seconds = 240 * 4740 / 2000 + (2000 + 2 * 1180) / 1000
    assert distil.longest_hours == pytest.approx(seconds / 3600)
    assert distil.gpu_hours == pytest.approx(2 * 4 * seconds / 3600)
    assert distil.disk_gb == pytest.approx(2 * 1180e-9)
    assert distil.scratch_gb == pytest.approx(2 * 14 * 590e-9)
    quiz = rows["evaluate_teacher_quiz"]
    assert quiz.tokens == 7
    assert quiz.gpu_hours == pytest.approx((2 * 600 * 7 / 500 + 2000 / 1000) / 3600)
    assert rows["rank_experts"].longest_hours == pytest.approx(10 / 60)
    assert rows["rank_experts"].gpu_hours == 0
    assert rows["make_tables"].memory_gb == 4
    totals = plan.totals()
    assert totals["jobs"] == 5
    assert totals["gpu_hours"] == pytest.approx(distil.gpu_hours + quiz.gpu_hours)
    assert totals["tokens"] == 487
    assert totals["disk_gb"] == pytest.approx((2 * 1180 + 28 * 590) * 1e-9)
    assert totals["downloads_gb"] == pytest.approx(2000e-9)
    # 7 GB of a distillation's fixed part alone are more than the 4 GB of this GPU.
    assert "distill_student: 5 GB on a GPU is more than gpu_memory_gb = 4" in as_text(plan, config)


def test_a_pipeline_of_the_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    command = ["plan", "all_headline", "--all", "--json", "--flops", "1e15", "--utilization", "0.5"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    rules = facts["rules"]
    assert facts["hardware"]["flops"] == 1e15
    headline = rules["distill_student"]
    tokens = 5086 * 384 * 2048
    assert headline["tokens"] == headline["jobs"] * tokens == 4 * tokens
    assert rules["evaluate_student_mmlu"]["jobs"] == rules["measure_student"]["jobs"]
    assert facts["total"]["jobs"] == sum(rule["jobs"] for rule in rules.values())
    # Three students of 3.34B from the MoE, of which a token takes 3.35B; one from the dense model.
    passes = 3 * (2 * 3_353_032_704 + 8 * 3_340_449_792) + 2 * 32_762_123_264 + 8 * 3_441_113_088
    assert headline["gpu_hours"] == pytest.approx(tokens * passes / 5e14 / 3600, rel=0.01)


def test_unknown_target_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["estimate", "all_hedline"]) == 2
    error = capsys.readouterr().err
    assert "m2d estimate: error: all_hedline: snakemake --dry-run failed" in error
    assert "No rule to produce all_hedline" in error
    assert error.count("\n") == 1
    assert main(["estimate", ""]) == 2
    assert "the target is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("flops", "nan"), ("flops", "inf"), ("flops", "0"), ("utilization", "1e400"),
     ("utilization", "1.5"), ("utilization", "-1")],
)  # fmt: skip
def test_speeds_that_cannot_be_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "all_demo", f"--{option}", value])
    assert stop.value.code == 2
    assert f"argument --{option}: '{value}' is" in capsys.readouterr().err


def test_from_any_folder_with_a_config_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "all_mine"]) == 2
    assert "config.yaml: no such file" in capsys.readouterr().err
    (tmp_path / "my config.yaml").write_text(
        "teachers: {t: {model: openai/gpt-oss-20b}}\n"
        "pipelines: {all_mine: {teachers: [t], students: ['{sf,cp}-k{top_k}']}}\n"
    )
    assert main(["estimate", "all_mine", "--config", "my config.yaml", "--json"]) == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    assert rules["merge_student"]["jobs"] == 2
    assert rules["compute_gram"]["gpus"] == 1
