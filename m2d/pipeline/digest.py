"""Digests of code: what a rule's result depends on, from the source alone.

Snakemake does not see edits to imported modules, so every rule carries the digest of exactly the
definitions that its stage reaches. They are found in the syntax tree: nothing is imported, and
neither comments, docstrings, layout nor the help texts of options count.

A definition is a top-level function, class or assignment of a module of the package. It reaches
the definitions that it names, in its own module or through imports. The tables of methods are cut
open: only the chosen methods of SCORINGS, GROUPINGS and SCALINGS are reached, so that an edit to
one scoring method concerns that method alone.
"""

import ast
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
TABLES = {"SCORINGS": "scoring", "GROUPINGS": "grouping", "SCALINGS": "scaling"}
# Wording, names and progress: an edit there changes no number, and must not repeat a distillation.
# Only where one is the entry itself does it count.
WITHOUT_EFFECT = frozenset(
    {"m2d.errors", "m2d.progress", "m2d.choose.names", "m2d.students.card", "m2d"}
)
WORDING = frozenset({"help", "metavar", "description"})  # of argparse options


class Statement:
    """A top-level statement; what is asked of it is worked out once, for all digests."""

    def __init__(self, node: ast.stmt):
        self.node = node

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of its tree."""
        return list(ast.walk(self.node))

    @cached_property
    def text(self) -> str:
        """What it says, without comments, docstrings and layout."""
        return "" if _is_text(self.node) else repr(_shape(self.node))

    @cached_property
    def chains(self) -> list[list[str]]:
        """The dotted names in it, each the longest: ["a", "b"] for a.b."""
        inner = {id(item.value) for item in self.nodes if isinstance(item, ast.Attribute)}
        chains = [_dotted(item) for item in self.nodes if id(item) not in inner]
        return [list(names) for names in dict.fromkeys(tuple(c) for c in chains if c)]


@dataclass
class Module:
    """The top level of one source file."""

    definitions: dict[str, list[Statement]] = field(default_factory=dict)
    """Name -> the statements that bind it."""
    imports: dict[str, str] = field(default_factory=dict)
    """Local name -> dotted name, such as "m2d.artifacts.write_json"; of this package only, and
    wherever in the file: a name means one thing in it."""
    loose: list[Statement] = field(default_factory=list)
    """Statements that bind nothing, such as a call; they run on import and always count."""


def code_digest(
    entry: str, chosen: Mapping[str, Collection[str]] | None = None, package: Path = PACKAGE
) -> str:
    """Digest of all code that `entry` can run, 16 hex digits.

    `entry` is a command's module ("m2d.statistics.rank") or one function ("m2d.demo.corpus:build").
    `chosen` names the methods that it will use, by kind: {"scoring": ["reap"]}.
    """
    digest = hashlib.sha256()
    for (module, name), text in sorted(reachable(entry, chosen or {}, package).items()):
        digest.update(f"{module}\0{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def reachable(
    entry: str, chosen: Mapping[str, Collection[str]], package: Path = PACKAGE
) -> dict[tuple[str, str], str]:
    """(module, definition) -> normalised source, of all that `entry` reaches.

    Raises ValueError where the package has no such entry.
    """
    stage, _, function = entry.partition(":")
    known = load(stage, package)
    waiting = [(stage, name) for name in ([function] if function else ["main", "add_arguments"])]
    for _, name in waiting:
        if known is None or name not in known.definitions:
            raise ValueError(f"{entry}: the package has no {stage}.{name}")
    found: dict[tuple[str, str], str] = {}
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        module_name, name = key
        module = load(module_name, package)
        if module is None or (module_name in WITHOUT_EFFECT and module_name != stage):
            continue
        if name == "":
            statements = module.loose
        else:
            statements = module.definitions.get(name, [])
            waiting.append((module_name, ""))
        if name in TABLES:
            statements = [_only(item.node, chosen.get(TABLES[name], ())) for item in statements]
        found[key] = "\n".join(item.text for item in statements)
        for item in statements:
            waiting += references(item, module_name, package)
    return found


@cache
def load(name: str, package: Path) -> Module | None:
    """The module with this dotted name, or None where the package has none."""
    base = package.parent.joinpath(*name.split("."))
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not file.is_file():
        return None
    module = Module()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names, statement = _bound(node), Statement(node)
        module.imports |= imported(statement, name, package)
        for bound in names:
            module.definitions.setdefault(bound, []).append(statement)
        if not names and not isinstance(node, ast.Import | ast.ImportFrom):
            module.loose.append(statement)
    return module


def imported(statement: Statement, module: str, package: Path) -> dict[str, str]:
    """Local name -> dotted name, of every import of this package in a statement."""
    names = {}
    for item in statement.nodes:
        if isinstance(item, ast.Import):
            for alias in item.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(item, ast.ImportFrom):
            source = item.module or ""
            if item.level:
                is_package = package.parent.joinpath(*module.split("."), "__init__.py").is_file()
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - item.level + 1]
                source = ".".join([*parents, *([source] if source else [])])
            for alias in item.names:
                names[alias.asname or alias.name] = f"{source}.{alias.name}"
    return {k: v for k, v in names.items() if v.split(".")[0] == package.name}


@cache
def references(statement: Statement, module_name: str, package: Path) -> list[tuple[str, str]]:
    """The definitions that a statement of a module names, as (module, definition)."""
    module = load(module_name, package)
    found: list[tuple[str, str]] = []
    assert module is not None
    for first, *rest in statement.chains:
        if first in module.imports:
            found += _located([*module.imports[first].split("."), *rest], package)
        elif first in module.definitions:
            found.append((module_name, first))
    return found


def _located(parts: list[str], package: Path) -> Iterator[tuple[str, str]]:
    """The definition that a dotted name means; a module's every definition if it is a module."""
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        module = load(name, package)
        if module is None:
            continue
        if length == len(parts):
            # A package is named for what is below it; alone it means nothing.
            if not (package.parent.joinpath(*parts) / "__init__.py").is_file():
                yield from ((name, definition) for definition in module.definitions)
            return
        attribute = parts[length]
        if attribute in module.definitions:
            yield name, attribute
        elif attribute in module.imports:
            yield from _located(
                [*module.imports[attribute].split("."), *parts[length + 1 :]], package
            )
        return


def _dotted(node: ast.AST) -> list[str] | None:
    """["a", "b"] for the expression a.b; None for anything else."""
    rest: list[str] = []
    while isinstance(node, ast.Attribute):
        rest.insert(0, node.attr)
        node = node.value
    return [node.id, *rest] if isinstance(node, ast.Name) else None


def _bound(node: ast.stmt) -> set[str]:
    """The top-level names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    names = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
            names.add(item.id)
        elif isinstance(item, ast.FunctionDef | ast.ClassDef):
            names.add(item.name)
    return names


def _only(node: ast.stmt, chosen: Collection[str]) -> Statement:
    """A table of methods with the chosen entries alone."""
    value = getattr(node, "value", None)
    if not isinstance(value, ast.Dict):
        return Statement(node)
    pairs = [
        (key, item)
        for key, item in zip(value.keys, value.values, strict=True)
        if isinstance(key, ast.Constant) and key.value in chosen
    ]
    table = ast.Dict(keys=[key for key, _ in pairs], values=[item for _, item in pairs])
    assignment = ast.Assign(targets=[ast.Name("table", ast.Store())], value=table)
    return Statement(ast.fix_missing_locations(assignment))


def _shape(node: object) -> object:
    """A syntax tree as nested tuples, without what cannot change a result: docstrings, positions
    and the wording of options."""
    if isinstance(node, list):
        return tuple([_shape(item) for item in node if not _is_text(item)])
    if isinstance(node, ast.keyword) and node.arg in WORDING:
        return None
    if isinstance(node, ast.AST):
        fields = {name: getattr(node, name, None) for name in node._fields if name != "ctx"}
        # Python versions differ in the fields that they leave empty; a constant may be None itself.
        kept = {k: v for k, v in fields.items() if v != [] and (v is not None or k == "value")}
        return type(node).__name__, *((k, _shape(v)) for k, v in kept.items())
    return node


def _is_text(node: object) -> bool:
    """Whether a statement is a docstring, or one placed after an attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
