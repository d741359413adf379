"""A second run with nothing to do, on the full DAG with every pipeline's targets: its wall time.

No model runs: the outputs that a dry run announces are made as empty files, and `snakemake --touch`
records them as done by the jobs that would make them.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from common import report

from m2d.pipeline.settings import load_config

TARGET_SECONDS = 5.0
FILES = {".json", ".jsonl", ".parquet", ".safetensors"}
FLAG = "downloaded"  # a file, too; other outputs are folders
IN_FOLDERS = ("config.json", "m2d.json", "metrics.jsonl", "plan.json")


def snakemake(results: Path, *options: str) -> str:
    """Its output on the target `tables`, which is every pipeline."""
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--nolock"]
    command += [*options, "--config", f"results={results}", "--", "tables"]
    done = subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    return done.stdout


def make_outputs(listing: str, grid: pa.Table) -> int:
    """Make the outputs of all jobs of a dry run; returns how many jobs those are."""
    jobs = re.findall(r"^    output: (.*)$", listing, re.M)
    for outputs in jobs:
        for output in map(Path, outputs.split(", ")):
            if output.suffix not in FILES and output.name != FLAG:
                output.mkdir(parents=True, exist_ok=True)
                for name in IN_FOLDERS:
                    (output / name).write_text("{}\n")
                continue
            output.parent.mkdir(parents=True, exist_ok=True)
            if output.parent.name == "grid":
                scoring = pa.repeat(output.stem, len(grid))
                pq.write_table(grid.append_column("scoring", scoring), output)
            else:
                output.write_text("{}\n")
    return len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config = load_config("config.yaml")
    rows = [
        {"grouping": grouping, "scaling": "uniform", "keep": keep, "perplexity": 10.0}
        for grouping in config["grid"]["groupings"]
        for keep in (8, 64)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results"
        jobs = make_outputs(snakemake(results, "--dry-run"), pa.Table.from_pylist(rows))
        snakemake(results, "--touch", "--forceall")
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            told = snakemake(results)
            seconds.append(time.perf_counter() - start)
            if "Nothing to be done" not in told:
                raise RuntimeError(told[-2000:])
    report(
        "second run / 5 s",
        statistics.median(seconds) / TARGET_SECONDS,
        "<= 1",
        f"`snakemake tables` on config.yaml, {jobs} jobs of {len(config['pipelines'])} pipelines, "
        f"all outputs there and recorded; median of {args.repeats}",
        seconds=[round(value, 2) for value in seconds],
    )


if __name__ == "__main__":
    main()
