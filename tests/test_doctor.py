"""What m2d will use, and what a target would lack."""

import json
from pathlib import Path
from typing import Any

import pytest

from m2d import doctor
from m2d.cli import main
from m2d.pipeline.estimate import Plan, Row
from m2d.pipeline.settings import load_config

CONFIG = Path(__file__).parents[1] / "config.yaml"
GPU = {"device": "cuda:0", "memory_gb": 85.0}
ROWS = [
    Row("distill_student", 2, gpus=8, disk_gb=20, scratch_gb=80, memory_gb=60, gpu_memory_gb=70)
]


def found(**changes: Any) -> dict[str, Any]:
    facts = {
        "devices": [GPU] * 8 + [{"device": "cpu", "memory_gb": 64.0}],
        "disk_free_gb": 101.0,
        "hub": {"free_gb": 62.0, "offline": False},
        "slurm": None,
        "optional": dict.fromkeys(doctor.OPTIONAL, "1.0"),
    }
    return {**facts, **changes}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, []),
        ({"devices": [GPU, {"device": "cpu", "memory_gb": 64.0}]}, ["GPUs"]),
        ({"devices": [{"device": "cpu", "memory_gb": 59.0}]}, ["GPUs", "memory"]),
        ({"devices": [{"device": "cpu", "memory_gb": 59.0}], "slurm": "slurm 24"}, []),
        ({"disk_free_gb": 99.0}, ["disk"]),
        ({"hub": {"free_gb": 60.0, "offline": False}}, ["disk of the hub's cache"]),
        ({"hub": {"free_gb": 62.0, "offline": True}}, ["the hub"]),
        ({"optional": {**dict.fromkeys(doctor.OPTIONAL), "vllm": "1"}}, ["deepspeed"]),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], what: list[str]) -> None:
    plan = Plan("all_headline", ROWS, downloads_gb=61.0)
    missing = doctor.lacks(plan, load_config(CONFIG), found(**changes))
    assert [lack.what for lack in missing] == what


def test_facts_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    cpu = facts["devices"][-1]
    assert cpu["device"] == "cpu"
    assert 0 < cpu["free_gb"] <= cpu["memory_gb"]
    fast = cpu["gflops"]["bfloat16"] > cpu["gflops"]["float32"] / 10
    assert fast or cpu["bfloat16_checkpoints_in"] == "float32"
    assert main(["doctor"]) == 0
    assert "bfloat16 checkpoints are computed in" in capsys.readouterr().out
