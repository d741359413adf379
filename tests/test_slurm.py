"""The workflow on a real Slurm: `make test-slurm` (deselected otherwise: it takes minutes).

The profile is the repository's own; what is overridden is the test cluster's: names of partitions,
no accounting, and shorter waits.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, missing_programs, slurm_cluster
from workflow_project import (
    CONFIG,
    TABLES,
    edit_function,
    environment,
    jobs_of,
    make_project,
    make_stub,
    other_ranking,
    write_config,
)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing_programs()), reason=f"without {missing_programs()}"),
]

OVERRIDES = [
    "--slurm-status-command", "squeue",
    "--slurm-init-seconds-before-status-checks", "3",
    "--seconds-between-status-checks", "2",
    "--latency-wait", "5",
    "--slurm-keep-successful-logs",
    "--slurm-no-account",
]  # fmt: skip
SCORING = "m2d/choose/scoring.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster() as started:
        yield started


def slurm_config() -> dict:
    """The tests' small config, as `all_demo`: one GPU for jobs on the teacher, two to distil."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["teachers"]["tiny"]["resources"] = {"gpus": 1, "mem_mb": 1500, "runtime": 5}
    config["recipes"]["short"] |= {"gpus": 2, "device_batch": 2, "strategy": "ddp"}
    config["pipelines"] = {
        "all_demo": {
            "teachers": ["tiny"],
            "scorings": ["SF", "DO-ACP"],
            "distill": [{"student": "do-acp", "recipe": "short"}],
        }
    }
    return config


def start(
    cluster: Cluster, folder: Path, *arguments: str, stub: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """`snakemake --profile profiles/slurm`, its output in snakemake.log, in its own session."""
    variables = {**cluster.environment, **environment(folder, stub), **variables}
    # The cluster's srun stands first, then the stub, then this environment's programs.
    variables["PATH"] = f"{cluster.folder / 'bin'}{os.pathsep}{variables['PATH']}"
    with (folder / "snakemake.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", *OVERRIDES,
             *arguments],
            cwd=folder, env=variables, stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip


def run(
    cluster: Cluster, folder: Path, *arguments: str, code: int = 0, stub: Path | None = None
) -> str:
    """The same to its end; returns what it printed."""
    process = start(cluster, folder, *arguments, stub=stub)
    try:
        process.wait(1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
    output = (folder / "snakemake.log").read_text(encoding="utf-8")
    assert process.returncode == code, output
    return output


def slurm_jobs(cluster: Cluster) -> list[dict[str, str]]:
    """Every job that Slurm remembers, with the fields of scontrol; `rule` from its comment."""
    found = []
    for line in cluster.run("scontrol", "show", "jobs", "--oneliner").splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        comment = re.search(r"Comment=(?:rule_|group_)?(\S+)", line)
        found.append({**fields, "rule": comment[1] if comment else ""})
    return found


@pytest.fixture(scope="module")
def finished(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_text: Path
) -> Path:
    """A project with `all_demo` complete, by the real stages on the real Slurm."""
    folder = make_project(tmp_path_factory.mktemp("slurm") / "p", tiny_teacher, tiny_text)
    write_config(folder, slurm_config())
    run(cluster, folder, "all_demo")
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the complete project, for one test to change."""
    return Path(shutil.copytree(finished, tmp_path / "p", symlinks=True))


def of_project(cluster: Cluster, folder: Path, rule: str) -> list[dict[str, str]]:
    """The Slurm jobs of one rule that were submitted from a project, in order."""
    own = [j for j in slurm_jobs(cluster) if j["WorkDir"] == str(folder)]
    return sorted((j for j in own if j["rule"].startswith(rule)), key=lambda job: int(job["JobId"]))


def test_jobs_are_where_they_belong(cluster: Cluster, finished: Path) -> None:
    """Partition and GPUs by rule; rankings share one job."""
    expected = {
        "make_tokens": ("cpu", None, 3),
        "compute_statistics": ("gpu", "gres:gpu:1", 1),
        "compute_gram": ("gpu", "gres:gpu:1", 1),
        "measure_grid": ("gpu", "gres:gpu:1", 2),
        "merge_student": ("cpu", None, 1),
        "distill_student": ("gpu", "gres:gpu:2", 1),
        "measure_student": ("gpu", "gres:gpu:1", 2),
    }
    for rule, (partition, gpus, number) in expected.items():
        jobs = of_project(cluster, finished, rule)
        assert len(jobs) == number, rule
        for job in jobs:
            assert job["JobState"] == "COMPLETED"
            assert (job["Partition"], job.get("TresPerJob")) == (partition, gpus)
    assert len(of_project(cluster, finished, "rank")) == 1
    assert (finished / "results/tables/all_demo/grid.csv").is_file()
    log = (finished / "results/logs/distill_student/tiny/do-acp/short.log").read_text()
    assert "2 processes" in log


def test_second_run_does_nothing(cluster: Cluster, finished: Path) -> None:
    assert "Nothing to be done" in run(cluster, finished, "--dry-run", "all_demo")


def test_distillation_on_two_nodes(cluster: Cluster, project: Path) -> None:
    """One torchrun on each node, through srun; the number of GPUs repeats nothing by itself."""
    config = slurm_config()
    config["hardware"] = {"gpus_per_node": 1, "max_nodes": 2}
    write_config(project, config)
    assert "Nothing to be done" in run(cluster, project, "--dry-run", "all_demo")
    distilled = "results/tiny/students/do-acp/short"
    shutil.rmtree(project / distilled)
    run(cluster, project, "--", distilled)
    (job,) = of_project(cluster, project, "distill_student")
    assert (job["JobState"], job["NumNodes"]) == ("COMPLETED", "2")
    assert job["TresPerNode"] == "gres:gpu:1"
    log = (project / "results/logs/distill_student/tiny/do-acp/short.log").read_text()
    assert "2 processes" in log
    assert (project / distilled / "model.safetensors").is_file()


TROUBLE = """#!/bin/sh
case $1 in
    distill) echo "out of luck" >&2; exit 1 ;;
    grid) echo attempt >> attempts; test "$(wc -l < attempts)" -gt 1 || sleep 300; exit 1 ;;
esac
"""


def test_failing_and_timed_out_jobs_are_retried_then_reported(
    cluster: Cluster, project: Path
) -> None:
    config = slurm_config()
    config["teachers"]["tiny"]["resources"]["runtime"] = 1
    write_config(project, config)
    stub = project / "bin"
    stub.mkdir()
    (stub / "m2d").write_text(TROUBLE, encoding="utf-8")
    (stub / "torchrun").write_text('#!/bin/sh\necho "out of luck" >&2\nexit 1\n', encoding="utf-8")
    for program in stub.iterdir():
        program.chmod(0o755)
    distilled = "results/tiny/students/do-acp/short"
    grid = "results/tiny/grid/selection_freq.parquet"
    output = run(
        cluster, project, "--retries", "1", "--forcerun", distilled, grid, "--", distilled, grid,
        code=1, stub=stub,
    )  # fmt: skip
    failed = of_project(cluster, project, "distill_student")
    assert [job["JobState"] for job in failed] == ["FAILED"] * 2
    timed = of_project(cluster, project, "measure_grid")
    assert [job["JobState"] for job in timed] == ["TIMEOUT", "FAILED"]
    assert [job["TimeLimit"] for job in timed] == ["00:01:00", "00:02:00"]
    assert [job["MinMemoryNode"] for job in timed] == ["1500M", "3000M"]
    assert "out of luck" in output
    assert "Error in rule distill_student" in output
    assert "Error in rule measure_grid" in output or "Error in checkpoint measure_grid" in output
    assert "TIMEOUT" in output
    assert not (project / distilled).exists()


def test_killed_snakemake_resumes(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    stub = make_stub(tmp_path / "stub")
    change = ["--forcerun", "measure_student", "--", "all_demo"]
    process = start(cluster, project, *change, stub=stub, M2D_STUB_SLEEP="60")
    try:
        end = time.monotonic() + 300
        while not any(
            job["JobState"] == "RUNNING" for job in of_project(cluster, project, "measure_student")
        ):
            assert time.monotonic() < end, (project / "snakemake.log").read_text()
            time.sleep(1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # Its Slurm jobs live on; the docs say to cancel them.
    cluster.run("scancel", "--user", "root")
    locked = run(cluster, project, "all_demo", code=1, stub=stub)
    assert "--unlock" in locked
    run(cluster, project, "--unlock", "all_demo")
    jobs = jobs_of(run(cluster, project, "all_demo", stub=stub))
    assert {"measure_student student=do-acp variant=merged"} <= set(jobs)
    assert "Nothing to be done" in run(cluster, project, "--dry-run", "all_demo", stub=stub)


def test_edited_scoring_method_reruns_its_descendants(
    cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    stub = make_stub(tmp_path / "stub")
    edit_function(project / SCORING, "selection_freq", other_ranking)
    jobs = jobs_of(run(cluster, project, "all_demo", stub=stub))
    assert jobs == sorted(
        [
            "measure_grid scoring=selection_freq",
            "rank_experts scoring=selection_freq",
            # Cards have no part in it: no student of this pipeline is made by that method.
            *(job.replace("all_wide", "all_demo") for job in TABLES if "cards" not in job),
        ]
    )
