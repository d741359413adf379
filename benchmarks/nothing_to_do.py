"""A second run with nothing to do: wall times after `make demo`, and of every pipeline's DAG."""

import subprocess
import sys
import time

from common import report

TARGET_SECONDS = 5.0


def main() -> None:
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local"]
    seconds = {}
    for target, more in (("all_demo", []), ("tables", ["--dry-run"])):
        start = time.perf_counter()
        subprocess.run([*command, target, *more], check=True, capture_output=True)
        seconds[target] = round(time.perf_counter() - start, 2)
    report(
        "second run / 5 s",
        max(seconds.values()) / TARGET_SECONDS,
        "<= 1",
        "`snakemake all_demo` when all is there, and a dry run of `tables`, every pipeline's DAG",
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
