"""A fingerprint of a model's weights, so that no artifact is used with another model's.

It covers config.json, every tensor's name, dtype and shape, and some bytes of each, so that it
costs seconds on 61 GB and does not depend on how the tensors are divided into files. Two models of
one shape differ in it; after a single flipped bit it is most likely the same.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.models.checkpoint import INDEX_NAME, SINGLE_NAME, shard_files, tensors_of
from m2d.models.entries import Entry, read_entry

SAMPLE_BYTES = 256
BYTES_PER_SAMPLE = 2**22  # another sample for so many bytes of a tensor
MOST_SAMPLES = 64
READERS = 8
NEVER_QUANTISED = re.compile(r"(norm|\.gate|router|embed_tokens)(\.weight|\.layer\.weight)$")
VALUES_OF_KIN = 256
# Of config.json, what says nothing of the function that the model computes.
NOT_COVERED = {"transformers_version", "_name_or_path", "auto_map", "architectures"}


def fingerprint(folder: Path) -> str | None:
    """The fingerprint of the weights in a folder, hexadecimal; None where there are none."""
    if not ((folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file()):
        return None
    files = [*shard_files(folder), folder / "config.json"]
    return _fingerprint(folder, tuple((f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@cache
def _fingerprint(folder: Path, versions: tuple[tuple[int, int], ...]) -> str:
    """The same, once for each state of the files."""
    config = read_json(folder / "config.json")
    covered = {k: v for k, v in config.items() if k not in NOT_COVERED and v is not None}
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode())
    entries = sorted(tensors_of(folder).items())
    with ThreadPoolExecutor(READERS) as readers:
        for name, samples in zip(
            entries, readers.map(_samples, (entry for _, entry in entries)), strict=True
        ):
            digest.update(json.dumps([name[0], str(name[1].dtype), name[1].shape]).encode())
            digest.update(samples)
    return digest.hexdigest()


def kinship(folder: Path) -> str | None:
    """A fingerprint that the same model has in other dtypes and formats; None without weights.

    It covers norms, routers and embeddings, which no common format quantises: their first values.
    """
    if fingerprint(folder) is None:
        return None
    digest = hashlib.sha256()
    for name, entry in sorted(tensors_of(folder).items()):
        if NEVER_QUANTISED.search(name) and entry.dtype.is_floating_point and entry.shape:
            rows = entry.rows(0, 1) if len(entry.shape) == 2 else entry
            values = read_entry(rows, name).flatten()[:VALUES_OF_KIN].float()
            digest.update(f"{name} {list(entry.shape)}\n".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _samples(entry: Entry) -> bytes:
    """Bytes from places spread evenly over a tensor; all of a small one."""
    count = min(MOST_SAMPLES, 1 + entry.nbytes // BYTES_PER_SAMPLE)
    if entry.nbytes <= count * SAMPLE_BYTES:
        count, size = 1, entry.nbytes
    else:
        size = SAMPLE_BYTES
    places = [int((entry.nbytes - size) * (2 * i + 1) / (2 * count)) for i in range(count)]
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        return b"".join(os.pread(descriptor, size, entry.start + place) for place in places)
    finally:
        os.close(descriptor)


def teacher_in(student: Path, key: str = "fingerprint") -> str | None:
    """The fingerprint, or kinship, that a student's m2d.json gives for its teacher, if it does."""
    file = student / "m2d.json"
    record = read_json(file) if file.is_file() else {}
    about = record.get("teacher") if isinstance(record, dict) else None
    found = about.get(key) if isinstance(about, dict) else None
    return None if found is None else str(found)


def require_teacher(
    recorded: Iterable[tuple[str, Any]], expected: str | None, teacher: str
) -> None:
    """Raise a UserError where an artifact was made from other weights than the teacher's.

    recorded: what each artifact is called, and the fingerprint that it carries, if it has one.
    """
    for what, found in recorded:
        if found is not None and expected is not None and found != expected:
            raise UserError(
                f"{what}: was made from other weights than those of {teacher} (fingerprint "
                f"{str(found)[:12]}, not {expected[:12]}); use the teacher that it was made from, "
                "or make it again"
            )
