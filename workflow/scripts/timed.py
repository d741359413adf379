"""timed.py LOG COMMAND...: runs a command; its seconds and memory go to a benchmark file.

That of .../logs/RULE/JOB.log is .../benchmarks/RULE/JOB.tsv. For rules whose results may come from
a cache: Snakemake allows them no `benchmark`, and no parameter that names their folder.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

log, *command = sys.argv[1:]
before, _, job = log.rpartition("logs/")
file = Path(before, "benchmarks", job).with_suffix(".tsv")
start = time.monotonic()
status = subprocess.call(command)
if status == 0:
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"s\tmax_rss\n{seconds:.4f}\t{memory:.2f}\n", encoding="utf-8")
sys.exit(status if status >= 0 else 128 - status)
