"""Files that appear whole or not at all, and the digests that identify them."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2d.errors import UserError


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


def read_json(path: str | Path) -> Any:
    """Read JSON, or raise a UserError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_absent(out: str | Path) -> None:
    """Raise unless `out` can be made without overwriting anything."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; name another output or remove it first")
