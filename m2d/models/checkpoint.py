"""Safetensors checkpoints: tensors read one at a time, and written as a stream.

Reading gives every tensor under its canonical name, whatever the layout on disk (see layouts.py).
Writing needs the names, dtypes and shapes beforehand and then takes the tensors one by one, so
that a checkpoint of any size passes through little memory. The format is safetensors': 8 bytes
of header length (little endian), a JSON header, then the tensors' bytes in the header's order.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.models.entries import CODES, AnyEntry, Entry, blocks, read_entry, read_header
from m2d.models.families import known_family
from m2d.models.layouts import canonical
from m2d.models.names import Names

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Hub tools split at 5 GB; the same here, so that uploads and partial downloads behave alike.
MAX_SHARD_BYTES = 5_000_000_000
# At a time, of tensors that are copied as they are: what a core's cache holds.
COPY_BYTES = 2**20


class Checkpoint:
    """The tensors of a model folder, by canonical name: one safetensors file, or several.

    The folder's config.json says which family's layout to expect; without one, names on disk are
    canonical, or those that `names`, transformers' own table for a class, makes canonical. Raises
    UserError for unreadable files, or weights quantised in an unknown way.
    """

    def __init__(self, folder: Path, names: Names | None = None):
        self.folder = folder
        found = tensors_of(folder)
        file = folder / "config.json"
        self.config: dict[str, Any] = read_json(file) if file.exists() else {}
        family = known_family(str(self.config.get("model_type")))
        layout = canonical(folder, found, family, self.config, names)
        self.entries: dict[str, AnyEntry] = layout.entries
        self.on_disk, self.fused, self.plain = layout.on_disk, layout.fused, layout.plain
        self.files = found  # by name on disk, as it lies there

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> AnyEntry:
        """The named tensor's dtype and shape (and place), or a UserError."""
        if name not in self.entries:
            raise UserError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        return self.entries[name]

    def read(self, name: str, finite: bool = True) -> torch.Tensor:
        """The named tensor, on the CPU, in memory of its own, in the dtype on disk.

        A quantised tensor comes in the config's dtype. Raises UserError where there is none of
        that name, or it holds NaN or, with `finite`, an infinity.
        """
        tensor = read_entry(self.entry(name), name)
        require_finite(tensor, f"{self.folder}: {name}", infinities=not finite)
        return tensor


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files that stock transformers reads in a model folder.

    Raises UserError where there are none, one is missing, or the index points outside the folder.
    """
    if (folder / SINGLE_NAME).is_file():  # before an index, as transformers has it
        return [folder / SINGLE_NAME]
    index = folder / INDEX_NAME
    if not index.exists():
        raise UserError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME} in this folder")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(
                f"{index}: {str(name)[:80]!r} is not the name of a safetensors file in the folder"
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: shard {name} is missing")
    return [folder / name for name in names]


def tensors_of(folder: Path) -> dict[str, Entry]:
    """Every tensor of a model folder by its name on disk.

    Raises UserError for unreadable files, and an index that is not of the files beside it.
    """
    found: dict[str, Entry] = {}
    for file in shard_files(folder):
        found.update(read_header(file)[0])
    _check_index(folder, found)
    return found


def _check_index(folder: Path, found: dict[str, Entry]) -> None:
    """Raise a UserError where the index, if it counts, is of other files than lie beside it."""
    if (folder / SINGLE_NAME).is_file():
        return
    for name, file in read_json(folder / INDEX_NAME)["weight_map"].items():
        if name not in found or found[name].file.name != file:
            raise UserError(
                f"{folder / INDEX_NAME}: says that {name} is in {file}, which is not so; index and "
                "shards are not of one model"
            )


Spec = tuple[torch.dtype, tuple[int, ...]]
Content = torch.Tensor | Sequence[Entry]
"""A tensor, or where the bytes of one lie, part by part."""


def write_safetensors(
    file: Path,
    specs: dict[str, Spec],
    tensors: Iterable[Content],
    metadata: dict[str, str],
    unbounded: Container[str] = (),
) -> None:
    """Write tensors, in the order of `specs`, as they come; those on disk are copied in parts.

    Each must have the dtype and shape (on disk, the dtype and size) announced for it, and finite
    numbers; infinities pass in those of names in `unbounded`.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in specs.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which wants aligned tensors
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        buffer = bytearray(COPY_BYTES)
        for (name, (dtype, shape)), content in zip(specs.items(), tensors, strict=True):
            if isinstance(content, torch.Tensor):
                if content.dtype != dtype or tuple(content.shape) != shape:
                    raise ValueError(f"{name}: announced {dtype} {shape}, got {content.dtype}")
                require_finite(content, name, infinities=name in unbounded)
                if content.numel():
                    stream.write(content.contiguous().view(-1).view(torch.uint8).numpy().data)
                continue
            found = sum(entry.nbytes for entry in content)
            kinds = {entry.dtype for entry in content}
            if kinds != {dtype} or found != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: announced {dtype} {shape}, got {found} bytes of {kinds}")
            for entry in content:
                for part in blocks(entry, name, buffer):
                    if dtype in CHECKED:
                        numbers = torch.frombuffer(part, dtype=dtype)
                        require_finite(numbers, name, infinities=name in unbounded)
                    stream.write(part)


# A copied block holds whole numbers of these, each.
CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require_finite(tensor: torch.Tensor, what: str, infinities: bool = False) -> None:
    """Raise a UserError where a tensor holds NaN or, unless `infinities` may be, an infinity."""
    if tensor.dtype not in CHECKED or not tensor.numel():
        return
    # The extremes are NaN where one number is, and are found much faster than isfinite looks.
    extremes = torch.stack(torch.aminmax(tensor))
    if bool(extremes.isnan().any() if infinities else not extremes.isfinite().all()):
        count = int((tensor.isnan() if infinities else ~tensor.isfinite()).sum())
        raise UserError(
            f"{what}: {count} of its {tensor.numel()} numbers are not finite in "
            f"{str(tensor.dtype).removeprefix('torch.')}"
        )


def plan_shards(specs: dict[str, Spec], max_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Tensor names by shard, in order, none above `max_bytes` unless one tensor alone is."""
    shards: list[list[str]] = []
    filled = 0
    for name, (dtype, shape) in specs.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if not shards or filled + nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def write_checkpoint(
    folder: Path,
    specs: dict[str, Spec],
    tensor: Callable[[str], Content],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    unbounded: Container[str] = (),
) -> None:
    """Write a model's tensors as one file, or as shards with an index.

    `tensor(name)` is called once for every name, in the order of `specs`. unbounded: names of what
    may hold infinities, such as the bounds of an audio tower.
    """
    shards = plan_shards(specs, max_shard_bytes)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        weight_map = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
        nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for file, keys in zip(names, shards, strict=True):
        part: Iterator[Content] = (tensor(key) for key in keys)
        own = {key: specs[key] for key in keys}
        write_safetensors(folder / file, own, part, {"format": "pt"}, unbounded)
