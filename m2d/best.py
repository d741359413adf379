"""The best configuration of a grid file, for students that are chosen by their perplexity.

Used by the Snakefile, so nothing here imports torch.
"""

from functools import cache
from pathlib import Path
from typing import Any

from m2d.errors import UserError


def best_configuration(grid: str | Path, grouping: str) -> dict[str, Any]:
    """{"keep", "scaling"} of the row of `grouping` with the lowest perplexity.

    Among equals the one that stands first. Raises UserError where the file has no such row.
    """
    try:
        version = Path(grid).stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{grid}: not readable as a grid ({error})") from None
    rows = [row for row in _rows(grid, version) if row["grouping"] == grouping]
    if not rows:
        raise UserError(f"{grid}: has no row of grouping {grouping}; run m2d grid with it")
    best = min(rows, key=lambda row: row["perplexity"])
    return {"keep": best["keep"], "scaling": best["scaling"]}


@cache
def _rows(grid: str | Path, version: int) -> list[dict[str, Any]]:
    """The rows of a grid; read once, since a workflow asks thousands of times while it plans.

    `version` is the file's time of modification: a file that was written again is read again.
    """
    import pyarrow
    import pyarrow.parquet as pq

    columns = ["grouping", "scaling", "keep", "perplexity"]
    try:
        return pq.read_table(grid, columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{grid}: not readable as a grid ({error})") from None
