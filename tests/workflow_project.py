"""A copy of the workflow and the package in a folder of its own, with a tiny config, to run there.

Not a test: those of the workflow run it. In the copy, `m2d` is the copied package, so tests may
edit its source.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
DOMAINS = ("alpha", "beta", "gamma", "delta", "epsilon")
SCORING = "m2d/choose/scoring.py"
NOTHING = "Nothing to be done"
TABLES = [f"{rule} pipeline=all_wide" for rule in ("draw_figures", "make_tables", "write_cards")]
WORDS = ("array", "vector", "matrix", "layer", "router", "expert", "token", "weight", "score")

# All the parts of a pipeline, each as small as it goes.
CONFIG: dict[str, Any] = {
    "results": "results",
    "datasets": {
        "text": {"files": ["text.txt"]},
    },
    "teachers": {
        "tiny": {
            "model": "teacher",
            "experts": 8,
            "top_k": 2,
            "keeps": [2, 4],
            "dtype": "float32",
            "batch": 8,
            "tokens": {
                "calibration": {"dataset": "text", "sequences": 8, "length": 32},
                "test": {"dataset": "text", "sequences": 8, "length": 32},
                "distillation": {"dataset": "text", "sequences": 16, "length": 32},
            },
            "resources": {"gpus": 0, "mem_mb": 1000, "runtime": 5},
        }
    },
    "grid": {"groupings": ["RR", "WC"], "scalings": ["uniform"]},
    "students": {
        "do-acp": {"scoring": "DO-ACP", "grouping": "RR", "scaling": "uniform", "keep": 4},
        "sf": {"scoring": "SF", "grouping": "WC", "scaling": "uniform", "keep": 2},
        "solved": {
            "scoring": "DO-ACP",
            "grouping": "RR",
            "scaling": "uniform",
            "keep": 2,
            "refit": "layer",
        },
        "neurons": {"neurons": "greedy", "width": 24, "refit": "layer"},
        "aligned": {
            "neurons": "greedy",
            "width": 24,
            "fold": "neuron",
            "refit": "layer",
            "align": 3,
        },
        "folded": {
            "scoring": "DO-ACP",
            "grouping": "RR",
            "scaling": "least_squares",
            "keep": 2,
            "fold": "layer",
        },
        "top": {"best_of": ["SF", "DO-ACP"], "keep": 2},
    },
    "recipes": {
        "short": {
            "steps": 2,
            "batch": 4,
            "device_batch": 4,
            "learning_rate": 0.001,
            "precision": "fp32",
            "gpus": 0,
            "mem_mb": 1000,
            "runtime": 5,
        }
    },
    "evaluations": {
        "demo": {
            "tasks": ["demo_continuation"],
            "shots": 0,
            "limit": 4,
            "batch_size": 8,
            "demo": True,
        }
    },
    "pipelines": {
        "all_tiny": {
            "teachers": ["tiny"],
            "scorings": ["DO-ACP"],
            "students": ["do-acp"],
            "distill": [{"student": "do-acp", "recipe": "short"}],
            "evaluations": ["demo"],
        },
        "all_solved": {
            "teachers": ["tiny"],
            "students": ["solved", "neurons"],
            "distill": [{"student": "solved", "recipe": "short"}],
        },
        "all_aligned": {
            "teachers": ["tiny"],
            "distill": [{"student": "aligned", "recipe": "short"}],
        },
        "all_top": {
            "teachers": ["tiny"],
            "distill": [{"student": "top", "recipe": "short"}],
        },
        "all_stored": {
            "teachers": ["tiny"],
            "distill": [
                {"student": "do-acp", "recipe": "stored"},
                {"student": "sf", "recipe": "stored"},
            ],
        },
        "all_best": {"teachers": ["tiny"], "scorings": ["DO-ACP"], "best": "short"},
        "all_wide": {
            "teachers": ["tiny"],
            "scorings": ["SF", "CP", "ACP", "DO-ACP"],
            "students": ["do-acp", "sf"],
            "distill": [
                {"student": "do-acp", "recipe": "short"},
                {"student": "sf", "recipe": "short"},
            ],
            "evaluations": ["demo"],
        },
    },
}
CONFIG["recipes"]["stored"] = {
    **CONFIG["recipes"]["short"],
    "teacher_logits": {"kind": "top", "size": 8, "parts": 2},
}
# Stands in for every stage but ranking, where a test is about which jobs run.
STUB = """#!/bin/sh
test -z "$M2D_STUB_SLEEP" || sleep "$M2D_STUB_SLEEP"
case $1 in
    rank) exec "{m2d}" "$@" ;;
    grid) if test -f "$M2D_STUB_GRID"; then cp "$M2D_STUB_GRID" "$3"; else echo "{{}}" > "$3"; fi ;;
    merge | prune | baseline) mkdir "$3"; echo "{{}}" > "$3/m2d.json" ;;
    distill | refit | align) mkdir "$4"; echo "{{}}" > "$4/m2d.json" ;;
    perplexity) echo "{{}}" > "$6" ;;
    tables | figures) mkdir "$2" ;;
    card) mkdir "$3" ;;
    teacher-logits) ;;
    *) echo "{{}}" > "$3" ;;
esac
"""


def make_project(folder: Path, teacher: Path, text: Path) -> Path:
    """The workflow in a new folder, on `teacher` and `text`, with a corpus already there."""
    skipped = shutil.ignore_patterns("__pycache__", "resources")
    for name in ("m2d", "workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=skipped)
    shutil.copytree(teacher, folder / "teacher")
    shutil.copyfile(text, folder / "text.txt")
    write_config(folder, CONFIG)
    corpus = folder / "results" / "corpus"
    corpus.mkdir(parents=True)
    for split in ("train", "calibration", "test"):
        lines = [json.dumps(document(i)) + "\n" for i in range(40)]
        (corpus / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_stub(folder: Path) -> Path:
    """A folder with an `m2d` that writes empty results at once, except for rankings."""
    folder.mkdir()
    stub = folder / "m2d"
    stub.write_text(STUB.format(m2d=Path(sys.executable).parent / "m2d"), encoding="utf-8")
    stub.chmod(0o755)
    return folder


def document(number: int) -> dict[str, str]:
    """A document of the demo corpus, long enough for its tasks."""
    words = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(80)]
    parameters = "\n\nParameters\n----------\n" + "".join(
        f"{word}{number} : int\n    The {word} of document {number}, a whole number.\n"
        for word in words[:3]
    )
    domain = DOMAINS[number % len(DOMAINS)]
    return {"domain": domain, "name": f"{domain}/{number}", "text": " ".join(words) + parameters}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def environment(folder: Path, stub: Path | None = None) -> dict[str, str]:
    """Environment in which `m2d` is the copy; `stub` is a folder that comes first on PATH."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PATH": os.pathsep.join([str(stub), *path] if stub else path),
        "HF_HUB_OFFLINE": "1",
    }


def snakemake(
    folder: Path,
    *arguments: str,
    stub: Path | None = None,
    check: bool = True,
    forked: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake there, as users do; stdout and stderr together in `stdout`.

    forked: under `m2d forkserver`, as `make demo` does: for runs of many real stages.
    """
    server = ["m2d", "forkserver"] if forked else []
    run = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", *arguments]
    done = subprocess.run(
        [*server, *run],
        cwd=folder,
        env=environment(folder, stub),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"snakemake failed ({done.returncode}):\n{done.stdout}")
    return done


def jobs_of(output: str) -> list[str]:
    """The jobs that Snakemake says it ran or would run, such as "measure_grid scoring=reap".

    Each once; targets, which run nothing, are left out.
    """
    found = []
    # Jobs of a group are indented.
    output = re.sub(r"^ {4}(?=\[| {4}|(?:local)?(?:rule|checkpoint) )", "", output, flags=re.M)
    pattern = r"^(?:local)?(?:rule|checkpoint) (\w+):\n((?:    .*\n)*)"
    for name, details in re.findall(pattern, output, re.M):
        wildcards = re.search(r"^    wildcards: (.*)$", details, re.M)
        names = [w for w in (wildcards[1].split(", ") if wildcards else []) if w != "teacher=tiny"]
        if not name.startswith("all_"):
            found.append(" ".join([name, *sorted(names)]))
    return sorted(set(found))


def change_config(project: Path, section: str, name: str, **values: object) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))
    config[section][name] |= values
    write_config(project, config)


def edit_function(file: Path, name: str, change: Callable[[str], str]) -> None:
    """Replace a top-level function's `return X` by `change("X")`."""
    source = file.read_text(encoding="utf-8")
    function = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    assert isinstance(function, ast.FunctionDef)
    last = function.body[-1]
    assert isinstance(last, ast.Return)
    assert last.value is not None
    lines = source.splitlines(keepends=True)
    start, end = last.lineno - 1, last.end_lineno
    lines[start:end] = [f"    {change(ast.unparse(last.value))}\n"]
    file.write_text("".join(lines), encoding="utf-8")


def same_ranking(value: str) -> str:
    return f"result = {value}\n    return result"


def other_ranking(value: str) -> str:
    return f"result = {value}\n    return Ranking(result.order[::-1].copy(), result.importance)"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_text: Path) -> Path:
    """A project with `all_tiny` complete, by the real stages."""
    folder = make_project(tmp_path_factory.mktemp("workflow") / "p", tiny_teacher, tiny_text)
    snakemake(folder, "all_tiny", forked=True)
    return folder


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stub(tmp_path_factory.mktemp("stub") / "bin")


@pytest.fixture(scope="session")
def wide(finished: Path, stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy where `all_wide` is complete too, with real rankings and stubs for the rest."""
    folder = tmp_path_factory.mktemp("wide") / "p"
    shutil.copytree(finished, folder)
    snakemake(folder, "all_wide", stub=stub)
    return folder


@pytest.fixture
def project(wide: Path, tmp_path: Path) -> Path:
    """A copy of the complete project, for one test to edit."""
    return Path(shutil.copytree(wide, tmp_path / "p"))


@pytest.fixture
def run(project: Path, stub: Path) -> Callable[..., list[str]]:
    """Run `all_wide` in the project with the stub; returns the jobs that ran."""
    return lambda *options: jobs_of(snakemake(project, "all_wide", *options, stub=stub).stdout)
