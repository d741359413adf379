"""Methods declare themselves where they are written; everything that lists them asks here.

    @SCORINGS.method("ACP", "their router probability where selected, times ...")
    def reap(layer): ...

enters the function `reap` into the table of scorings under its own name, with the paper's term and
the words that a model card has for it. The command line's choices, the config's schema, the tables
in docs/ (`python -m m2d.methods docs/*.md` writes them) and the tests' lists are read off these
tables. The modules that hold them import no torch, so that the command line's help and the
workflow start at once.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from m2d.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])

TABLES = {
    "scoring": "m2d.choose.scoring:SCORINGS",
    "grouping": "m2d.choose.grouping:GROUPINGS",
    "scaling": "m2d.choose.scaling:SCALINGS",
    "neurons": "m2d.choose.neuron_statistics:CHOICES",
    "divergence": "m2d.distill.divergences:DIVERGENCES",
    "optimizer": "m2d.distill.optimizers:OPTIMIZERS",
}
"""Kind of method -> the table of that kind."""


@dataclass(frozen=True)
class Method(Generic[F]):
    """One method of a table."""

    function: F
    term: str
    """What the paper calls it, or a short name of our own."""
    card: str
    """What a model card says of it, to be read after the kind's own words."""
    paper: bool
    """Whether it is the paper's."""


class Table(Mapping[str, F]):
    """The methods of one kind: identifier -> function, in the order in which they are written."""

    def __init__(self, kind: str, default: str) -> None:
        self.kind, self.default = kind, default
        self.methods: dict[str, Method[F]] = {}

    def method(self, term: str, card: str, *, paper: bool = True) -> Callable[[F], F]:
        """Decorator that enters a function under its own name; see `Method` for the arguments."""

        def enter(function: F) -> F:
            identifier = function.__name__
            taken = {_plain(text) for name, m in self.methods.items() for text in (name, m.term)}
            if taken & {_plain(identifier), _plain(term)}:
                raise ValueError(f"{self.kind} {identifier} ({term}): the name is taken")
            self.methods[identifier] = Method(function, term, card, paper)
            return function

        return enter

    def __getitem__(self, identifier: str) -> F:
        return self.methods[identifier].function

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def paper(self) -> tuple[str, ...]:
        """Identifiers of the paper's methods."""
        return tuple(name for name, method in self.methods.items() if method.paper)

    def term(self, identifier: str) -> str:
        """The paper's term of an identifier, or the identifier where it is none of ours."""
        method = self.methods.get(identifier)
        return method.term if method else identifier

    def resolve(self, text: str) -> str:
        """The identifier that a user means by `text`, an identifier or a term.

        Case does not matter, and '-', '_' and blanks are the same. Raises UserError on anything
        else, with the closest name and the list.
        """
        known = {_plain(method.term): name for name, method in self.methods.items()}
        known |= {_plain(name): name for name in self.methods}
        found = known.get(_plain(text))
        if found is not None:
            return found
        close = difflib.get_close_matches(_plain(text), known, n=1)
        hint = f"did you mean {known[close[0]]}? " if close else ""
        raise UserError(
            f"unknown {self.kind} {text[:100]!r}; {hint}known: {', '.join(self.names())}"
        )

    def names(self) -> list[str]:
        """Every identifier, with its term where that is another word: for lists in help texts."""
        return [
            name if _plain(name) == _plain(method.term) else f"{name} ({method.term})"
            for name, method in self.methods.items()
        ]

    def words(self) -> list[str]:
        """Identifiers and terms: what `resolve` takes, as usually spelt."""
        terms = [method.term for method in self.methods.values()]
        return list(dict.fromkeys([*self.methods, *terms]))

    def as_markdown(self) -> str:
        """A table for the docs: identifier, term, the first sentence of the docstring."""
        rows = ["| identifier | term | what it is |", "|---|---|---|"]
        for name, method in self.methods.items():
            summary = (method.function.__doc__ or "").split("\n\n")[0]
            summary = " ".join(summary.split()).removeprefix(f"{method.term}: ").replace("|", r"\|")
            own = "" if method.paper else " *Not the paper's.*"
            rows.append(f"| `{name}` | {method.term} | {summary}{own} |")
        return "\n".join(rows)


def table(kind: str) -> Table[Any]:
    """The methods of a kind, a key of TABLES."""
    module, name = TABLES[kind].split(":")
    found: Table[Any] = getattr(importlib.import_module(module), name)
    return found


def _plain(text: str) -> str:
    return text.strip().lower().replace("-", "_").replace(" ", "_")


def with_tables(text: str) -> str:
    """Markdown with the table of each kind between its marks: <!-- methods: scoring --> and
    <!-- end -->."""

    def renewed(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{table(match[2]).as_markdown()}\n\n<!-- end -->"

    return re.sub(r"(<!-- methods: (\w+) -->).*?<!-- end -->", renewed, text, flags=re.S)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
