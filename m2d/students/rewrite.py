"""A student's folder anew with other FFN weights: everything else is copied.

Shapes: W the student's intermediate size, H hidden size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.artifacts import atomic_path, require_absent
from m2d.models.checkpoint import Checkpoint, shard_files, write_checkpoint
from m2d.models.entries import read_entry, read_header
from m2d.models.families import FUSED, ROWS, Family
from m2d.models.load import beside_text
from m2d.models.teacher import read_config
from m2d.students.files import copy_others, write_record
from m2d.students.record import read_record

WRITTEN_ANEW = ("README.md", "m2d.json", "metrics.jsonl")

FeedForward = Mapping[str, Tensor]
"""Tensors of one FFN: gate_proj.weight and up_proj.weight [W, H], down_proj.weight [H, W], their
biases (gate_proj.bias and so on). Gate and up go together; either they or the down projection may
be missing.
"""


def on_disk(
    checkpoint: Checkpoint, family: Family, layer: int, parts: FeedForward
) -> dict[str, Tensor]:
    """The tensors by their names on disk, [out, in] or [out]; fused ones put together."""
    count = family.student_experts
    stem = f"{family.student_layers or family.layers}.{layer}.{family.experts}"
    named: dict[str, Tensor] = {}
    if count and family.rows:
        for kind in ROWS:
            (part,) = FUSED[kind]
            if (value := parts.get(f"{part}.weight")) is not None:
                named[f"{stem}.{kind}"] = value.T if family.turns(part) else value
    elif count and checkpoint.fused:
        for kind in ("weight", "bias"):
            suffix = "_bias" if kind == "bias" else ""
            if f"down_proj.{kind}" in parts:
                down = parts[f"down_proj.{kind}"]
                several = count > 1 and kind == "weight"
                named[f"{stem}.down_proj{suffix}"] = (
                    down.unflatten(1, (count, -1)).transpose(0, 1) if several else down
                )
            if f"gate_proj.{kind}" in parts:
                halves = [parts[f"gate_proj.{kind}"], parts[f"up_proj.{kind}"]]
                if count > 1:
                    halves = [half.unflatten(0, (count, -1)) for half in halves]
                axis = 1 if count > 1 else 0
                named[f"{stem}.gate_up_proj{suffix}"] = (
                    torch.stack(halves, axis + 1).flatten(axis, axis + 1)
                    if family.interleaved
                    else torch.cat(halves, dim=axis)
                )
    elif count > 1:
        for part, tensor in parts.items():
            axis = 1 if part == "down_proj.weight" else 0
            for expert, own in enumerate(tensor.chunk(count, dim=axis)):
                stem = family.up_proj.format(layer=layer, expert=expert)
                named[stem.removesuffix("up_proj.weight") + part] = own
    else:
        template = family.gate_proj if count else family.dense_gate_proj
        stem = template.format(layer=layer, expert=0).removesuffix("gate_proj.weight")
        named = {stem + part: tensor for part, tensor in parts.items()}
    return {checkpoint.on_disk.get(name, name): tensor for name, tensor in named.items()}


def as_on_disk(value: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """A projection [out, in] or bias [out] in the form [out, in], [1, out, in] or [1, in, out]."""
    value = value.mT if transposed and value.ndim >= 2 and len(shape) == 3 else value
    return value.reshape(shape).contiguous()


def rewrite_student(
    student_folder: Path,
    out: str | Path,
    family: Family,
    layers: Mapping[int, FeedForward],
    **sections: Any,
) -> Path:
    """Write the student's folder with these layers' tensors in place of its own.

    sections: new ones of m2d.json.
    """
    require_absent(out)
    checkpoint = Checkpoint(student_folder)
    entries = {}
    for file in shard_files(student_folder):
        entries.update(read_header(file)[0])
    changed: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        changed |= on_disk(checkpoint, family, layer, parts)

    def tensor(name: str) -> Tensor:
        entry = entries[name]
        if name not in changed:
            return read_entry(entry, name)
        value = as_on_disk(changed[name], entry.shape, family.transposed)
        return value.to("cpu", entry.dtype)

    if unknown := set(changed) - set(entries):
        raise ValueError(f"{student_folder}: has no {', '.join(sorted(unknown))}")
    carried = beside_text(student_folder, read_config(student_folder)[1])
    about = read_record(student_folder / "m2d.json", absent=True).having(**sections)
    with atomic_path(out) as folder:
        folder.mkdir()
        specs = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        write_checkpoint(folder, specs, tensor, unbounded=carried)
        copy_others(student_folder, folder, WRITTEN_ANEW, processors=True)
        write_record(folder, about)
    return Path(out)
