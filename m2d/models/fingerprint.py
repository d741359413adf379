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

import torch
from transformers import PreTrainedModel

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.models.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, shard_files, tensors_of
from m2d.models.entries import Entry, read_entry
from m2d.models.parameters import wanted_of

SAMPLE_BYTES = 256
BYTES_PER_SAMPLE = 2**22  # another sample for so many bytes of a tensor
MOST_SAMPLES = 64
READERS = 8
EXPERT = re.compile(r"\.experts\.(\d+)\.")
SMALLEST = 2.0**-14  # float16 has not all bits of what is smaller
# Of config.json, what says nothing of the function that the model computes.
NOT_COVERED = {"transformers_version", "_name_or_path", "auto_map", "architectures"}
NOT_OF_THE_NUMBERS = {"dtype", "torch_dtype", "use_cache"}


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


def format_of(folder: Path) -> str:
    """A digest of how a model lies on disk: its tensors' names, dtypes and shapes."""
    entries = sorted(tensors_of(folder).items())
    text = json.dumps([[name, str(one.dtype), one.shape] for name, one in entries])
    return hashlib.sha256(text.encode()).hexdigest()


def values_of(folder: Path, skeleton: PreTrainedModel) -> str | None:
    """A fingerprint that the same numbers have in every dtype and format; None without weights.

    Of the config as transformers reads it, and of a row, rounded to bfloat16, of every tensor that
    the class (its skeleton; a family's, if it has experts) wants; of a layer's experts, the first.
    An unpacked copy of a quantised model has it too, a model that was quantised anew has not.
    """
    if fingerprint(folder) is None:
        return None
    config = skeleton.config.get_text_config()
    known = type(config)().to_dict().keys() - NOT_COVERED - NOT_OF_THE_NUMBERS
    values = {key: value for key, value in config.to_dict().items() if key in known}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    checkpoint, wanted = Checkpoint(folder), wanted_of(skeleton, text_only=True)
    for name, shape in sorted(wanted.shapes().items()):
        expert = EXPERT.search(name)
        if name in wanted.tied or name not in checkpoint or (expert and int(expert[1])):
            continue
        entry, place = checkpoint.entry(name), shape[0] // 2 if shape else 0
        if isinstance(entry, Entry) and len(shape) > 1:
            row = read_entry(entry.rows(place, place + 1), name)
        else:
            row = read_entry(entry, name)
            row = row[place] if len(shape) > 1 else row
        rounded = row.to(torch.bfloat16).float()  # and + 0: there is one zero
        rounded = torch.where(rounded.abs() < SMALLEST, 0.0, rounded) + 0.0
        digest.update(f"{name} {list(shape)}\n".encode() + rounded.numpy().tobytes())
    return digest.hexdigest()


def marks_of(folder: Path, skeleton: PreTrainedModel) -> dict[str, str]:
    """What a student's m2d.json notes of its teacher, to know it again; nothing without weights."""
    own, values = fingerprint(folder), values_of(folder, skeleton)
    if own is None or values is None:
        return {}
    return {"fingerprint": own, "format": format_of(folder), "values": values}


def noted_teacher(student: Path) -> dict[str, Any]:
    """What a student's m2d.json notes of its teacher; empty where it says nothing."""
    file = student / "m2d.json"
    record = read_json(file) if file.is_file() else {}
    about = record.get("teacher")
    return about if isinstance(about, dict) else {}


def require_same_model(student: Path, teacher: Path, skeleton: PreTrainedModel, name: str) -> None:
    """Raise a UserError unless a student was made from this teacher, as far as its m2d.json says.

    The same numbers in another dtype or format will do.
    """
    noted, own = noted_teacher(student), fingerprint(teacher)
    if own is None or noted.get("fingerprint") in (None, own):
        return
    same = noted.get("values") == values_of(teacher, skeleton)
    if not same or noted.get("format") == format_of(teacher):
        raise UserError(
            f"{student}: was made from other weights than those of {name} (fingerprint "
            f"{str(noted['fingerprint'])[:12]}, not {own[:12]}); give the teacher that it was made "
            "from, or --any-teacher, also for one that was quantised since"
        )


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
