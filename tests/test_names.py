"""Identifiers and the paper's terms."""

import pytest

from m2d.choose.names import DEFAULTS, TERMS, identifiers, resolve, term
from m2d.errors import UserError


@pytest.mark.parametrize("kind", TERMS)
def test_identifiers_and_terms_are_the_same_thing(kind):
    for identifier in identifiers(kind):
        assert resolve(kind, identifier) == identifier
        assert resolve(kind, term(kind, identifier)) == identifier
        assert resolve(kind, f" {identifier.upper().replace('_', '-')} ") == identifier
    assert DEFAULTS[kind] in identifiers(kind)


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
    assert resolve("scoring", text) == identifier


def test_unknown_names_are_refused_with_a_hint_and_the_list():
    with pytest.raises(UserError) as caught:
        resolve("scoring", "gld_reep")
    message = str(caught.value)
    assert message.startswith("unknown scoring 'gld_reep'; did you mean gld_reap? known: ")
    assert "gld_reap (DO-ACP)" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="unknown grouping 'SF'"):
        resolve("grouping", "SF")
    with pytest.raises(UserError) as caught:
        resolve("scaling", "xyz")
    assert str(caught.value) == (
        "unknown scaling 'xyz'; known: uniform, proportional, least_squares"
    )
