"""The best configuration of a grid file."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2d.errors import UserError
from m2d.pipeline.best import best_configuration


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    rows = [
        {"grouping": "round_robin", "scaling": "uniform", "keep": 4, "perplexity": 9.0},
        {"grouping": "round_robin", "scaling": "proportional", "keep": 8, "perplexity": 7.0},
        {"grouping": "round_robin", "scaling": "uniform", "keep": 16, "perplexity": 7.0},
        {"grouping": "weight_cluster", "scaling": "uniform", "keep": 4, "perplexity": 5.0},
    ]
    return write(tmp_path / "acp.parquet", "acp", rows)


def write(file: Path, scoring: str, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist([{"scoring": scoring, **row} for row in rows]), file)
    return file


def test_lowest_perplexity_of_the_grouping(grid: Path) -> None:
    def best(grouping: str) -> dict[str, Any]:
        return best_configuration([grid], grouping=grouping)

    assert best("round_robin") == {
        "scoring": "acp", "grouping": "round_robin", "scaling": "proportional", "keep": 8
    }  # fmt: skip
    assert best("weight_cluster") == {
        "scoring": "acp", "grouping": "weight_cluster", "scaling": "uniform", "keep": 4
    }  # fmt: skip


def test_best_of_several_scorings_at_one_keep(grid: Path, tmp_path: Path) -> None:
    row = {"grouping": "round_robin", "scaling": "uniform", "keep": 8, "perplexity": 6.0}
    other = write(tmp_path / "cp.parquet", "cp", [row, {**row, "keep": 4, "perplexity": 5.5}])
    at = {keep: best_configuration([grid, other], keep=keep) for keep in (4, 8, 16)}
    assert [at[keep]["scoring"] for keep in (4, 8, 16)] == ["acp", "cp", "acp"]
    assert at[4]["grouping"] == "weight_cluster"


def test_a_grid_that_is_written_again_is_read_again(grid: Path) -> None:
    row = {"grouping": "round_robin", "scaling": "uniform", "keep": 16, "perplexity": 1.0}
    assert best_configuration([grid], grouping="round_robin")["keep"] == 8
    before = grid.stat().st_mtime_ns
    write(grid, "acp", [row])
    os.utime(grid, ns=(before + 1, before + 1))
    assert best_configuration([grid], grouping="round_robin")["keep"] == 16


def test_bad_files(grid: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row with a finite perplexity has grouping"):
        best_configuration([grid], grouping="output_cluster")
    (tmp_path / "text.parquet").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="not readable as Parquet"):
        best_configuration([tmp_path / "text.parquet"], grouping="round_robin")


def of_tokens(grid: Path, digest: str) -> Path:
    """A copy of a grid that notes which tokens it was measured on."""
    out = grid.with_name(f"{digest}.parquet")
    note = {"m2d": json.dumps({"tokens_sha256": digest})}
    pq.write_table(pq.read_table(grid).replace_schema_metadata(note), out)
    return out


def test_grids_of_different_tokens_are_not_compared(grid: Path) -> None:
    one, other = of_tokens(grid, "abc"), of_tokens(grid, "def")
    assert best_configuration([one, grid], keep=16)["scoring"] == "acp"  # earlier ones note none
    with pytest.raises(UserError, match=r"def.parquet: was measured on other tokens than .*abc"):
        best_configuration([one, grid, other], keep=16)
