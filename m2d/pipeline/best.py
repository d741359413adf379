"""The best configuration of grid files, for students that are chosen by their perplexity.

Used by the Snakefile, so nothing here imports torch.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from m2d.artifacts import finite, reading
from m2d.errors import UserError
from m2d.sealed import noted_tokens, read_rows, require_same_tokens

AXES = ("scoring", "grouping", "scaling", "keep")


def best_configuration(grids: Iterable[str | Path], **where: str | int) -> dict[str, Any]:
    """The axes' values of the row with the lowest perplexity, of those with the values `where`.

    Among equals the one that stands first. Raises UserError where no file has such a row, or the
    grids were measured on different tokens.
    """
    grids = list(grids)
    require_same_tokens({str(grid): _tokens(grid, _version(grid)) for grid in grids})
    rows = [
        row
        for grid in grids
        for row in _rows(grid, _version(grid))
        if all(row[axis] == value for axis, value in where.items())
    ]
    if not rows:
        wanted = ", ".join(f"{axis} {value}" for axis, value in where.items())
        names = ", ".join(map(str, grids))
        raise UserError(
            f"{names}: no row with a finite perplexity has {wanted}; run m2d grid with it"
        )
    best = min(rows, key=lambda row: row["perplexity"])
    return {axis: best[axis] for axis in AXES}


def _version(grid: str | Path) -> int:
    """The file's time of modification: one that was written again is read again."""
    try:
        return Path(grid).stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{grid}: not readable as a grid ({error})") from None


@cache
def _tokens(grid: str | Path, version: int) -> str | None:
    """What the grid notes of its tokens; read once, like its rows."""
    return noted_tokens(grid)


@cache
def _rows(grid: str | Path, version: int) -> list[dict[str, Any]]:
    """The rows of a grid; read once, since a workflow asks thousands of times while it plans."""
    with reading(grid, "readable as a grid"):
        wanted = (*AXES, "perplexity")
        rows = [{key: row[key] for key in wanted} for row in read_rows(grid)]
        # None stands for a student that gave no number, which is never the best.
        rows = [row for row in rows if row["perplexity"] is not None]
        for row in rows:
            finite(row["perplexity"], "a perplexity")
        return rows
