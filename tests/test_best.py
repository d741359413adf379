"""The best configuration of a grid file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2d.best import best_configuration
from m2d.errors import UserError


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    rows = [
        {"grouping": "round_robin", "scaling": "uniform", "keep": 4, "perplexity": 9.0},
        {"grouping": "round_robin", "scaling": "proportional", "keep": 8, "perplexity": 7.0},
        {"grouping": "round_robin", "scaling": "uniform", "keep": 16, "perplexity": 7.0},
        {"grouping": "weight_cluster", "scaling": "uniform", "keep": 4, "perplexity": 5.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "grid.parquet")
    return tmp_path / "grid.parquet"


def test_lowest_perplexity_of_the_grouping(grid: Path) -> None:
    assert best_configuration(grid, "round_robin") == {"keep": 8, "scaling": "proportional"}
    assert best_configuration(grid, "weight_cluster") == {"keep": 4, "scaling": "uniform"}


def test_bad_files(grid: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row of grouping output_cluster"):
        best_configuration(grid, "output_cluster")
    (tmp_path / "text.parquet").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="not readable as a grid"):
        best_configuration(tmp_path / "text.parquet", "round_robin")
