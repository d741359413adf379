"""workflow/scripts: launch.sh, with echoes in place of the programs it starts, and timed.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from workflow_project import REPOSITORY

from m2d.report.results import read_benchmarks

LAUNCH = REPOSITORY / "workflow" / "scripts" / "launch.sh"
SIGNALS = "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 280"

SCONTROL = """#!/bin/sh
test "$*" = "show hostnames node[7-8]" && echo node7 && echo node8
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """m2d, torchrun and srun that say how they were called; squeue and scontrol know two nodes."""
    for name in ("m2d", "torchrun", "srun"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho {name} "$@" $SLURM_NNODES\n', encoding="utf-8"
        )
    (tmp_path / "scontrol").write_text(SCONTROL, encoding="utf-8")
    (tmp_path / "squeue").write_text('#!/bin/sh\necho "node[7-8]"\n', encoding="utf-8")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    return tmp_path


def launched(programs: Path, *arguments: str, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        [LAUNCH, *arguments, "distill", "student", "--tokens", "a b"],
        env={**kept, **variables, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("processes", ["0", "1"])
def test_one_process(programs: Path, processes: str) -> None:
    assert launched(programs, "1", processes, "60") == "m2d distill student --tokens a b"


def test_one_node(programs: Path) -> None:
    assert launched(programs, "1", "4", "60") == (
        f"torchrun {SIGNALS} --standalone --nproc-per-node 4 -m m2d.cli "
        "distill student --tokens a b"
    )


def test_several_nodes_meet_on_the_first(programs: Path) -> None:
    slurm = {"SLURM_JOB_ID": "40003", "SLURM_NNODES": "1"}
    assert launched(programs, "2", "8", "1440", **slurm) == (
        "srun --jobid 40003 --overlap --nodes 2 --ntasks 2 --ntasks-per-node 1 --gres gpu:8 "
        "--kill-on-bad-exit "
        f"torchrun {SIGNALS} --nnodes 2 --nproc-per-node 8 --rdzv-id 40003 --rdzv-backend c10d "
        "--rdzv-endpoint node7:20003 -m m2d.cli distill student --tokens a b --stop-after 1430"
    )


def test_a_queue_stops_before_its_time_is_up(programs: Path) -> None:
    out = launched(programs, "1", "1", "60", SLURM_JOB_ID="1")
    assert out == "m2d distill student --tokens a b --stop-after 50"
    # Too short to stop early: it would end before it has begun.
    assert "stop" not in launched(programs, "1", "1", "20", SLURM_JOB_ID="1")


def test_timed_writes_a_benchmark_of_what_succeeded(tmp_path: Path) -> None:
    def timed(name: str, program: str) -> int:
        file = tmp_path / "logs" / "compute_gram" / f"{name}.log"
        script = REPOSITORY / "workflow" / "scripts" / "timed.py"
        return subprocess.call([sys.executable, script, file, sys.executable, "-c", program])

    assert timed("demo", "import time; x = bytearray(200_000_000); time.sleep(0.3)") == 0
    assert timed("failed", "raise SystemExit(3)") == 3
    assert timed("killed", "import os; os.kill(os.getpid(), 9)") == 128 + 9
    (row,) = read_benchmarks(tmp_path / "benchmarks").to_dict("records")
    assert (row["rule"], row["job"]) == ("compute_gram", "demo")
    assert 0.3 <= row["seconds"] < 30
    assert 200_000_000 / 2**20 <= row["max_rss_mb"] < 1000
