"""docs/extending.md, followed to the letter: the code that it shows goes into the files that it
names, in a copy of the repository, and everything that lists methods knows them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Kind -> the method that the page adds.
ADDED = {
    "scoring": "probability_times_norm",
    "grouping": "output_angle",
    "scaling": "kept_weight",
    "neurons": "activation",
    "divergence": "squared_difference",
    "optimizer": "radam",
}


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with every method of the page."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("m2d", "tests", "docs", "workflow", "config.yaml", "pyproject.toml"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python (\S+)\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == len(ADDED)
    for file, code in blocks:
        with (folder / file).open("a", encoding="utf-8") as module:
            module.write(f"\n\n{code}")
    pages = sorted(str(file.relative_to(folder)) for file in (folder / "docs").glob("*.md"))
    run(folder, "-m", "m2d.methods", *pages)
    schema = folder / "workflow" / "schemas" / "config.schema.json"
    schema.write_text(run(folder, "-m", "m2d.pipeline.schema"), encoding="utf-8")
    return folder


def test_what_lists_methods_knows_them(extended: Path) -> None:
    for command, kinds in {
        "rank": ["scoring"],
        "merge": ["grouping", "scaling", "neurons"],
        "distill": ["divergence", "optimizer"],
    }.items():
        text = " ".join(run(extended, "-m", "m2d.cli", command, "--help").split())
        for kind in kinds:
            assert ADDED[kind] in text.replace("- ", "-"), kind
    schema = (extended / "workflow/schemas/config.schema.json").read_text(encoding="utf-8")
    page = (extended / "docs/method.md").read_text(encoding="utf-8")
    assert all(f'"{name}"' in schema for name in ADDED.values())
    assert all(f"| `{ADDED[kind]}` |" in page for kind in ("scoring", "grouping", "scaling"))


def test_every_test_of_methods_passes(extended: Path) -> None:
    tests = ("scoring", "grouping", "scaling", "plan", "methods", "loss", "model_card")
    run(extended, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        *(f"tests/test_{name}.py" for name in tests))  # fmt: skip
    own = "test_stages_write_the_student_of_these_neurons[activation]"
    run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider",
        f"tests/test_neuron_stage.py::{own}")  # fmt: skip
