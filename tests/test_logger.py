"""The logger plugin: one line a job, how many of how many, the time left; a failed log."""

import re
import subprocess
import sys
from pathlib import Path

from workflow_project import REPOSITORY, environment

from snakemake_logger_plugin_m2d import at_once, work_left

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


def test_time_left_is_by_rule() -> None:
    """Two grids of four took 40 s each, the corpus 10 s; of the distillation nothing is known."""
    counts = {"grid": 4, "corpus": 1, "distill": 1}
    seconds = {"corpus": [10.0], "grid": [40.0, 40.0]}
    assert work_left(counts, seconds) == 2 * 40 + 30
    assert at_once(seconds, 45.0) == 2.0
    assert at_once(seconds, 500.0) == 1.0  # waited for something else
