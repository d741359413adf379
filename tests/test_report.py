"""The HTML report: one file, captions, nothing to fetch, no console errors."""

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import synthetic_run as run

from m2d.plots.style import save
from m2d.stages.figures import FIGURES, make_figures
from m2d.stages.tables import TABLES, make_tables, write_table

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
# Said by Snakemake's own page, on every report.
HARMLESS = ("cdn.tailwindcss.com should not be used in production", "input spec uses Vega-Lite")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OFFLINE = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
OFFLINE += " --disable-background-networking --disable-component-update"


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


def test_it_opens_without_console_errors(report: Path, tmp_path: Path) -> None:
    """In a browser, where one is installed; the other tests hold everywhere."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        return
    for page in (report, report.parent / "made" / "tables" / "grid.html"):
        command = [browser, *OFFLINE.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom"]
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert [line for line in console if not any(words in line for words in HARMLESS)] == []
        # The page was drawn by its script, not only delivered.
        drawn = "350 of 350 rows" if page.name == "grid.html" else '<div id="app"><div'
        assert drawn in done.stdout
