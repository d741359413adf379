"""Whatever a checkpoint's layout, its tensors under canonical names.

A canonical name is that of the stock model's module, except that every expert has its own
`{experts}.{expert}.gate_proj.weight` (and up, down, bias). A fused tensor is cut into experts,
which costs nothing where an expert's part is contiguous; a quantised one is dequantised when it is
read. Nothing here reads a tensor.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.errors import UserError
from m2d.models.entries import AnyEntry, Derived, Entry
from m2d.models.families import FUSED, ROWS, Family
from m2d.models.names import Names
from m2d.models.quantized import MXFP4_BLOCK, MXFP4_SUFFIXES, dequantize_mxfp4
from m2d.models.quantized_entries import plain_entries
from m2d.models.schemes import read_scheme


@dataclass(frozen=True)
class Layout:
    """A checkpoint's entries by canonical name."""

    entries: dict[str, AnyEntry]
    on_disk: dict[str, str]
    """Canonical name -> name on disk, quantisation suffixes aside, for whole tensors; of fused
    experts, the fused name."""
    fused: bool
    """Whether all experts of a layer are one tensor on disk."""
    plain: dict[str, AnyEntry]
    """By name on disk, what is quantised as one that is dequantised when it is read."""


def canonical(
    folder: Path,
    entries: dict[str, Entry],
    family: Family | None,
    config: dict[str, Any],
    own: Names | None = None,
) -> Layout:
    """The layout of a folder's entries.

    config is config.json as it stands; own, the names of a class that is no family's.
    Raises UserError for a quantisation that is not known, or
    parts that do not fit together.
    """
    dtype = _float_dtype(config)
    plain = plain_entries(folder, entries, read_scheme(folder, config), dtype)
    names, renamed = _renamed(plain, family, own)
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("hidden_size")
    fused = _split_experts(folder, renamed, names, family, dtype, size) if family else False
    return Layout(renamed, names, fused, plain)


def _float_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype to dequantise to."""
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


def _renamed(
    entries: Mapping[str, AnyEntry], family: Family | None, own: Names | None
) -> tuple[dict[str, str], dict[str, AnyEntry]]:
    """Canonical name -> name on disk, and -> entry.

    Parts of one tensor are joined, several in one are cut, and what lies transposed is turned.
    """
    table: Names | None = family.names if family else own
    if table is None:
        patterns = [(re.compile(old), new) for old, new in family.renames] if family else []
        names = {}
        for old in entries:
            new = old
            for pattern, replacement in patterns:
                new = pattern.sub(replacement, new)
            names[new] = old
        return names, {new: entries[old] for new, old in names.items()}
    names = {}
    renamed: dict[str, AnyEntry] = {}
    parts: dict[tuple[str, int], list[tuple[tuple[int, int], str]]] = {}
    for old, found in table.of(entries).items():
        if found.part is None:
            whole = entries[old] if found.turned is None else _turned(entries[old], *found.turned)
            if found.interleaved is not None:
                compute = partial(_one_after_the_other, axis=found.interleaved)
                whole = _computed(whole, compute, whole.shape)
            called = (found.name, *found.others)
            cut = _cut_equally(whole, len(called), found.axis)
            renamed |= zip(called, cut, strict=False)
            if cut == [entries[old]]:  # what is computed of it is not written under its name
                names[found.name] = old
        else:
            parts.setdefault((found.name, found.axis), []).append((found.part, old))
    for (name, axis), places in parts.items():
        found_parts = [entries[old] for _, old in sorted(places)]
        sources = tuple(one for one in found_parts if isinstance(one, Entry))
        if len(sources) != len(found_parts):
            continue  # quantised; the tensor is then missed by its name
        shape = list(sources[0].shape)
        shape[axis] = sum(source.shape[axis] for source in sources)
        renamed[name] = Derived(sources, partial(_join, axis=axis), sources[0].dtype, tuple(shape))
    return names, renamed


def _join(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, dim=axis)


def _one_after_the_other(whole: Tensor, axis: int) -> Tensor:
    """Gate and up, which alternate along an axis."""
    return whole.unflatten(axis, (-1, 2)).transpose(axis - 1, axis).flatten(axis - 1, axis)


def _turned(entry: AnyEntry, one: int, other: int) -> AnyEntry:
    """A tensor with two axes exchanged; one without them as it is."""
    if max(one, other) >= len(entry.shape):
        return entry
    shape = list(entry.shape)
    shape[one], shape[other] = shape[other], shape[one]
    return _computed(entry, lambda whole: whole.transpose(one, other).contiguous(), tuple(shape))


def _cut_equally(entry: AnyEntry, count: int, axis: int) -> list[AnyEntry]:
    """A tensor in so many parts along an axis, as torch.chunk cuts it; one without it as it is."""
    size = entry.shape[axis] if axis < len(entry.shape) else 0
    if count == 1 or not size:
        return [entry]
    step = -(-size // count)
    cut: list[AnyEntry] = []
    for begin in range(0, size, step):
        end = min(begin + step, size)
        if isinstance(entry, Entry) and axis == 0:
            cut.append(entry.rows(begin, end))
            continue
        shape = (*entry.shape[:axis], end - begin, *entry.shape[axis + 1 :])
        cut.append(_computed(entry, partial(_part, axis=axis, begin=begin, end=end), shape))
    return cut


def _part(whole: Tensor, axis: int, begin: int, end: int) -> Tensor:
    return whole.narrow(axis, begin, end - begin).contiguous()


def _computed(
    entry: AnyEntry, compute: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> Derived:
    """What is computed of a tensor, of a dequantised one too."""
    if isinstance(entry, Derived):
        inner = entry.compute
        return Derived(entry.sources, lambda *parts: compute(inner(*parts)), entry.dtype, shape)
    return Derived((entry,), compute, entry.dtype, shape)


def _split_experts(
    folder: Path,
    entries: dict[str, AnyEntry],
    names: dict[str, str],
    family: Family,
    dtype: torch.dtype,
    size: int | None,
) -> bool:
    """Replace fused expert tensors by one entry per expert and projection."""
    layer, experts = re.escape(f"{family.layers}.") + r"\d+", re.escape(f".{family.experts}")
    kinds = "|".join(map(re.escape, FUSED))
    tensor = rf"(?P<kind>{kinds})(?P<bias>_bias)?(?P<blocks>_blocks)?"
    pattern = re.compile(rf"(?P<path>(?P<layer>{layer}){experts})\.{tensor}")
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
            if {entry.dtype, scales.dtype} != {torch.uint8}:
                raise UserError(f"{folder}: {name} and its scales are not both of bytes (uint8)")
            if 2 * entry.shape[-1] != MXFP4_BLOCK:
                raise UserError(f"{folder}: {name} has blocks of {2 * entry.shape[-1]}, not 32")
            names[whole] = names.pop(name).removesuffix(MXFP4_SUFFIXES[0])
        projections = FUSED[kind]
        turned = family.turns(projections[-1]) or _is_turned(family, kind, entry, size)
        if kind in ROWS:
            router = entries.get(f"{match['layer']}.{family.router}.weight")
            items = _rows(folder, name, entry, router)
        else:
            items = [_item(entry, index) for index in range(entry.shape[0])]
        for index, item in enumerate(items):
            for position, projection in enumerate(projections):
                entries[f"{match['path']}.{index}.{projection}.{part}"] = _cut(
                    item,
                    None if scales is None else _item(scales, index),
                    turned,
                    family.interleaved,
                    dtype,
                    position if len(projections) == 2 else None,
                )
    return bool(found)


def _is_turned(family: Family, kind: str, entry: AnyEntry, size: int | None) -> bool:
    """Whether a fused tensor is one that transformers transposes while loading: by its shape."""
    if size is None or family.names is None or not family.names.transposes_experts:
        return False
    return len(entry.shape) == 3 and entry.shape[1 if kind == "down_proj" else 2] != size


def _rows(folder: Path, name: str, entry: AnyEntry, router: AnyEntry | None) -> list[AnyEntry]:
    """Each expert's rows of one matrix for all. The router has a row for each expert."""
    count = 0 if router is None else router.shape[0]
    if not isinstance(entry, Entry) or not count or entry.shape[0] % count:
        raise UserError(
            f"{folder}: {name} is {list(entry.shape)}, which are not the rows of {count} experts, "
            "or it is quantised"
        )
    width = entry.shape[0] // count
    return [entry.rows(index * width, (index + 1) * width) for index in range(count)]


def _item(entry: AnyEntry, index: int) -> AnyEntry:
    """One expert of a fused tensor, of a dequantised one too."""
    if isinstance(entry, Entry):
        return entry.item(index)
    sources = tuple(s if not s.shape or s.shape == (1,) else s.item(index) for s in entry.sources)
    return Derived(sources, entry.compute, entry.dtype, entry.shape[1:])


def _cut(
    entry: AnyEntry,
    scales: AnyEntry | None,
    transposed: bool,
    interleaved: bool,
    dtype: torch.dtype,
    half: int | None,
) -> AnyEntry:
    """One expert's projection. half: 0 for gate, 1 for up, None for down."""
    if scales is not None:  # MXFP4 is [out, in / 32, 16] whatever the unquantised layout
        assert isinstance(entry, Entry)
        assert isinstance(scales, Entry)
        rows, groups, size = entry.shape
        own = (rows if half is None else rows // 2, groups * size * 2)
        compute = partial(_cut_mxfp4, half=half, interleaved=interleaved, dtype=dtype)
        return Derived((entry, scales), compute, dtype, own)
    is_bias = len(entry.shape) == 1
    transposed = transposed and not is_bias
    if half is None and not transposed:
        return entry
    count = entry.shape[-1 if transposed else 0]
    contiguous = isinstance(entry, Entry) and not transposed and not interleaved
    if contiguous and isinstance(entry, Entry) and half is not None:
        return entry.rows(half * count // 2, (half + 1) * count // 2)
    shape: tuple[int, ...] = entry.shape[::-1] if transposed else entry.shape
    if half is not None:
        shape = (shape[0] // 2, *shape[1:])
    compute = partial(_cut_tensor, half=half, interleaved=interleaved, transposed=transposed)
    return _computed(entry, compute, shape)


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
