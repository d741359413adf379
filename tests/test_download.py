"""The rule that fetches teachers: `m2d download`, whose own tests are in test_hub.py."""

import subprocess
import sys

from workflow_project import REPOSITORY


def test_teachers_of_the_hub_are_fetched_where_snakemake_runs() -> None:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", "--nolock"]
    command += ["--cores", "1", "--forcerun", "download_teacher"]
    command += ["--", "results/gpt-oss-20b/downloaded"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "env -u HF_HUB_OFFLINE m2d download openai/gpt-oss-20b" in told.stdout
