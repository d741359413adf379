"""Digests of every byte of a model's weights, which a fingerprint only samples."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from m2d.artifacts import read_json, reading, sha256_of, write_text
from m2d.errors import UserError
from m2d.models.checkpoint import shard_files
from m2d.progress import progress

SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of config.json and every file of weights; reads all of them."""
    files = [folder / "config.json", *shard_files(folder)]
    return {file.name: sha256_of(file) for file in progress(files, f"{folder}, digests of files")}


def weight_digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of weights, each read once by a process.

    Raises UserError where its m2d.json, which says what a student was made from, is of others.
    """
    noted = _noted(folder)
    found = {weights.name: _digest_of(weights) for weights in shard_files(folder)}
    for name, digest in found.items():
        if noted and noted.get(name) != digest:
            raise UserError(
                f"{folder}: {name} is not what m2d.json was written with (m2d verify says more); "
                "make the student again, or, if the change is meant, remove files_sha256 from its "
                "m2d.json"
            )
    return found


def require_noted_weights(folder: Path) -> None:
    """Raise as `weight_digests` does; nothing is read where no m2d.json has digests."""
    if _noted(folder):
        weight_digests(folder)


def _noted(folder: Path) -> dict[str, str]:
    file = folder / "m2d.json"
    recorded = read_json(file).get("files_sha256") if file.is_file() else None
    return recorded if isinstance(recorded, dict) else {}


def _digest_of(file: Path) -> str:
    about = file.stat()
    return _digest(file, about.st_size, about.st_mtime_ns)


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    return sha256_of(file)


def hub_digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 that the hub gave for a file of weights when it was downloaded, if known.

    The cache calls such a file by its digest; `hf download --local-dir` notes it beside.
    """
    found = {}
    for file in shard_files(folder):
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        lines = note.read_text(encoding="utf-8").split() if note.is_file() else []
        for known in (file.resolve().name, *lines[1:2]):
            if SHA256.fullmatch(known):
                found[file.name] = known
    return found


def write_digests(path: Path, digests: Mapping[str, str]) -> None:
    """Write digests as `sha256sum` does, so that `sha256sum -c` reads them."""
    write_text(path, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def read_digests(path: Path) -> dict[str, str]:
    """What `write_digests` wrote; UserError for another file."""
    found = {}
    with reading(path, "a file of digests (lines of SHA-256 and name)"):
        for line in path.read_text(encoding="utf-8").splitlines():
            digest, name = line.split(maxsplit=1)
            if not SHA256.fullmatch(digest):
                raise ValueError("its lines do not begin with a SHA-256 digest")
            found[name.removeprefix("*")] = digest
        if not found:
            raise ValueError("it is empty")
    return found


def changed(found: Mapping[str, str], expected: Mapping[str, str], whose: str) -> list[str]:
    """A line on every file that is not what is expected."""
    lines = [
        f"{name}: was changed or damaged: not of the digest that {whose} gives"
        for name, digest in expected.items()
        if name in found and found[name] != digest
    ]
    return lines + [f"{name}: is missing" for name in expected if name not in found]
