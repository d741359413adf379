"""The logger plugin: one line a job, how many of how many, the time left; a failed log."""

import re
import subprocess
import sys
from pathlib import Path

from workflow_project import REPOSITORY, environment

SNAKEFILE = """
rule all:
    input: expand("o{i}.txt", i=range(3)), "bad.txt"
rule one:
    output: "o{i}.txt"
    shell: "touch {output}"
rule bad:
    input: expand("o{i}.txt", i=range(3))
    output: "bad.txt"
    log: "bad.log"
    shell: "echo the reason >{log}; false"
"""


def test_one_line_a_job(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--logger", "m2d"],
        cwd=tmp_path,
        env=environment(REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.match(rf"\[{number}/5\] one \d +[0-9.]+ (s|min)   about .* left$", line), line
    assert "FAILED bad\n  bad.log:\n    the reason\n" in done.stderr
