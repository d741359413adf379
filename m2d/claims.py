"""What a command writes: checked and claimed before it computes anything.

A claim tests that the output can be written, that it is no input and nothing but a file or folder,
keeps a second process out, and sweeps what dead runs of the same output left.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from m2d.errors import UserError

# Beside an output NAME lie hidden files with longer names while it is made.
ROOM_IN_NAME = 48
# Commands that write a folder; one that must be new, and one that is added to or renewed. All
# others write a file.
NEW_FOLDERS = ("convert", "merge", "prune", "baseline", "refit", "align", "distill")
FOLDERS = ("teacher-logits", "tables", "figures", "card", "demo", "evaluate")
# The files of a model's folder, which an output must never replace.
OF_A_MODEL = re.compile(
    r".*\.(safetensors|index\.json|model|jinja|py|txt|md)"
    r"|(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|m2d|plan)\.json"
)


@contextlib.contextmanager
def claimed(args: argparse.Namespace) -> Iterator[None]:
    """Hold the command's output while it runs. Raises UserError where that cannot be.

    Of several processes of one command, the first one holds it.
    """
    check_inputs(args)
    out = getattr(args, "out", None)
    if out is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    out = Path(out)
    try:
        check_kind(out, args.command)
    except UserError:
        clear(out)
        raise
    check_no_input(out, args)
    shared = getattr(args, "part", None) or (0, 1)  # which part of how many, of a shared folder
    part = "" if shared[1] == 1 else "-".join(map(str, shared))
    with claim(out, part):
        yield


def clear(out: Path) -> None:
    """Remove the lock and the work of who was killed once the output was there."""
    if any(out.parent.glob(f".{escape(out.name)}.*")):
        with contextlib.suppress(UserError), claim(out):
            pass


def check_kind(out: Path, command: str) -> None:
    """Raise a UserError where something else than the command's kind of output has its name."""
    try:
        mode = out.stat().st_mode
    except FileNotFoundError:
        if out.is_symlink():
            raise UserError(f"{out}: is a link to nothing; remove it") from None
        return
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if command in NEW_FOLDERS:
        if not stat.S_ISDIR(mode) or any(out.iterdir()):
            raise UserError(f"{out}: exists already; name another output or remove it first")
    elif stat.S_ISDIR(mode):
        if command not in FOLDERS:
            raise UserError(f"{out}: is a folder; name a file in it")
    elif not stat.S_ISREG(mode):
        raise UserError(f"{out}: is no regular file; name another output")
    elif command in FOLDERS and command != "evaluate":
        raise UserError(f"{out}: is a file; name a folder")


def inputs_of(args: argparse.Namespace) -> Iterator[str | Path]:
    """Every argument that may be the path of an input."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if name not in ("out", "command") and isinstance(one, str | Path):
                yield one


def check_inputs(args: argparse.Namespace) -> None:
    """Raise a UserError for what is no file or folder; reading a pipe or device may never end."""
    for value in inputs_of(args):
        with contextlib.suppress(OSError, ValueError):
            mode = os.stat(value).st_mode  # noqa: PTH116 (a word may be no path at all)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{value}: not a regular file or folder")


def check_no_input(out: Path, args: argparse.Namespace) -> None:
    """Raise a UserError where the output is one of the inputs, or a file of a model among them."""
    if not out.exists():
        return
    for value in inputs_of(args):
        place = Path(value)
        with contextlib.suppress(OSError):
            if not place.exists():
                continue
            if place.samefile(out):
                raise UserError(f"{out}: is an input too; name another output")
            within = out.resolve().is_relative_to(place.resolve())
            is_model = place.is_dir() and (place / "config.json").exists()
            if is_model and within and OF_A_MODEL.fullmatch(out.name):
                raise UserError(f"{out}: belongs to the model {place}; name another output")


@contextlib.contextmanager
def claim(out: str | Path, part: str = "") -> Iterator[None]:
    """Hold an output: no other process that claims it writes it meanwhile.

    part: of those who hold a part each, several do so together, but never with one who holds the
    whole. Raises UserError where it is taken, or where nothing can be written.
    """
    out = Path(out)
    if not out.name:
        raise UserError(f"{str(out)!r}: is no name for an output")
    room = os.pathconf("/", "PC_NAME_MAX") - ROOM_IN_NAME
    if (length := len(os.fsencode(out.name))) > room:
        raise UserError(f"{out.name[:40]}...: a name of {length} bytes; at most {room} fit")
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    whole, own = out.with_name(f".{out.name}.lock"), out.with_name(f".{out.name}.{part}.lock")
    wanted = {whole: fcntl.LOCK_SH, own: fcntl.LOCK_EX} if part else {whole: fcntl.LOCK_EX}
    locks: dict[Path, int] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for lock, kind in wanted.items():
            locks[lock] = _locked(lock, kind)
    except OSError as error:
        _release(locks)
        if isinstance(error, BlockingIOError):
            raise UserError(
                f"{out}: another process is writing it; wait for it, or name another output"
            ) from None
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        if not part:
            sweep(out)
        yield
    finally:
        _release(locks)
        # Passes that go on after a kill say how far they came in a file (m2d.models.resume); those
        # that ended before there was anything to go on from have none.
        for folder in [] if part else out.parent.glob(f".{escape(out.name)}.layers-*"):
            if not any(folder.glob("[!.]*.json")):
                shutil.rmtree(folder, ignore_errors=True)
        for folder in made:  # those that stayed empty, deepest first
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(lock: Path, kind: int) -> int:
    """An open file, locked for one (LOCK_EX) or several; BlockingIOError where another has it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            # Some network file systems have no locks; then none is kept.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                os.close(descriptor)
                raise
        # The one who had it may have removed it in between: then it keeps nobody out any more.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _release(locks: dict[Path, int]) -> None:
    """Give locks back; the last who holds one removes its file."""
    for lock, descriptor in locks.items():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:  # of a file system that has no locks
            pass
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def sweep(out: Path) -> None:
    """Remove what dead runs left of an output, or in it; only for the one who holds it."""
    inside = list(out.glob(".*.partial")) if out.is_dir() else []
    for left in [*out.parent.glob(f".{escape(out.name)}.*.partial"), *inside]:
        if left.is_symlink() or not left.is_dir():
            left.unlink(missing_ok=True)
        else:
            shutil.rmtree(left, ignore_errors=True)


# What libraries written in other languages say of a write that failed, and its reason.
NOT_WRITTEN = re.compile(
    r".*(?:I/O error: |Detail: \[errno \d+\] )(?P<reason>[^(\n]+)|.*PytorchStreamWriter failed",
    re.S,
)


def describe_failure(error: BaseException, out: str | Path | None = None) -> str | None:
    """One line for what the system, not the user's files, has refused; None for other errors.

    out: what was being written, where the error does not name a file.
    """
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "not enough memory; give a smaller --batch, or run it on a larger machine"
    if isinstance(error, BrokenExecutor):
        return "one of its processes was killed, most likely because memory ran out"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply"
    if type(error).__name__ == "OutOfMemoryError":
        return "not enough memory on the GPU; give a smaller --batch"
    foreign = NOT_WRITTEN.match(str(error))
    if foreign and isinstance(error, OSError | RuntimeError | SafetensorError):
        reason = (foreign["reason"] or "a file cannot be written; is the disk full?").strip()
    elif isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
    else:
        return None
    names = [error.filename, error.filename2] if isinstance(error, OSError) else []
    named = next((str(name) for name in [*names, out] if name is not None), None)
    return reason if named is None else f"{named}: {reason}"
