"""Ways to damage a file; not a test.

Each takes the file and random numbers, and leaves another file in its place.
"""

import json
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load_file, save_file

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**7, 2**31, 2**63, 10**400, 0.5, -0.0, math.nan, math.inf, "",
    "x", "../../x", "nan", "\ud800", "a" * 10**5, [], [[]], [None], {}, {"": {}}, {"a": [1, "b"]},
)  # fmt: skip


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all the values in JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(item, (*path, key))


def damage_json(content: Any, chance: random.Random) -> Any:
    """Another value, a missing or a further key somewhere in JSON."""
    places = list(places_in(content))
    shallow = [place for place in places if len(place) <= 2]
    path = chance.choice(shallow if chance.random() < 0.5 else places)
    if not path:
        return chance.choice(ODD)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    act = chance.randrange(4)
    if act == 0:
        del parent[path[-1]]
    elif act == 1 and isinstance(parent, dict):
        parent["further"] = chance.choice(ODD)
    else:
        parent[path[-1]] = chance.choice(ODD)
    return content


def some_bytes(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 1, 4, 50))):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)


def cut(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.choice((0, 1, 7, 8, 9, chance.randrange(len(data) + 1)))])


def doubled(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    at = chance.randrange(len(data) + 1)
    file.write_bytes(data[:at] + data[chance.randrange(len(data) + 1) :] + data[at:])


def other_kind(file: Path, chance: random.Random) -> None:
    """What is no file, or a file of another kind, in its place."""
    target = file.with_name("moved-" + file.name)
    act = chance.randrange(8)
    file.rename(target)
    if act == 0:
        os.mkfifo(file)
    elif act == 1:
        file.mkdir()
    elif act == 2:
        file.symlink_to(file.name)
    elif act == 3:
        file.symlink_to("/dev/zero")
    elif act == 4:
        file.write_bytes(chance.randbytes(chance.randrange(3000)))
    elif act == 5:
        file.write_bytes(b"[" * 10**5)
    elif act == 6:
        file.write_bytes(b"\xff\xfe" + "x".encode("utf-16-le") * 100)


def json_value(file: Path, chance: random.Random) -> None:
    """JSON with an odd value; of JSON lines and headers of safetensors, one of their objects."""
    data = file.read_bytes()
    if file.suffix == ".jsonl":
        rows = data.decode().splitlines()
        at = chance.randrange(len(rows))
        for place in range(len(rows)) if chance.random() < 0.3 else [at]:
            rows[place] = json.dumps(damage_json(json.loads(rows[place]), chance))
        return void(file.write_text("\n".join(rows)))
    length = int.from_bytes(data[:8], "little") if len(data) > 8 else 0
    if file.suffix == ".yaml":
        content = damage_json(yaml.safe_load(data), chance)
        return void(file.write_text(yaml.safe_dump(content), errors="replace"))
    if data[8:9] == b"{" and length < len(data):
        header = damage_json(json.loads(data[8 : 8 + length]), chance)
        if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
            about = header["__metadata__"]
            key = next(iter(about), None)
            if (
                key
                and isinstance(about[key], str)
                and about[key][:1] == "{"
                and chance.random() < 0.5
            ):
                about[key] = json.dumps(damage_json(json.loads(about[key]), chance))
        text = json.dumps(header).encode()
        return void(file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :]))
    try:
        content = json.loads(data)
    except ValueError:
        return some_bytes(file, chance)
    return void(file.write_text(json.dumps(damage_json(content, chance))))


def void(_: object) -> None:
    return None


def array_value(file: Path, chance: random.Random) -> None:
    """A tensor or a column with odd numbers, another shape or another type."""
    data = file.read_bytes()
    if data[:4] == b"PAR1":
        table = pq.read_table(file)
        at = chance.randrange(table.num_columns)
        name, column = table.column_names[at], table.column(at)
        act = chance.randrange(5)
        if act == 0:
            table = table.drop_columns([name])
        elif act == 1:
            table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
        else:
            odd = (
                [None] * len(column),
                [{"a": 1}] * len(column),
                [math.nan] * len(column),
                [-1] * len(column),
                ["x"] * len(column),
                [chance.choice((1e300, math.inf)), *([1.0] * (len(column) - 1))],
            )
            table = table.set_column(at, name, pa.array(chance.choice(odd)))
        return pq.write_table(table.replace_schema_metadata(pq.read_schema(file).metadata), file)
    try:
        arrays = load_file(file)
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            notes = opened.metadata()
    except Exception:
        return json_value(file, chance)
    name = chance.choice(sorted(arrays))
    array, act = arrays[name].copy(), chance.randrange(7)
    if act == 0:
        del arrays[name]
        return save_file(arrays, file, notes)
    if act == 1:
        array = array.reshape(-1)
    elif act == 2:
        array = array[:0] if array.ndim else array
    elif act == 3:
        kinds = (np.uint8, np.bool_, np.float16, np.float64, np.int16, np.uint64, np.complex64)
        with np.errstate(all="ignore"):
            array = array.astype(chance.choice(kinds))
    elif array.size:
        values = (math.nan, math.inf, -1, 1e30, 0) if array.dtype.kind == "f" else (-1, 2**15, 0)
        places = slice(None) if chance.random() < 0.3 else chance.randrange(array.size)
        with np.errstate(all="ignore"):
            array.reshape(-1)[places] = np.asarray(chance.choice(values)).astype(array.dtype)
    arrays[name] = np.ascontiguousarray(array)
    return save_file(arrays, file, notes)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "some_bytes": some_bytes,
    "cut": cut,
    "doubled": doubled,
    "other_kind": other_kind,
    "json_value": json_value,
    "array_value": array_value,
}


# What the structure of a file lets through is where faults hide.
OFTEN = (*MUTATIONS, "json_value", "json_value", "array_value", "array_value")
