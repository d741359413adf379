"""Tensors in safetensors files: where they lie, and reading one.

Reading uses plain file reads, not a memory map, so that resident memory is what the caller holds.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.artifacts import reading
from m2d.errors import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    nbytes: int

    def rows(self, begin: int, end: int) -> "Entry":
        """Rows begin..end of the first axis: contiguous, hence an entry too."""
        step = self.nbytes // self.shape[0]
        shape = (end - begin, *self.shape[1:])
        return Entry(self.file, self.dtype, shape, self.start + begin * step, (end - begin) * step)

    def item(self, index: int) -> "Entry":
        """Item `index` of the first axis, without that axis."""
        row = self.rows(index, index + 1)
        return Entry(row.file, row.dtype, row.shape[1:], row.start, row.nbytes)


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from others on disk whenever it is read."""

    sources: tuple[Entry, ...]
    compute: Callable[..., Tensor] = field(compare=False)
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.sources[0].file

    @property
    def nbytes(self) -> int:
        """Bytes in memory, not on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


AnyEntry = Entry | Derived


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by tensor name, and the file's metadata.

    Raises UserError where the file is unreadable, cut off, or inconsistent.
    """
    with reading(file, "a readable safetensors file"):
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {
            name: _entry(file, spec, data_start=8 + length, size=size)
            for name, spec in header.items()
        }
        _check_covered(entries, 8 + length, size)
        return entries, metadata


def _check_covered(entries: dict[str, Entry], data_start: int, size: int) -> None:
    """Raise a ValueError unless the tensors lie one after the other, to the end of the file.

    The format asks for it. Otherwise bytes were put in or left out, and others are read than were
    written.
    """
    end = data_start
    for start, nbytes in sorted((entry.start, entry.nbytes) for entry in entries.values()):
        if start != end:
            raise ValueError("its tensors overlap, or have bytes of none between them")
        end += nbytes
    if end != size:
        raise ValueError(f"{size - end} bytes at its end belong to no tensor")


def _entry(file: Path, spec: dict[str, Any], data_start: int, size: int) -> Entry:
    dtype = DTYPES[spec["dtype"]]
    shape = tuple(spec["shape"])
    begin, end = spec["data_offsets"]
    if any(type(number) is not int for number in (*shape, begin, end)):
        raise ValueError("a shape or place that is not of whole numbers")
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's shape and size disagree")
    if begin < 0 or data_start + end > size:
        raise ValueError("the file is cut off")
    return Entry(file, dtype, shape, data_start + begin, end - begin)


def read_entry(entry: AnyEntry, name: str) -> Tensor:
    """The tensor, on the CPU, in memory of its own. `name` is for the error message.

    Raises UserError where the file cannot be read, or a quantised tensor holds what cannot be.
    """
    if isinstance(entry, Derived):
        parts = [read_entry(source, name) for source in entry.sources]
        try:
            return entry.compute(*parts)
        except ValueError as error:
            raise UserError(f"{entry.file}: {name}: {error}") from None
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    fill(entry, name, tensor)
    return tensor


def fill(entry: Entry, name: str, out: Tensor) -> None:
    """Read the entry's bytes into `out`, contiguous and of the entry's dtype and shape."""
    if entry.nbytes:
        _read_into(entry, name, memoryview(out.view(-1).view(torch.uint8).numpy().data), 0)


def blocks(entry: Entry, name: str, buffer: bytearray) -> Iterator[memoryview]:
    """The entry's bytes in parts, each valid until the next is asked for; all lie in `buffer`."""
    for done in range(0, entry.nbytes, len(buffer)):
        part = memoryview(buffer)[: min(len(buffer), entry.nbytes - done)]
        _read_into(entry, name, part, done)
        yield part


def _read_into(entry: Entry, name: str, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from byte `start` of the entry on."""
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start + start)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise OSError("the file is cut off")
                done += count
    except OSError as error:
        raise UserError(f"{entry.file}: cannot read {name} ({error})") from None
