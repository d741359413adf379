"""The HTML report: one file, captions, nothing to fetch, no console errors."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import synthetic_run as run
from browser import Page

from m2d.report.figures import FIGURES, make_figures
from m2d.report.plot_style import save
from m2d.report.tables import TABLES, make_tables, write_table

# One report for all tests: keep them in one process under pytest-xdist.

CAPTIONS = Path(run.__file__).parents[1] / "workflow" / "report"
# The rules of the real workflow mark their outputs like this.
SNAKEFILE = """
report: "report/workflow.rst"
rule all:
    input: "tables/demo", "figures/demo"
rule make_tables:
    output:
        report(directory("tables/{pipeline}"), patterns=["{table}.html"], category="Tables",
               caption="report/tables.rst", labels={"table": "{table}"})
    shell: "cp -r made/tables {output}"
rule draw_figures:
    output:
        report(directory("figures/{pipeline}"), patterns=["{figure}.svg"], category="Figures",
               caption="report/figures.rst", labels={"figure": "{figure}"})
    shell: "cp -r made/figures {output}"
"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    results = folder / "results"
    files = run.write_students(results)
    tables = make_tables(
        run.write_grid(results), files["perplexity"], files["evaluation"], files["provenance"]
    )
    for name, frame in tables.items():
        write_table(frame, name, folder / "made" / "tables")
    figures = make_figures(tables)
    for name in FIGURES:
        # What is drawn is looked at in test_figures; two of them are enough here.
        if name in ("grid_heatmap", "perplexity"):
            save(figures[name](), folder / "made" / "figures", name)
        else:
            shutil.copy(
                folder / "made" / "figures" / "grid_heatmap.svg",
                folder / "made" / "figures" / f"{name}.svg",
            )
    shutil.copytree(CAPTIONS, folder / "report")
    (folder / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")
    snakemake = [sys.executable, "-m", "snakemake", "--quiet"]
    subprocess.run([*snakemake, "--cores", "1"], cwd=folder, check=True)
    subprocess.run([*snakemake, "--report", "report.html"], cwd=folder, check=True)
    return folder / "report.html"


def tables_of(report: Path) -> list[str]:
    return [file.stem for file in (report.parent / "made" / "tables").glob("*.html")]


def test_every_table_and_figure_is_in_the_one_file_with_its_caption(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert set(TABLES) < set(tables_of(report))
    for name in tables_of(report):
        assert f"{name}.html" in text
    for name in FIGURES:
        assert f"{name}.svg" in text
    for words in (
        "Perplexity of every configuration before distillation",
        "Accuracy in every task with standard errors",
        "How much each design axis matters",
        "Wall-clock seconds and highest memory",
        "Models from one teacher, ours and published",
        "Dense students of trained Mixture-of-Experts teachers",
    ):
        assert words in unescape(text)
    assert text.count("data:text/html") == len(tables_of(report))
    assert text.count("data:image/svg+xml") >= len(FIGURES)


def test_every_table_and_figure_has_a_caption_of_its_own() -> None:
    for file, names in (("tables.rst", TABLES), ("figures.rst", FIGURES)):
        text = (CAPTIONS / file).read_text(encoding="utf-8")
        assert re.findall(r'^  "(\w+)": "', text, re.M) == list(names)


def test_nothing_is_fetched(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    outside = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?!data:)[^"]+"', text)
    assert outside == []


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        assert "M2D_NEEDS_BROWSER" not in os.environ, f"none of {', '.join(BROWSERS)} is installed"
        pytest.skip("needs Chromium; .ci/run installs it")
    with Page(browser, tmp_path / "profile") as opened:
        yield opened


def link(text: str) -> str:
    return f"[...document.querySelectorAll('a')].find(a => a.innerText.trim() === '{text}')"


def column(number: int) -> str:
    """The cells of a column, as the table orders them: numbers in full."""
    cells = f"[...document.querySelectorAll('tbody tr:not([hidden]) td:nth-child({number + 1})')]"
    return f"{cells}.map(c => c.dataset.v ?? c.textContent)"


def test_a_table_of_the_report_sorts_and_filters(report: Path, page: Page) -> None:
    """Clicked through as a reader would: category, table, column."""
    page.open(report)
    row = "[...document.querySelectorAll('tr')].find(r => r.innerText.trim() === 'grid')"
    page.click(link("Tables"), then=row)
    page.click(f"({row}).querySelector('a')", then="document.querySelector('iframe')")
    page.enter_frame()
    page.wait_for("document.getElementById('count')?.textContent === '350 of 350 rows'")
    names = page.run("[...document.querySelectorAll('th')].map(h => h.innerText.trim())")
    where = names.index("perplexity")
    before = [float(value) for value in page.run(column(where))]
    assert before != sorted(before)
    page.click(f"document.querySelectorAll('th button')[{where}]")
    assert [float(value) for value in page.run(column(where))] == sorted(before)
    page.click(f"document.querySelectorAll('th button')[{where}]")
    assert [float(value) for value in page.run(column(where))] == sorted(before, reverse=True)
    page.click("document.querySelector('input')")
    page.type("gld_reap output_cluster")
    assert page.run("document.getElementById('count').textContent") == "10 of 350 rows"
    assert set(page.run(column(names.index("grouping")))) == {"output_cluster"}
    assert page.errors == []


def test_a_figure_of_the_report_is_shown(report: Path, page: Page) -> None:
    page.open(report)
    row = "[...document.querySelectorAll('tr')].find(r => r.innerText.trim() === 'perplexity')"
    page.click(link("Figures"), then=row)
    shown = "[...document.images].some(i => i.complete && i.naturalWidth > 300)"
    page.click(f"({row}).querySelector('a')", then=shown)
    assert page.errors == []


def test_every_column_sorts(report: Path, page: Page) -> None:
    """Numbers, text, and columns with gaps, which stay at the end."""
    for name in ("students", "published", "grid_best"):
        file = report.parent / "made" / "tables" / f"{name}.html"
        page.open(file)
        page.wait_for("document.getElementById('count')?.textContent")
        for number in range(page.run("document.querySelectorAll('th').length")):
            page.run(f"document.querySelectorAll('th button')[{number}].click()")
            values = page.run(column(number))
            filled = [value for value in values if value != ""]
            assert values == filled + [""] * (len(values) - len(filled)), file.name
            try:
                assert [float(value) for value in filled] == sorted(map(float, filled)), file.name
            except ValueError:  # text, in the browser's order
                page.run(f"document.querySelectorAll('th button')[{number}].click()")
                back = [value for value in page.run(column(number)) if value != ""]
                assert back == filled[::-1], file.name
    assert page.errors == []


def test_what_the_console_complains_of_is_noticed(tmp_path: Path, page: Page) -> None:
    file = tmp_path / "page.html"
    file.write_text("<script>console.error('one'); console.warn('two'); missing()</script>")
    page.open(file)
    page.wait_for("true")
    assert len(page.errors) == 2
