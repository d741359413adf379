"""Which tensors of a checkpoint are quantised, and what each becomes when it is read.

The names beside a weight say which layout it has: `.weight_scale_inv` or `.weight_scale`,
`.weight_packed`, `.qweight`; config.json says the rest (m2d/models/schemes.py). What is not
understood to the last tensor is refused: a float8 or packed tensor is never taken for a weight.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m2d.devices import dtype_name
from m2d.errors import UserError
from m2d.models.entries import AnyEntry, Derived, Entry, read_entry
from m2d.models.quantized import (
    NVFP4_BLOCK,
    dequantize_awq,
    dequantize_gptq,
    dequantize_nvfp4,
    dequantize_packed,
    dequantize_scaled,
    scale_shape,
)
from m2d.models.schemes import Scheme

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")
# Ends of the names of what stands beside a quantised weight.
BESIDE = (
    *(f".weight{end}" for end in (*SCALES, "_scale_2", "_global_scale", "_zero_point", "_g_idx")),
    ".weight_shape",
    ".qzeros",
    ".g_idx",
)
# Of activations and of the key-value cache; a model in floating point has no use for them.
OF_ACTIVATIONS = re.compile(
    r".*[._](input_scale(_inv|_ub)?|activation_scale|input_global_scale|input_zero_point"
    r"|(k|v|q|kv|prob_output|output)_scale)"
)


def plain_entries(
    folder: Path, entries: dict[str, Entry], scheme: Scheme, dtype: torch.dtype
) -> dict[str, AnyEntry]:
    """Entries by name on disk, each quantised weight as one that is dequantised when it is read.

    Its name is then that of the unquantised weight. Raises UserError for a quantised tensor whose
    parts are missing or do not fit together.
    """
    found: dict[str, AnyEntry] = dict(entries)
    for name, entry in entries.items():
        if scheme.method and OF_ACTIVATIONS.fullmatch(name):
            found.pop(name, None)
        elif name.endswith(".weight_packed"):
            _packed(folder, found, name, scheme, dtype)
        elif name.endswith(".qweight"):
            _qweight(folder, found, name, scheme, dtype)
        elif entry.dtype == torch.uint8 and f"{name}_scale_2" in entries:
            _nvfp4(folder, found, name, (name, f"{name}_scale", f"{name}_scale_2"), dtype)
        elif name.endswith(BESIDE):
            continue  # taken with its weight
        elif entry.dtype in (*FLOAT8, torch.int8):
            _scaled(folder, found, name, scheme, dtype)
    for name, other in found.items():
        if name.endswith(BESIDE):
            raise UserError(f"{folder}: {name} has no quantised weight beside it")
        if isinstance(other, Entry) and other.dtype in FLOAT8:
            raise UserError(f"{folder}: {name} is {other.dtype} and has no scale beside it")
    return found


def _take(
    folder: Path, found: dict[str, AnyEntry], weight: str, names: tuple[str, ...]
) -> list[Entry]:
    """Remove these tensors. Raises UserError where one is missing."""
    parts = [found.pop(name, None) for name in names]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, Entry):
            raise UserError(f"{folder}: {weight} is quantised, and has no {name} beside it")
    return [part for part in parts if isinstance(part, Entry)]


def _misfit(folder: Path, name: str, shape: tuple[int, ...], weight: Entry) -> UserError:
    return UserError(
        f"{folder}: {name} is {list(shape)}, which does not fit the weight's {list(weight.shape)}"
    )


def _scaled(
    folder: Path, found: dict[str, AnyEntry], name: str, scheme: Scheme, dtype: torch.dtype
) -> None:
    """A float8 or int8 weight and its scales, under its own name."""
    names = [name + suffix for suffix in SCALES if name + suffix in found]
    weight = found[name]
    assert isinstance(weight, Entry)
    if len(names) > 1:
        raise UserError(f"{folder}: {name} has two scales, {' and '.join(names)}")
    if not names:
        raise UserError(
            f"{folder}: {name} is {str(weight.dtype).removeprefix('torch.')} and has no "
            f"{name}_scale or {name}_scale_inv beside it; without its scale it is no weight"
        )
    (scale_name,) = names
    (scale,) = _take(folder, found, name, (scale_name,))
    _require_floats(folder, scale_name, scale)
    zeros = []
    if f"{name}_zero_point" in found or (scheme.zero_points and weight.dtype == torch.int8):
        zeros = _take(folder, found, name, (f"{name}_zero_point",))
    found.pop(f"{name}_shape", None)
    scale, block = _block_of(folder, scale_name, weight, scale, scheme)
    if zeros and math.prod(zeros[0].shape) != math.prod(scale.shape):
        raise _misfit(folder, f"{name}_zero_point", zeros[0].shape, weight)
    if zeros:
        zeros = [Entry(zeros[0].file, zeros[0].dtype, scale.shape, zeros[0].start, zeros[0].nbytes)]
    compute = partial(dequantize_scaled, dtype=dtype, block=block)
    found[name] = Derived((weight, scale, *zeros), compute, dtype, weight.shape)


def _require_floats(folder: Path, name: str, scale: Entry) -> None:
    if not (scale.dtype.is_floating_point and scale.dtype not in FLOAT8):
        kind = dtype_name(scale.dtype)
        raise UserError(f"{folder}: {name} is {kind}; m2d reads scales in wider floats")


def _block_of(
    folder: Path, name: str, weight: Entry, scale: Entry, scheme: Scheme
) -> tuple[Entry, tuple[int, int]]:
    """The scale, with as many axes as the weight, and the rectangle that each number is for."""
    if scale.shape in ((), (1,)) and not scheme.blocks_only:
        return scale, scheme.block
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise _misfit(folder, name, scale.shape, weight)
    rows, columns = weight.shape[-2:]
    if scheme.blocks_only:
        if scale.shape == scale_shape(weight.shape, scheme.block):
            return scale, scheme.block
        raise _misfit_blocks(folder, name, weight, scale, scheme)
    if scale.shape == weight.shape[:-1]:  # one for each row, without a last axis
        scale = Entry(scale.file, scale.dtype, (*scale.shape, 1), scale.start, scale.nbytes)
    candidates = [(1, columns), (rows, columns), scheme.block]
    if scheme.group:
        candidates.append((1, scheme.group))
    for block in candidates:
        if scale.shape == scale_shape(weight.shape, block):
            return scale, block
    if len(weight.shape) == 3 and scale.shape == weight.shape[:1]:  # one for each fused expert
        shape = (*scale.shape, 1, 1)
        return Entry(scale.file, scale.dtype, shape, scale.start, scale.nbytes), (rows, columns)
    raise _misfit_blocks(folder, name, weight, scale, scheme)


def _misfit_blocks(
    folder: Path, name: str, weight: Entry, scale: Entry, scheme: Scheme
) -> UserError:
    return UserError(
        f"{folder}: {name} is {list(scale.shape)}, but blocks of {list(scheme.block)} of "
        f"{list(weight.shape)} imply {list(scale_shape(weight.shape, scheme.block))}"
    )


def _nvfp4(
    folder: Path,
    found: dict[str, AnyEntry],
    weight: str,
    names: tuple[str, str, str],
    dtype: torch.dtype,
) -> None:
    """names: the packed values, the blocks' scales, and the whole weight's."""
    packed, scale, whole = _take(folder, found, weight, names)
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if len(shape) != 2 or scale.shape != (shape[0], shape[1] // NVFP4_BLOCK):
        raise _misfit(folder, names[1], scale.shape, packed)
    if packed.dtype != torch.uint8 or scale.dtype not in FLOAT8 or whole.shape not in ((), (1,)):
        raise _misfit(folder, names[0], packed.shape, scale)
    _require_floats(folder, names[2], whole)
    compute = partial(dequantize_nvfp4, dtype=dtype, divide=names[0] != weight)
    found[weight] = Derived((packed, scale, whole), compute, dtype, shape)


def _packed(
    folder: Path, found: dict[str, AnyEntry], name: str, scheme: Scheme, dtype: torch.dtype
) -> None:
    """compressed-tensors' `.weight_packed`."""
    weight = name.removesuffix("_packed")
    if f"{weight}_global_scale" in found:
        _nvfp4(folder, found, weight, (name, f"{weight}_scale", f"{weight}_global_scale"), dtype)
        return
    if scheme.bits is None:
        raise UserError(
            f"{folder}: {name} is packed, but config.json does not say of how many bits"
        )
    packed, scale = _take(folder, found, weight, (name, f"{weight}_scale"))
    (size,) = _take(folder, found, weight, (f"{weight}_shape",))
    _require_floats(folder, f"{weight}_scale", scale)
    several = bool(scale.shape) and scale.shape[-1] > 1
    promised = {"zero_point": scheme.zero_points, "g_idx": scheme.shuffled and several}
    others = {}
    for part in promised:
        if f"{weight}_{part}" in found or promised[part]:
            (others[part],) = _take(folder, found, weight, (f"{weight}_{part}",))
    factor = 32 // scheme.bits
    shape = _noted_shape(folder, f"{weight}_shape", size)
    group = scheme.group or shape[-1]
    scales = scale_shape(shape, (1, group))
    expected = {
        name: (packed.shape, (shape[0], -(-shape[-1] // factor))),
        f"{weight}_scale": (scale.shape, scales),
    }
    if "zero_point" in others:
        own = others["zero_point"].shape
        expected[f"{weight}_zero_point"] = (own, (-(-shape[0] // factor), scales[1]))
    if "g_idx" in others:
        expected[f"{weight}_g_idx"] = (others["g_idx"].shape, shape[-1:])
    _require_whole(folder, {name: packed} | {f"{weight}_{k}": one for k, one in others.items()})
    for part, (own, wanted) in expected.items():
        if own != wanted:
            raise UserError(
                f"{folder}: {part} is {list(own)}, but a weight of {list(shape)} in groups of "
                f"{group} implies {list(wanted)}"
            )
    keywords = [key for key in ("zero_point", "g_idx") if key in others]

    def compute(packed: Any, scale: Any, *rest: Any) -> Any:
        given = dict(zip(keywords, rest, strict=True))
        return dequantize_packed(
            packed,
            scale,
            given.get("zero_point"),
            given.get("g_idx"),
            dtype=dtype,
            bits=int(scheme.bits or 0),
            columns=shape[1],
            group=group,
        )

    found[weight] = Derived((packed, scale, *(others[k] for k in keywords)), compute, dtype, shape)


def _noted_shape(folder: Path, name: str, size: Entry) -> tuple[int, ...]:
    """The shape that a `.weight_shape` holds."""
    whole = size.shape == (2,) and size.dtype in (torch.int64, torch.int32)
    shape = tuple(read_entry(size, name).tolist()) if whole else ()
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{folder}: {name} is not the two sizes of a weight")
    return shape


def _require_whole(folder: Path, parts: dict[str, Entry]) -> None:
    """Raise a UserError unless these, by name, are of whole numbers, packed ones of int32."""
    for name, part in parts.items():
        index = name.endswith("g_idx") and part.dtype == torch.int64
        if part.dtype != torch.int32 and not index:
            kind = dtype_name(part.dtype)
            raise UserError(f"{folder}: {name} is {kind}; packed integers are int32")


def _qweight(
    folder: Path, found: dict[str, AnyEntry], name: str, scheme: Scheme, dtype: torch.dtype
) -> None:
    """AWQ's and GPTQ's `.qweight`."""
    stem = name.removesuffix("qweight")
    weight = f"{stem}weight"
    if scheme.method not in ("awq", "gptq") or scheme.bits is None:
        raise UserError(f"{folder}: {name} is packed, but config.json names neither awq nor gptq")
    names = (name, f"{stem}qzeros", f"{stem}scales")
    packed, zero, scale = _take(folder, found, weight, names)
    factor = 32 // scheme.bits
    awq = scheme.method == "awq"
    if len(packed.shape) != 2 or 0 in packed.shape:
        raise _misfit(folder, name, packed.shape, scale)
    _require_whole(folder, {name: packed, names[1]: zero})
    _require_floats(folder, names[2], scale)
    columns = packed.shape[0] * (1 if awq else factor)
    rows = packed.shape[-1] * (factor if awq else 1)
    group = scheme.group or columns
    groups = -(-columns // group)
    if scale.shape != (groups, rows) or zero.shape != (groups, rows // factor):
        raise UserError(
            f"{folder}: {name} {list(packed.shape)}, {stem}qzeros {list(zero.shape)} and "
            f"{stem}scales {list(scale.shape)} do not fit together in groups of {group}"
        )
    sources: tuple[Entry, ...] = (packed, zero, scale)
    compute: Callable[..., Any] = partial(
        dequantize_awq, dtype=dtype, bits=scheme.bits, group=group
    )
    if not awq:
        compute = partial(
            dequantize_gptq,
            dtype=dtype,
            bits=scheme.bits,
            group=group,
            zero_offset=scheme.zero_offset,
        )
        if f"{stem}g_idx" in found or (scheme.shuffled and groups > 1):
            (index,) = _take(folder, found, weight, (f"{stem}g_idx",))
            _require_whole(folder, {f"{stem}g_idx": index})
            if index.shape != (columns,):
                raise _misfit(folder, f"{stem}g_idx", index.shape, packed)
            sources = (*sources, index)
    found[weight] = Derived(sources, compute, dtype, (rows, columns))
