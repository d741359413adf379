"""Every benchmark in turn, one process each: one JSON line per measurement on stdout.

Some use what `make demo` leaves in results/.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from common import kind_of_cpu, scratch_folder, scratch_option

BENCHMARKS = {  # whether it takes --scratch
    "merge": True,
    "gram": False,
    "statistics_stage": True,
    "refit": True,
    "loss_memory": False,
    "distill_step": False,
    "grid": False,
    "nothing_to_do": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scratch_option(parser)
    args = parser.parse_args()
    print(f"CPU: {kind_of_cpu()}", file=sys.stderr)
    failed = []
    with scratch_folder(args.scratch) as scratch:
        for name, takes_scratch in BENCHMARKS.items():
            command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
            command += ["--scratch", str(scratch)] if takes_scratch else []
            if subprocess.run(command, check=False).returncode:
                failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
