"""The safetensors reader and writer, against the safetensors library."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2d.errors import UserError
from m2d.models.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    plan_shards,
    write_checkpoint,
    write_safetensors,
)

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "b.weight": torch.randn(2, 3, 4).bfloat16(),
    "c.ids": torch.arange(7),
    "d.bytes": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "e.scalar": torch.tensor(2.5, dtype=torch.float16),
    "f.empty": torch.empty(0, 4),
    "g.fp8": torch.randn(4).to(torch.float8_e4m3fn),
}


# Only the raw reader and writer take these: to a checkpoint, float8 without a scale is no weight.
BYTES = {"g.fp8": TENSORS.pop("g.fp8")}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert same_bits(checkpoint.read(name), tensor), name


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    file, tensors = tmp_path / "x.safetensors", {**TENSORS, **BYTES}
    write_safetensors(file, specs_of(tensors), tensors.values(), {"format": "pt"})
    loaded = load_file(file)
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_shards_with_an_index(tmp_path: Path) -> None:
    asked = []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    write_checkpoint(tmp_path, specs_of(TENSORS), tensor, max_shard_bytes=64)
    assert asked == list(TENSORS)  # each once, in order
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    for file in shards:
        for name in load_file(file):
            assert index["weight_map"][name] == file.name
    checkpoint = Checkpoint(tmp_path)
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_larger_than_a_shard_stands_alone() -> None:
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (100,)), "c": (torch.float32, (2,))}
    assert plan_shards(specs, max_bytes=16) == [["a"], ["b"], ["c"]]
    assert plan_shards(specs, max_bytes=415) == [["a", "b"], ["c"]]


def test_a_wrong_tensor_is_refused(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2,))}
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "x", specs, [torch.zeros(3)], {})


def header_with(spec: dict, data: bytes = b"") -> bytes:
    text = json.dumps(spec).encode()
    return struct.pack("<Q", len(text)) + text + data


BROKEN = {
    "empty": b"",
    "header cut off": struct.pack("<Q", 1000) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"abcd",
    "data cut off": header_with(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8
    ),
    "size and shape disagree": header_with(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 16
    ),
    "negative shape": header_with(
        {"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, b"\0" * 16
    ),
    "before the data": header_with(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"\0" * 4
    ),
    "bytes of no tensor at the end": header_with(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 8
    ),
    "bytes of no tensor at the beginning": header_with(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8
    ),
    "tensors that overlap": header_with(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        b"\0" * 8,
    ),
    "a place between two bytes": header_with(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.5, 4.5]}}, b"\0" * 4
    ),
    "a size in words": header_with(
        {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "unknown dtype": header_with(
        {"a": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint(tmp_path)


def test_an_index_may_not_point_elsewhere(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not the name of a safetensors file"):
        Checkpoint(folder)


NO_SHARD = (["x.safetensors"], {"a": 1}, None, 5, "../x.safetensors", "/x.safetensors", "x\n")


@pytest.mark.parametrize("value", NO_SHARD, ids=repr)
def test_what_is_no_shard_in_an_index_is_named(tmp_path: Path, value: object) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": value}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not the name of a safetensors file in the folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "NaN", '"text"'])
@pytest.mark.parametrize("name", [INDEX_NAME, "config.json"])
def test_json_that_is_no_object_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    if name != INDEX_NAME:
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}: not a JSON object"):
        Checkpoint(tmp_path)


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(UserError, match=r"shard model-00001-of-00002\.safetensors is missing"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor 'b'"):
        Checkpoint(tmp_path).read("b")
