"""Processes that share a node's GPUs take one each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m2d.errors import UserError
from m2d.gpus import take_gpu

HOLD = """
import os, sys
from m2d.gpus import take_gpu
take_gpu(sys.argv[1])
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("LOCAL_RANK"), flush=True)
sys.stdin.readline()
"""


def start(folder: Path, command: str, **variables: str) -> subprocess.Popen[str]:
    """A process that takes a GPU and holds it until its input ends."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, command],
        env={**kept, "TMPDIR": str(folder), "M2D_SHARED_GPUS": "2", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def seen(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_each_process_takes_a_free_gpu(tmp_path: Path) -> None:
    first = start(tmp_path, "stats")
    assert seen(first) == ["0", "None"]
    second = start(tmp_path, "distill", LOCAL_RANK="1")
    assert seen(second) == ["1", "0"]
    third = start(tmp_path, "grid")
    assert "all GPUs are taken by other jobs" in third.communicate()[1]
    first.communicate()
    fourth = start(tmp_path, "grid")
    assert seen(fourth) == ["0", "None"]
    for process in (second, fourth):
        process.communicate()


def test_commands_without_gpus_take_none(tmp_path: Path) -> None:
    process = start(tmp_path, "merge")
    assert seen(process) == ["None", "None"]
    process.communicate()


def test_a_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2D_SHARED_GPUS", "yes")
    with pytest.raises(UserError, match="M2D_SHARED_GPUS=yes: must be the number"):
        take_gpu("stats")
