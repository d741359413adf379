"""Digests of code: what counts, what does not, and what a change reaches."""

from collections.abc import Callable
from pathlib import Path

import pytest

from m2d.choose.scoring import SCORINGS
from m2d.pipeline.digest import code_digest, load, reachable

SOURCES = {
    "__init__.py": "",
    "stage.py": '''
"""A stage."""
from toy import helpers
from toy.methods import SCORINGS
from toy.methods import unused
from .helpers import write as put

LIMIT = 3
OTHER = 4


def add_arguments(parser):
    parser.add_argument("--limit", default=LIMIT, help="how many")


def main(args):
    """Run it."""
    from toy.late import late
    put(SCORINGS[args.scoring](late()), helpers.BASE)


def bystander():
    return OTHER
''',
    "helpers.py": "BASE = 1\nREST = 2\n\n\ndef write(x, y):\n    print(x, y)\n",
    "methods.py": """
from m2d.methods import Table
from toy.shared import shared

SCORINGS: Table[object] = Table("scoring", default="first")


@SCORINGS.method("1st", "the first of them")
def first(x):
    return shared(x)


@SCORINGS.method("2nd", "the second of them")
def second(x):
    return x


def unused(x):
    return -x
""",
    "shared.py": "def shared(x):\n    return x + 1\n",
    "late.py": "import sys\n\nprint(sys.argv)\n\n\ndef late():\n    return 1\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / name).write_text(source, encoding="utf-8")
    return folder


@pytest.fixture
def digest_after(package: Path) -> Callable[..., str]:
    """Digest of the stage after replacing `old` by `new` in a file."""

    def digest(file: str = "", old: str = "", new: str = "", scoring: str = "first") -> str:
        if file:
            source = (package / file).read_text(encoding="utf-8")
            assert source.count(old) >= 1
            (package / file).write_text(source.replace(old, new), encoding="utf-8")
        load.cache_clear()
        return code_digest("toy.stage", {"scoring": [scoring]}, package)

    return digest


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", '"""Run it."""', '"""Run it well."""'),
        ("stage.py", '"""A stage."""', "# a stage"),
        ("stage.py", "LIMIT = 3", "LIMIT = 3  # three\n\n"),
        ("stage.py", '"how many"', '"how many of them"'),
        ("stage.py", "OTHER = 4", "OTHER = 5"),
        ("stage.py", "return OTHER", "return -OTHER"),
        ("stage.py", "put(SCORINGS[args.scoring](late()), helpers.BASE)",
         "put(\n        SCORINGS[args.scoring](late()),\n        helpers.BASE,\n    )"),
        ("helpers.py", "REST = 2", "REST = 3"),
        ("methods.py", "return -x", "return +x"),
        ("methods.py", "def second(x):\n    return x", "def second(x):\n    return 2 * x"),
        ("methods.py", "def unused(x)", '@SCORINGS.method("3rd", "words")\ndef unused(x)'),
        ("methods.py", "the first of them", "that which comes first"),
        ("late.py", "print(sys.argv)", "print(sys.argv)  # said"),
        ("helpers.py", "REST = 2", "REST = [x for x in (2, 3)]"),
    ],
)  # fmt: skip
def test_does_not_count(digest_after: Callable[..., str], file: str, old: str, new: str) -> None:
    assert digest_after() == digest_after(file, old, new)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", "LIMIT = 3", "LIMIT = 4"),
        ("stage.py", "helpers.BASE", "helpers.REST"),
        ("helpers.py", "BASE = 1", "BASE = 2"),
        ("helpers.py", "print(x, y)", "print(y, x)"),
        ("methods.py", "return shared(x)", "return shared(-x)"),
        ("shared.py", "x + 1", "x + 2"),
        ("late.py", "return 1", "return 2"),
        ("late.py", "print(sys.argv)", "print(sys.path)"),
    ],
)
def test_counts(digest_after: Callable[..., str], file: str, old: str, new: str) -> None:
    assert digest_after() != digest_after(file, old, new)


def test_a_constant_that_is_nothing_counts(digest_after: Callable[..., str]) -> None:
    values = ["3", "None", "''", "0", "False", "()"]
    found = [
        digest_after("stage.py", f"LIMIT = {old}", f"LIMIT = {new}")
        for old, new in zip(["3", *values], values, strict=False)
    ]
    assert len(set(found)) == len(values)


def test_chosen_method_alone(digest_after: Callable[..., str]) -> None:
    before = digest_after(scoring="second")
    assert before != digest_after(scoring="first")
    assert before == digest_after("shared.py", "x + 1", "x + 2", scoring="second")


def test_unknown_entry() -> None:
    with pytest.raises(ValueError, match=r"m2d\.statistics\.nothing"):
        code_digest("m2d.statistics.nothing")


def test_rank_reaches_its_method_and_no_other() -> None:
    names = {
        scoring: {name for _, name in reachable("m2d.statistics.rank", {"scoring": [scoring]})}
        for scoring in SCORINGS
    }
    for scoring, found in names.items():
        assert found & set(names) == {scoring}
    assert "d_optimal_order" in names["gld_reap"]
    assert "d_optimal_order" not in names["reap"]
    assert "conditional_probability" in names["reap"]


@pytest.mark.parametrize(
    "stage",
    [
        "statistics.routing",
        "statistics.gram",
        "students.grid",
        "students.merge",
        "distill.run",
        "evaluate.lm_eval",
    ],
)
def test_stages_after_ranking_do_not_reach_scoring(stage: str) -> None:
    """Or an edit to a scoring method would re-run them whatever its ranking."""
    found = reachable(f"m2d.{stage}", {"scoring": []})
    assert {name for module, name in found if module == "m2d.choose.scoring"} <= {"SCORINGS", ""}
