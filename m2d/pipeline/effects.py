"""A syntax tree without what cannot change a job's output.

Dropped are comments and layout (which no tree has), docstrings, annotations, what is only told to
the user (log lines, progress titles, help texts, choices, the words of an error and what a block
does before it raises one), and values that nothing is left to read.
"""

import ast
from collections.abc import Iterable

# Functions of m2d.progress: a line for the log; a loop, with its title.
SAY, PROGRESS = "say", "progress"
# Errors that end a command with exit code 2: what leads up to one only words it.
USER_ERRORS = frozenset({"UserError", "ArgumentTypeError"})
# Keyword arguments of argparse that word an option, or say which of its values are refused.
WORDING = frozenset({"help", "metavar", "description", "choices", "epilog", "usage"})
# Functions that only make text or numbers of what they are given.
PURE = frozenset(
    {"join", "format", "strip", "removeprefix", "removesuffix", "replace", "split", "lower", "str",
     "repr", "len", "sorted", "round", "min", "max", "sum", "map", "list", "set", "get"}
)  # fmt: skip


def effective(statement: ast.stmt) -> ast.stmt:
    """The statement without what has no effect; changes the tree that it is given."""
    kept = _Effects().block([_unannotated(statement)])
    return kept[0] if kept else ast.Pass()


class _Effects(ast.NodeTransformer):
    def block(self, body: Iterable[ast.stmt]) -> list[ast.stmt]:
        """What is left of a block."""
        kept = [item for item in map(self.visit, body) if item is not None]
        last = kept[-1] if kept else None
        if isinstance(last, ast.Raise) and _name(last.exc) in USER_ERRORS:
            return [last]
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                # The annotations of a class say which names are fields.
                fields = isinstance(node, ast.ClassDef)
                setattr(node, name, self.block(value if fields else map(_unannotated, value)))
            elif isinstance(value, list):
                value[:] = [
                    self.visit(item) if isinstance(item, ast.AST) else item for item in value
                ]
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        told = isinstance(node.value, ast.Call) and _name(node.value.func) == SAY
        if told or isinstance(node.value, ast.Constant):
            return None
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.keywords = [item for item in node.keywords if item.arg not in WORDING]
        called = _name(node.func)
        if called == PROGRESS:
            node.args, node.keywords = node.args[:1], []
        elif called == "add_argument_group":
            node.args, node.keywords = [], []
        self.generic_visit(node)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise(exc=node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if _name(node.test) == "TYPE_CHECKING":
            return None
        self.generic_visit(node)
        calls = any(isinstance(item, ast.Call) for item in ast.walk(node.test))
        return node if node.body or node.orelse or calls else None

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        self.generic_visit(node)
        while _drop_unread(node):
            pass
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]


def _unannotated(node: ast.stmt) -> ast.stmt:
    """name = value for name: kind = value."""
    if isinstance(node, ast.AnnAssign) and node.value:
        return ast.Assign(targets=[node.target], value=node.value)
    return node


def _drop_unread(function: ast.FunctionDef) -> bool:
    """Drop one assignment to a name that the function does not read; whether there was one."""
    read = {
        item.id
        for item in ast.walk(function)
        if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Store)
    }
    outer = {
        name
        for item in ast.walk(function)
        if isinstance(item, ast.Global | ast.Nonlocal)
        for name in item.names
    }
    for node in ast.walk(function):
        if isinstance(node, ast.ClassDef):
            continue
        for _, body in ast.iter_fields(node):
            if not (isinstance(body, list) and body and isinstance(body[0], ast.stmt)):
                continue
            for item in body:
                target = item.targets[0] if isinstance(item, ast.Assign) else None
                if (
                    isinstance(item, ast.Assign)
                    and len(item.targets) == 1
                    and isinstance(target, ast.Name)
                    and target.id not in read | outer
                    and _is_pure(item.value)
                ):
                    body.remove(item)
                    return True
    return False


def _is_pure(value: ast.expr) -> bool:
    return all(
        _name(item.func) in PURE for item in ast.walk(value) if isinstance(item, ast.Call)
    ) and not any(
        isinstance(item, ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr)
        for item in ast.walk(value)
    )


def _name(node: ast.AST | None) -> str:
    """The last part of a dotted name; empty for anything else."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
