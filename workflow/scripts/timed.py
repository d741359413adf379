"""timed.py FILE COMMAND...: runs a command, and writes its seconds and memory as a benchmark file.

For rules whose results may come from a cache: Snakemake allows them no `benchmark`.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

file, *command = sys.argv[1:]
start = time.monotonic()
status = subprocess.call(command)
if status == 0:
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(f"s\tmax_rss\n{seconds:.4f}\t{memory:.2f}\n", encoding="utf-8")
sys.exit(status if status >= 0 else 128 - status)
