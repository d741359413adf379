"""Which tensors of a checkpoint are quantised, how, and what each becomes when it is read.

A repository says how its weights are quantised in config.json (`quantization_config`, in older ones
`compression_config`) or, ModelOpt's, in hf_quant_config.json. The names beside a weight say which
layout it has: `.weight_scale_inv` or `.weight_scale`, `.weight_packed`, `.qweight`. What is not
understood to the last tensor is refused: a float8 or packed tensor is never taken for a weight.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.models.entries import AnyEntry, Derived, Entry, read_entry
from m2d.models.quantized import (
    FP8_BLOCK,
    NVFP4_BLOCK,
    dequantize_awq,
    dequantize_gptq,
    dequantize_nvfp4,
    dequantize_packed,
    dequantize_scaled,
    scale_shape,
)

MODELOPT_FILE = "hf_quant_config.json"
# Of config.json.
QUANTISATION_KEYS = ("quantization_config", "compression_config")
METHODS = ("mxfp4", "fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "awq", "gptq")
FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)
MODELOPT_ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W8A8_FP8")
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


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's weights are quantised, as far as its tensors do not say themselves."""

    method: str | None = None
    block: tuple[int, int] = FP8_BLOCK
    """Of scaled weights."""
    bits: int | None = None
    """Of packed integers."""
    group: int | None = None
    """Input columns that share a scale, of packed or int8 weights; None: all."""
    zero_offset: int = 0
    """GPTQ: how much too small the stored zero points are."""


def read_scheme(folder: Path, config: dict[str, Any]) -> Scheme:
    """The scheme that config.json and ModelOpt's file name.

    Raises UserError, with its name, for one that m2d does not read.
    """
    settings, where = _settings(folder, config)
    if not settings:
        return Scheme()
    method = settings.get("quant_method")

    def refuse(what: str) -> UserError:
        return UserError(
            f"{where}: its weights are quantised with {what}; m2d reads unquantised weights and "
            f"{', '.join(METHODS)}"
        )

    if method not in METHODS:
        raise refuse(repr(method))
    if method == "modelopt":
        algorithm = settings.get("quant_algo")
        if algorithm not in MODELOPT_ALGORITHMS:
            raise refuse(f"ModelOpt's {algorithm}")
        return Scheme(method)
    if method == "compressed-tensors":
        return _compressed(settings, refuse)
    if method in ("awq", "gptq"):
        return _integers(method, settings, refuse)
    block = settings.get("weight_block_size") or FP8_BLOCK
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(map(_positive, block))):
        raise UserError(f"{where}: weight_block_size is {block!r}; it must be two positive numbers")
    return Scheme(method, (block[0], block[1]))


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _settings(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in QUANTISATION_KEYS:
            if found := part.get(key):
                if not isinstance(found, dict):
                    raise UserError(f"{folder / 'config.json'}: {key} must be an object")
                if key == "compression_config":
                    found = {"quant_method": "compressed-tensors", **found}
                return found, folder / "config.json"
    file = folder / MODELOPT_FILE
    if not file.is_file():
        return {}, file
    found = read_json(file)
    inner = found.get("quantization") if isinstance(found, dict) else None
    if not isinstance(inner, dict):
        raise UserError(f"{file}: has no quantization section")
    return {**inner, "quant_method": "modelopt"}, file


def _compressed(settings: dict[str, Any], refuse: Callable[[str], UserError]) -> Scheme:
    layout = settings.get("format")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if layout not in FORMATS or sparsity != "dense":
        raise refuse(f"compressed-tensors' {layout if layout not in FORMATS else sparsity}")
    weights = [
        group["weights"]
        for group in (settings.get("config_groups") or {}).values()
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    integers = [w for w in weights if w.get("type") == "int"]
    kinds = {(w.get("num_bits"), w.get("group_size")) for w in integers}
    blocks = {tuple(w.get("block_structure") or FP8_BLOCK) for w in weights}
    if len(kinds) > 1 or len(blocks) > 1:
        raise refuse("compressed-tensors' groups of several widths")
    bits, group = kinds.pop() if kinds else (None, None)
    if bits is not None and bits not in (2, 4, 8):
        raise refuse(f"integers of {bits} bits")
    block = blocks.pop() if blocks else FP8_BLOCK
    if not (len(block) == 2 and all(map(_positive, block))):
        raise refuse(f"blocks of {block}")
    group = group if _positive(group) else None
    return Scheme("compressed-tensors", (block[0], block[1]), bits, group)


def _integers(method: str, settings: dict[str, Any], refuse: Callable[[str], UserError]) -> Scheme:
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size"))
    layout = str(settings.get("version", "gemm") or "gemm").lower() if method == "awq" else ""
    stored = str(settings.get("checkpoint_format") or "gptq").lower()
    if method == "awq" and (bits != 4 or layout != "gemm"):
        raise refuse(f"awq of {bits} bits in the layout {layout!r}")
    if method == "gptq" and (bits not in (2, 4, 8) or stored not in ("gptq", "gptq_v2")):
        raise refuse(f"gptq of {bits} bits in the layout {stored!r}")
    offset = 1 if stored == "gptq" and method == "gptq" else 0
    return Scheme(method, bits=bits, group=group if _positive(group) else None, zero_offset=offset)


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
    scale_name = next((name + suffix for suffix in SCALES if name + suffix in found), None)
    weight = found[name]
    assert isinstance(weight, Entry)
    if scale_name is None:
        raise UserError(
            f"{folder}: {name} is {str(weight.dtype).removeprefix('torch.')} and has no "
            f"{name}_scale or {name}_scale_inv beside it; without its scale it is no weight"
        )
    (scale,) = _take(folder, found, name, (scale_name,))
    zero_name = f"{name}_zero_point"
    zeros = _take(folder, found, name, (zero_name,)) if zero_name in found else []
    found.pop(f"{name}_shape", None)
    if not (scale.dtype.is_floating_point and scale.dtype not in FLOAT8):
        raise UserError(f"{folder}: {scale_name} is {scale.dtype}; m2d reads scales in floats")
    scale, block = _block_of(folder, scale_name, weight, scale, scheme)
    if zeros and zeros[0].shape != scale.shape:
        zeros = [Entry(zeros[0].file, zeros[0].dtype, scale.shape, zeros[0].start, zeros[0].nbytes)]
    compute = partial(dequantize_scaled, dtype=dtype, block=block)
    found[name] = Derived((weight, scale, *zeros), compute, dtype, weight.shape)


def _block_of(
    folder: Path, name: str, weight: Entry, scale: Entry, scheme: Scheme
) -> tuple[Entry, tuple[int, int]]:
    """The scale, with as many axes as the weight, and the rectangle that each number is for."""
    if scale.shape in ((), (1,)):
        return scale, scheme.block
    if len(weight.shape) < 2:
        raise _misfit(folder, name, scale.shape, weight)
    rows, columns = weight.shape[-2:]
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
    raise UserError(
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
    others = {}
    for part in ("zero_point", "g_idx"):
        if f"{weight}_{part}" in found:
            (others[part],) = _take(folder, found, weight, (f"{weight}_{part}",))
    factor = 32 // scheme.bits
    shape = tuple(int(n) for n in read_entry(size, f"{weight}_shape").tolist())
    group = scheme.group or shape[-1]
    expected = {
        name: (packed.shape, (shape[0], -(-shape[-1] // factor))),
        f"{weight}_scale": (scale.shape, scale_shape(shape, (1, group))),
    }
    if "zero_point" in others:
        rows, groups = scale.shape
        expected[f"{weight}_zero_point"] = (
            others["zero_point"].shape,
            (-(-rows // factor), groups),
        )
    for part, (own, wanted) in expected.items():
        if len(shape) != 2 or own != wanted or packed.dtype != torch.int32:
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


def _qweight(
    folder: Path, found: dict[str, AnyEntry], name: str, scheme: Scheme, dtype: torch.dtype
) -> None:
    """AWQ's and GPTQ's `.qweight`."""
    stem = name.removesuffix("qweight")
    weight = f"{stem}weight"
    if scheme.method not in ("awq", "gptq") or scheme.bits is None:
        raise UserError(f"{folder}: {name} is packed, but config.json names neither awq nor gptq")
    packed, zero, scale = _take(folder, found, weight, (name, f"{stem}qzeros", f"{stem}scales"))
    factor = 32 // scheme.bits
    awq = scheme.method == "awq"
    columns = packed.shape[0] * (1 if awq else factor)
    rows = packed.shape[-1] * (factor if awq else 1)
    group = scheme.group or columns
    groups = -(-columns // group)
    if (
        len(packed.shape) != 2
        or scale.shape != (groups, rows)
        or zero.shape != (groups, rows // factor)
        or {packed.dtype, zero.dtype} != {torch.int32}
    ):
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
        index = found.pop(f"{stem}g_idx", None)
        sources = (*sources, index) if isinstance(index, Entry) else sources
    found[weight] = Derived(sources, compute, dtype, (rows, columns))
