"""Identifiers of the methods and the paper's terms for them; either is accepted everywhere.

No imports beyond the standard library, so that the command line's help starts at once.
"""

import difflib

from m2d.errors import UserError

PAPER_SCORINGS = (
    "selection_freq",
    "preselect_prob",
    "postselect_prob",
    "conditional_prob",
    "reap",
    "gram_logdet",
    "gld_reap",
)
PAPER_GROUPINGS = (
    "round_robin",
    "weight_cluster",
    "router_cluster",
    "dominant_expert",
    "output_cluster",
)
PAPER_SCALINGS = ("uniform", "proportional")

TERMS: dict[str, dict[str, str]] = {
    "scoring": {
        "selection_freq": "SF",
        "preselect_prob": "PP",
        "postselect_prob": "PS",
        "conditional_prob": "CP",
        "reap": "ACP",
        "gram_logdet": "DO-CP",
        "gld_reap": "DO-ACP",
        "omp": "OMP",
    },
    "grouping": {
        "round_robin": "RR",
        "weight_cluster": "WC",
        "router_cluster": "RC",
        "dominant_expert": "AB",
        "output_cluster": "OC",
    },
    "scaling": {
        "uniform": "uniform",
        "proportional": "proportional",
        "least_squares": "least-squares",
    },
}
"""Per kind of method: identifier -> term, in the order of presentation."""

DEFAULTS = {"scoring": "gld_reap", "grouping": "round_robin", "scaling": "uniform"}


def identifiers(kind: str) -> tuple[str, ...]:
    """All identifiers of a kind (scoring, grouping or scaling), in the order of presentation."""
    return tuple(TERMS[kind])


def term(kind: str, identifier: str) -> str:
    """The paper's term of an identifier: term("scoring", "gld_reap") == "DO-ACP"."""
    return TERMS[kind][identifier]


def resolve(kind: str, text: str) -> str:
    """The identifier that a user means by `text`, an identifier or a term.

    Case does not matter, and '-', '_' and blanks are the same. Raises UserError on anything else,
    with the closest name and the list.
    """
    known = {_plain(name): identifier for identifier, name in TERMS[kind].items()}
    known |= {_plain(identifier): identifier for identifier in TERMS[kind]}
    found = known.get(_plain(text))
    if found is not None:
        return found
    close = difflib.get_close_matches(_plain(text), known, n=1)
    hint = f"did you mean {known[close[0]]}? " if close else ""
    choices = ", ".join(
        identifier if _plain(identifier) == _plain(name) else f"{identifier} ({name})"
        for identifier, name in TERMS[kind].items()
    )
    raise UserError(f"unknown {kind} {text!r}; {hint}known: {choices}")


def _plain(text: str) -> str:
    return text.strip().lower().replace("-", "_").replace(" ", "_")
