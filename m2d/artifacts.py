"""Files that appear whole or not at all, and the digests that identify them."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2d.errors import UserError, first_line


@contextlib.contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `final`; on success it is flushed and renamed to `final`.

    The caller writes a file or makes a folder there. On an exception nothing remains. A kill
    leaves at most a hidden `.NAME.*.partial`, which no later run takes for the artifact.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    # Inside the holder the name is the final one, since some writers look at the suffix.
    temporary = holder / final.name
    try:
        yield temporary
        set_modes(temporary)
        flush_to_disk(temporary)
        if temporary.is_dir() and final.is_dir():
            # Only an empty folder may be replaced: rename(2) refuses any other.
            with contextlib.suppress(OSError):
                final.rmdir()
        temporary.rename(final)
        fsync(final.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def make_own_folder(folder: Path) -> None:
    """Make a work folder. Raises UserError where something else has its name."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: is in the way of a work folder; remove it")


def scratch_folder(out: str | Path) -> tempfile.TemporaryDirectory:
    """A folder beside an output, on the same disk, for the steps on the way to it."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)


@contextlib.contextmanager
def renewed_folder(out: str | Path) -> Iterator[Path]:
    """Give a folder for files that go into `out` together, over those of the same names.

    On an exception `out` stays as it was.
    """
    out = Path(out)
    with scratch_folder(out) as temporary:
        yield Path(temporary)
        out.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            file.replace(out / file.name)


# The process's umask can only be read by setting it, which threads would see.
UMASK = os.umask(0o022)
os.umask(UMASK)


def set_modes(path: Path) -> None:
    """Give files and folders the permissions that `open` and `mkdir` would have given them.

    safetensors makes its files for their owner alone, and a server is often another user.
    """
    for place in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not place.is_symlink():
            place.chmod((0o777 if place.is_dir() else 0o666) & ~UMASK)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or every file below a folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        fsync(file)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON; the same value always gives the same bytes."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# More than any file of a model or of a run; beyond it, a mistake or a trap.
LONGEST_JSON = 2**30


def require_regular(path: str | Path) -> Path:
    """Raise a UserError unless this is a file; reading a pipe or a device would never end."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    return path


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """The border at which a file's content is taken apart: what fails in here is the file's fault.

    Raises UserError, "PATH: not WHAT (REASON)", for whatever a damaged or foreign file makes its
    reader raise; `--debug` shows that too.
    """
    require_regular(path)
    try:
        yield
    except (UserError, MemoryError):  # the second is the machine's fault
        raise
    except Exception as error:
        raise UserError(f"{path}: not {what} ({explained(error)})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries written in Rust
            raise
        raise UserError(f"{path}: not {what} ({first_line(error)})") from error


def explained(error: Exception) -> str:
    """What was wrong with a file, in words, from the exception that its reader met."""
    if isinstance(error, KeyError):
        return f"it lacks {first_line(error, 100)}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return "a text in it holds half a surrogate pair"
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} is not UTF-8"
    return first_line(error)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, or raise a UserError that names the file."""
    found = parsed_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object, but {str(found)[:40]!r}")
    return found


def parsed_json(path: str | Path, *, constants: bool = True) -> Any:
    """Whatever JSON a file holds, or a UserError that names the file.

    constants: whether NaN and Infinity, which JSON proper has not, are numbers.
    """
    with reading(path, "readable as JSON"):
        with Path(path).open(encoding="utf-8-sig") as stream:
            text = stream.read(LONGEST_JSON + 1)
        if len(text) > LONGEST_JSON:
            raise UserError(f"{path}: more than {LONGEST_JSON:,} characters of JSON")
        value = json.loads(text) if constants else json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text.lower():  # half a surrogate pair is no text, and cannot be written
            json.dumps(value, ensure_ascii=False).encode()
        return value


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def finite(value: Any, what: str) -> float:
    """A number of a file; ValueError where it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {str(value)[:40]!r}, and must be a number")
    return value


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_absent(out: str | Path) -> None:
    """Raise unless `out` can be made without overwriting anything."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; name another output or remove it first")
