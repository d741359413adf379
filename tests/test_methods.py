"""Identifiers and the paper's terms."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2d.choose.grouping import GROUPINGS
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS
from m2d.distill.optimizers import OPTIMIZERS
from m2d.errors import UserError
from m2d.methods import TABLES, Table, table, with_tables

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", TABLES)
def test_identifiers_and_terms_are_the_same_thing(kind):
    methods = table(kind)
    for identifier in methods:
        assert methods.resolve(identifier) == identifier
        assert methods.resolve(methods.term(identifier)) == identifier
        assert methods.resolve(f" {identifier.upper().replace('_', '-')} ") == identifier
        assert methods[identifier].__name__ == identifier
        assert methods.methods[identifier].card
        assert methods[identifier].__doc__
    assert methods.default in methods


def test_the_papers_methods():
    assert [SCORINGS.term(name) for name in SCORINGS.paper] == [
        "SF", "PP", "PS", "CP", "ACP", "DO-CP", "DO-ACP",
    ]  # fmt: skip
    assert [GROUPINGS.term(name) for name in GROUPINGS.paper] == ["RR", "WC", "RC", "AB", "OC"]
    assert SCALINGS.paper == ("uniform", "proportional")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name):
    weight = torch.tensor([3.0, -2.0], requires_grad=True)
    kind, arguments = OPTIMIZERS[name](0.01)
    assert arguments["lr"] == 0.01
    optimizer = kind([weight], **arguments)
    before = float(weight.detach().square().sum())
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert float(weight.detach().square().sum()) < before


def test_a_name_is_taken_once():
    methods: Table = Table("scoring", default="one")

    def one(layer):
        return layer

    methods.method("ONE", "words")(one)
    with pytest.raises(ValueError, match="scoring one"):
        methods.method("TWO", "words")(one)


def test_listing_the_methods_imports_no_torch():
    """The command line's help and the workflow list them."""
    code = (
        "import sys; from m2d.methods import TABLES, table; [table(kind) for kind in TABLES]; "
        "import m2d.pipeline.settings; "
        "sys.exit(', '.join({'torch', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_tables_of_the_docs_are_the_methods(page):
    """`python -m m2d.methods docs/*.md` writes them."""
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("DO-ACP", "gld_reap"),
        ("do_acp", "gld_reap"),
        ("Do Acp", "gld_reap"),
        ("GLD-REAP", "gld_reap"),
        ("acp", "reap"),
        ("SF", "selection_freq"),
        ("do-cp", "gram_logdet"),
    ],
)
def test_spelling_is_free(text, identifier):
    assert SCORINGS.resolve(text) == identifier


def test_unknown_names_are_refused_with_a_hint_and_the_list():
    with pytest.raises(UserError) as caught:
        SCORINGS.resolve("gld_reep")
    message = str(caught.value)
    assert message.startswith("unknown scoring 'gld_reep'; did you mean gld_reap? known: ")
    assert "gld_reap (DO-ACP)" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="unknown grouping 'SF'"):
        GROUPINGS.resolve("SF")
    with pytest.raises(UserError) as caught:
        SCALINGS.resolve("xyz")
    assert str(caught.value).startswith(
        "unknown scaling 'xyz'; known: uniform, proportional, least_squares"
    )
