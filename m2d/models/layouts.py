"""Whatever a checkpoint's layout, its tensors under canonical names.

A canonical name is that of the stock model's module, except that every expert has its own
`{experts}.{expert}.gate_proj.weight` (and up, down, bias). A fused tensor is cut into experts,
which costs nothing where an expert's part is contiguous; a quantised one is dequantised when it is
read. Nothing here reads a tensor.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.errors import UserError
from m2d.models.entries import AnyEntry, Derived, Entry
from m2d.models.families import Family
from m2d.models.quantized import MXFP4_BLOCK, MXFP4_SUFFIXES, dequantize_mxfp4
from m2d.models.schemes import plain_entries, read_scheme


@dataclass(frozen=True)
class Layout:
    """A checkpoint's entries by canonical name."""

    entries: dict[str, AnyEntry]
    on_disk: dict[str, str]
    """Canonical name -> name on disk, quantisation suffixes aside, for whole tensors; of fused
    experts, the fused name."""
    fused: bool
    """Whether all experts of a layer are one tensor on disk."""


def canonical(
    folder: Path, entries: dict[str, Entry], family: Family | None, config: dict[str, Any]
) -> Layout:
    """The layout of a folder's entries.

    config is config.json as it stands. Raises UserError for a quantisation that is not known, or
    parts that do not fit together.
    """
    dtype = _float_dtype(config)
    plain = plain_entries(folder, entries, read_scheme(folder, config), dtype)
    rename = _renamer(family)
    names = {rename(name): name for name in plain}
    renamed: dict[str, AnyEntry] = {new: plain[old] for new, old in names.items()}
    fused = _split_experts(folder, renamed, names, family, dtype) if family else False
    return Layout(renamed, names, fused)


def _float_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype to dequantise to."""
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


def _renamer(family: Family | None) -> Any:
    patterns = [(re.compile(old), new) for old, new in family.renames] if family else []

    def rename(name: str) -> str:
        for pattern, replacement in patterns:
            name = pattern.sub(replacement, name)
        return name

    return rename


def _split_experts(
    folder: Path,
    entries: dict[str, AnyEntry],
    names: dict[str, str],
    family: Family,
    dtype: torch.dtype,
) -> bool:
    """Replace fused expert tensors by one entry per expert and projection."""
    path = re.escape(f"{family.layers}.") + r"\d+" + re.escape(f".{family.experts}")
    tensor = r"(?P<kind>gate_up_proj|down_proj)(?P<bias>_bias)?(?P<blocks>_blocks)?"
    pattern = re.compile(rf"(?P<path>{path})\.{tensor}")
    found = [match for name in entries if (match := pattern.fullmatch(name))]
    for match in found:
        name, kind = match.group(), match["kind"]
        entry = entries.pop(name)
        part = "bias" if match["bias"] else "weight"
        scales = None
        if match["blocks"]:
            whole = name.removesuffix(MXFP4_SUFFIXES[0])
            scales = entries.pop(whole + MXFP4_SUFFIXES[1], None)
            if scales is None or scales.shape != entry.shape[:-1]:
                raise UserError(f"{folder}: {name} has no fitting scales beside it")
            if 2 * entry.shape[-1] != MXFP4_BLOCK:
                raise UserError(f"{folder}: {name} has blocks of {2 * entry.shape[-1]}, not 32")
            names[whole] = names.pop(name).removesuffix(MXFP4_SUFFIXES[0])
        projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for index in range(entry.shape[0]):
            for position, projection in enumerate(projections):
                entries[f"{match['path']}.{index}.{projection}.{part}"] = _cut(
                    _item(entry, index),
                    None if scales is None else _item(scales, index),
                    family,
                    dtype,
                    position if len(projections) == 2 else None,
                )
    return bool(found)


def _item(entry: AnyEntry, index: int) -> AnyEntry:
    """One expert of a fused tensor, of a dequantised one too."""
    if isinstance(entry, Entry):
        return entry.item(index)
    sources = tuple(s if not s.shape or s.shape == (1,) else s.item(index) for s in entry.sources)
    return Derived(sources, entry.compute, entry.dtype, entry.shape[1:])


def _cut(
    entry: AnyEntry, scales: AnyEntry | None, family: Family, dtype: torch.dtype, half: int | None
) -> AnyEntry:
    """One expert's projection. half: 0 for gate, 1 for up, None for down."""
    if scales is not None:  # MXFP4 is [out, in / 32, 16] whatever the unquantised layout
        assert isinstance(entry, Entry)
        assert isinstance(scales, Entry)
        rows, groups, size = entry.shape
        own = (rows if half is None else rows // 2, groups * size * 2)
        compute = partial(_cut_mxfp4, half=half, interleaved=family.interleaved, dtype=dtype)
        return Derived((entry, scales), compute, dtype, own)
    is_bias = len(entry.shape) == 1
    transposed = family.transposed and not is_bias
    if half is None and not transposed:
        return entry
    count = entry.shape[-1 if transposed else 0]
    contiguous = isinstance(entry, Entry) and not transposed and not family.interleaved
    if contiguous and isinstance(entry, Entry) and half is not None:
        return entry.rows(half * count // 2, (half + 1) * count // 2)
    shape: tuple[int, ...] = entry.shape[::-1] if transposed else entry.shape
    if half is not None:
        shape = (shape[0] // 2, *shape[1:])
    compute = partial(_cut_tensor, half=half, interleaved=family.interleaved, transposed=transposed)
    if isinstance(entry, Derived):
        inner = entry.compute
        return Derived(entry.sources, lambda *parts: compute(inner(*parts)), entry.dtype, shape)
    return Derived((entry,), compute, entry.dtype, shape)


def _cut_tensor(whole: Tensor, half: int | None, interleaved: bool, transposed: bool) -> Tensor:
    whole = whole.T if transposed else whole
    return _half(whole, half, interleaved).contiguous()


def _cut_mxfp4(
    blocks: Tensor, scales: Tensor, half: int | None, interleaved: bool, dtype: torch.dtype
) -> Tensor:
    parts = (_half(blocks, half, interleaved), _half(scales, half, interleaved))
    return dequantize_mxfp4(*parts, dtype)


def _half(whole: Tensor, half: int | None, interleaved: bool) -> Tensor:
    """The gate (0) or up (1) rows of a gate_up tensor [2I, ...]; all rows for None."""
    if half is None:
        return whole
    return whole[half::2] if interleaved else whole.chunk(2)[half]
