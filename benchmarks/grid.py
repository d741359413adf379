"""The grid of the demo teacher against converting, loading and scoring each student separately."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from common import report

from m2d.choose.scoring import SCORINGS

SAMPLED = (("gld_reap", "round_robin", "uniform", 4), ("reap", "output_cluster", "uniform", 16))
CONFIGURATIONS = 350


def run(*words: object) -> float:
    """Wall seconds of one m2d command."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "m2d.cli", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="workflow/resources/demo-teacher")
    parser.add_argument(
        "--results", type=Path, default=Path("results/demo"), help="of a finished `make demo`"
    )
    args = parser.parse_args()
    inputs = {
        "--statistics": args.results / "statistics.parquet",
        "--gram": args.results / "gram.safetensors",
    }
    options = [word for pair in inputs.items() for word in pair]
    tokens = args.results / "tokens" / "test.safetensors"
    with tempfile.TemporaryDirectory() as scratch:
        grid, rows, distinct = 0.0, 0, 0
        for scoring in SCORINGS.paper:
            out = Path(scratch) / f"{scoring}.parquet"
            ranking = ["--ranking", args.results / "rankings" / f"{scoring}.json"]
            keeps = ["--keeps", "4,8,16,24,32"]
            grid += run("grid", args.teacher, out, *options, *ranking, "--tokens", tokens, *keeps)
            plans = pq.read_table(out).column("plan").to_pylist()
            rows, distinct = rows + len(plans), distinct + len(set(plans))
        assert rows == CONFIGURATIONS
        separate = []
        for i, (scoring, grouping, scaling, keep) in enumerate(SAMPLED):
            student = Path(scratch) / f"student-{i}"
            ranking = ["--ranking", args.results / "rankings" / f"{scoring}.json"]
            choice = ["--grouping", grouping, "--scaling", scaling, "--keep", keep]
            seconds = run("merge", args.teacher, student, *options, *ranking, *choice)
            separate.append(seconds + run("perplexity", student, "--tokens", tokens))
    each = sum(separate) / len(separate)
    report(
        "separate conversions / grid",
        CONFIGURATIONS * each / grid,
        ">= 20",
        f"{len(SCORINGS.paper)} `m2d grid` jobs one after the other, start-up included, against "
        f"`m2d merge` and `m2d perplexity` of {len(SAMPLED)} sampled configurations, scaled to 350",
        grid_seconds=round(grid, 1),
        seconds_each=round(each, 2),
        distinct_students=distinct,
    )


if __name__ == "__main__":
    main()
