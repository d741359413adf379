"""Digests of every byte of a model's weights, which a fingerprint only samples."""

import re
from collections.abc import Mapping
from pathlib import Path

from m2d.artifacts import reading, sha256_of, write_text
from m2d.models.checkpoint import shard_files
from m2d.progress import progress

SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of config.json and every file of weights; reads all of them."""
    files = [folder / "config.json", *shard_files(folder)]
    return {file.name: sha256_of(file) for file in progress(files, f"{folder}, digests of files")}


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
