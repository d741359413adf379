"""What of a piece of source cannot change a job's output, and what can."""

import ast
import textwrap

import pytest

from m2d.pipeline.effects import effective

SOURCE = '''
def work(args: Args, limit: int = 3) -> Path:
    """Do it."""
    size: int = len(args.files)
    if size > limit:
        names = ", ".join(args.files)
        raise UserError(f"{size} files ({names}) are too many")
    if not args.quiet:
        say(f"going on with {size}")
    left = round(size / limit)
    say(f"{left} rounds")
    args.parser.add_argument("--dtype", choices=DTYPES, default="auto", help="the dtype")
    args.parser.add_argument_group("a student of neurons")
    assert size, "there is nothing"
    try:
        for file in progress(args.files, "files done", total=size):
            read(file)
    except OSError as error:
        raise ValueError(f"cannot read: {error}") from error
    return write(size)
'''


def shown(source: str) -> str:
    (statement,) = ast.parse(textwrap.dedent(source)).body
    return ast.dump(effective(statement))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Do it.", "Do it well."),
        ("limit: int = 3", "limit: float = 3"),
        ("-> Path", "-> str"),
        ("size: int = len", "size = len"),
        ("are too many", "are more than {limit}"),
        ('", ".join(args.files)', '" and ".join(sorted(args.files))'),
        ("going on with", "going on from"),
        ("if not args.quiet:", "if args.loud:"),
        ("round(size / limit)", "round(limit / size, 2)"),
        ("rounds", "rounds left"),
        ("choices=DTYPES", "choices=(*DTYPES, 'float64')"),
        ("the dtype", "of the student"),
        ("a student of neurons", "single neurons"),
        ("there is nothing", "nothing is there"),
        ('"files done", total=size', '"files"'),
        ("cannot read: {error}", "{error}: cannot be read"),
        ("return write(size)", "return write(size)  # done"),
    ],
)
def test_without_effect(old: str, new: str) -> None:
    assert old in SOURCE
    assert shown(SOURCE) == shown(SOURCE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("limit: int = 3", "limit: int = 4"),
        ("len(args.files)", "len(args.names)"),
        ("size > limit", "size >= limit"),
        ("raise UserError", "raise OtherError"),
        ('default="auto"', 'default="float32"'),
        ('"--dtype"', '"--type"'),
        ("progress(args.files", "progress(args.names"),
        ("read(file)", "read(file, file)"),
        ("except OSError", "except RuntimeError"),
        ("raise ValueError", "raise KeyError"),
        ("assert size", "assert limit"),
        ("return write(size)", "return write(limit)"),
        ("return write(size)", "return write(left)"),
    ],
)
def test_with_effect(old: str, new: str) -> None:
    assert old in SOURCE
    assert shown(SOURCE) != shown(SOURCE.replace(old, new))


def test_a_value_that_a_call_may_change_stays() -> None:
    """An unread name is dropped only where its value is made by functions that do nothing else."""
    text = "def work(a):\n    unread = {}(a)\n    return a\n"
    assert shown(text.format("len")) == shown("def work(a):\n    return a\n")
    assert shown(text.format("append")) != shown("def work(a):\n    return a\n")
    outer = "def work(a):\n    global unread\n    unread = len(a)\n    return a\n"
    assert "unread" in shown(outer).replace("Global(names=['unread'])", "")


def test_the_fields_of_a_class_stay_in_order() -> None:
    text = "@dataclass\nclass Thing:\n    one: int\n    two: int = {}\n"
    assert shown(text.format(2)) == shown(text.format(2).replace("one: int", "one: float"))
    assert shown(text.format(2)) != shown(text.format(3))
    assert shown(text.format(2)) != shown(text.format(2).replace("one", "first"))
