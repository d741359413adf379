"""Digests of code: what a rule's result depends on, from the source alone.

Snakemake does not see edits to imported modules, so every rule carries the digest of exactly the
definitions that its stage reaches. They are found in the syntax tree: nothing is imported, and what
cannot change an output does not count (m2d/pipeline/effects.py).

A definition is a top-level function, class or assignment of a module of the package. It reaches
the definitions that it names, in its own module or through imports. Tables are cut open: of the
methods that declare themselves (m2d/methods.py), of the model families and of other tables in CUT,
only those that the job uses are reached, so that an edit to one method concerns that method alone.
"""

import ast
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from m2d.pipeline.effects import effective

PACKAGE = Path(__file__).parents[1]
# Tables of entries: the name of the table, to the kind that says which entries a job uses.
CUT = {
    "FAMILIES": "family",
    "SIBLINGS": "family",
    "TEXT_SIBLINGS": "family",
    "GROUPS": "strategy",
    "ZERO_STAGES": "strategy",
}
# Wording, names, progress, and settings, whose values are parameters of the rules: an edit there
# changes no number, and must not repeat a distillation. Only where one is the entry itself does it
# count.
WITHOUT_EFFECT = frozenset(
    {
        "m2d",
        "m2d.errors",
        "m2d.methods",
        "m2d.progress",
        "m2d.settings",
        "m2d.distill.settings",
        "m2d.students.card",
    }
)


class Statement:
    """A top-level statement; what is asked of it is worked out once, for all digests."""

    def __init__(self, node: ast.stmt):
        self.entry_of, self.words = _declared(node)
        self.node = effective(node)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of its tree."""
        return list(ast.walk(self.node))

    @cached_property
    def text(self) -> str:
        """What it says, without comments, docstrings and layout."""
        return "" if isinstance(self.node, ast.Pass) else repr(_shape(self.node))

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
    tables: dict[str, tuple[str, list[tuple[str, str]]]] = field(default_factory=dict)
    """Name of a table -> its kind, and per entry its identifier and the definition behind it, or
    what it says where that is a constant."""


def code_digest(
    entry: str,
    chosen: Mapping[str, Collection[str] | None] | None = None,
    package: Path = PACKAGE,
    *,
    words: bool = False,
) -> str:
    """Digest of all code that `entry` can run, 16 hex digits.

    `entry` is a command's module ("m2d.statistics.rank") or one function ("m2d.demo.corpus:build").
    `chosen` names what it will use of each table, by kind: {"scoring": ["reap"]}; of a kind that is
    not there, or None, everything counts. With `words`, methods count by the words that they
    declare for model cards and not by what they do.
    """
    digest = hashlib.sha256()
    for (module, name), text in sorted(reachable(entry, chosen or {}, package, words).items()):
        digest.update(f"{module}\0{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def reachable(
    entry: str,
    chosen: Mapping[str, Collection[str] | None],
    package: Path = PACKAGE,
    words: bool = False,
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
        if name in module.tables:
            kind, entries = module.tables[name]
            used = chosen.get(kind)
            picked = [(e, d) for e, d in entries if used is None or e in used]
            constants = {(e, d) for e, d in picked if d not in module.definitions}
            found[key] = repr(sorted((e, d if (e, d) in constants else "") for e, d in picked))
            picked = [pair for pair in picked if pair not in constants]
            if words:
                found |= {(module_name, e): module.definitions[d][0].words for e, d in picked}
            else:
                waiting += [(module_name, definition) for _, definition in picked]
            continue
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
    for bound, statements in list(module.definitions.items()):
        kind = CUT.get(bound) or _kind_of_methods(statements[0].node)
        if kind:
            module.tables[bound] = (kind, _entries(bound, statements[0], module))
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
    names: set[str] = set()
    waiting: list[ast.AST] = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
            names.add(item.id)
        elif isinstance(item, ast.FunctionDef | ast.ClassDef):
            names.add(item.name)
            continue
        # What a comprehension goes over has names of its own.
        own = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
        waiting += [] if isinstance(item, own) else ast.iter_child_nodes(item)
    return names


def _declared(node: ast.stmt) -> tuple[str, str]:
    """(table, words) of a function that declares itself, which loses the declaration; else empty.

    In @SCORINGS.method("ACP", "their router ..."), SCORINGS and the arguments.
    """
    if not isinstance(node, ast.FunctionDef):
        return "", ""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call):
            names = _dotted(decorator.func) or []
            if len(names) == 2 and names[1] == "method":
                node.decorator_list.remove(decorator)
                return names[0], repr(_shape([*decorator.args, *decorator.keywords]))
    return "", ""


def _kind_of_methods(node: ast.AST) -> str:
    """ "scoring" of SCORINGS = Table("scoring", ...); empty for anything else."""
    value = getattr(node, "value", None)
    if isinstance(value, ast.Call) and _dotted(value.func) == ["Table"] and value.args:
        first = value.args[0]
        return str(first.value) if isinstance(first, ast.Constant) else ""
    return ""


def _entries(table: str, statement: Statement, module: Module) -> list[tuple[str, str]]:
    """(identifier, definition) of a table's entries.

    They are the functions that declare themselves in it; else what a dict gives for its keys; else
    the definitions that it lists, by their keyword `model_type`.
    """
    declared = [name for name, items in module.definitions.items() if items[0].entry_of == table]
    if declared:
        return [(name, name) for name in declared]
    value = getattr(statement.node, "value", None)
    if isinstance(value, ast.Dict):
        pairs = zip(value.keys, value.values, strict=True)
        return [
            (str(key.value), names[0] if (names := _dotted(item)) else ast.unparse(item))
            for key, item in pairs
            if isinstance(key, ast.Constant) and (_dotted(item) or isinstance(item, ast.Constant))
        ]
    found = []
    for first, *_ in statement.chains:
        for definition in module.definitions.get(first, []):
            call = getattr(definition.node, "value", None)
            for keyword in call.keywords if isinstance(call, ast.Call) else ():
                if keyword.arg == "model_type" and isinstance(keyword.value, ast.Constant):
                    found.append((str(keyword.value.value), first))
    return found


def _shape(node: object) -> object:
    """A syntax tree as nested tuples, without positions."""
    if isinstance(node, list):
        return tuple([_shape(item) for item in node])
    if isinstance(node, ast.AST):
        fields = {name: getattr(node, name, None) for name in node._fields if name != "ctx"}
        # Python versions differ in the fields that they leave empty; a constant may be None itself.
        kept = {k: v for k, v in fields.items() if v != [] and (v is not None or k == "value")}
        return type(node).__name__, *((k, _shape(v)) for k, v in kept.items())
    return node
