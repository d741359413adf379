"""Quantised copies of a teacher in the formats that the hub has, and their values one by one.

Written from the formats' documentation, and not from m2d: every `to_*` makes integers or float8
numbers of a weight, stores them as the format says, and gives back what they stand for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.family_quantized import MXFP4, edit_config

GROUP = 16
KEPT = ("gate.weight", "embed_tokens", "lm_head", "norm")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: the column that each nibble of a word is of
FLOAT8 = torch.float8_e4m3fn

Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors beside one another, by the end of their names, and what the weight is."""


def signed_word(value: int) -> int:
    """An unsigned word as the int32 of the same bits."""
    return value - 2**32 if value >= 2**31 else value


def pack_words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row's unsigned integers, 32 / bits to an int32, the first in the lowest bits."""
    per = 32 // bits
    packed = []
    for row in rows:
        padded = row + [0] * (-len(row) % per)
        words = [padded[i : i + per] for i in range(0, len(padded), per)]
        packed.append([signed_word(sum(v << (bits * i) for i, v in enumerate(w))) for w in words])
    return torch.tensor(packed, dtype=torch.int32)


def integers(weight: Tensor, bits: int, symmetric: bool) -> tuple[list, list, list]:
    """Integers [R][C], scales [R][G] and zero points [R][G], by groups of GROUP columns."""
    top = 2**bits - 1
    values, scales, zeros = [], [], []
    for row in weight.tolist():
        values.append([])
        scales.append([])
        zeros.append([])
        for start in range(0, len(row), GROUP):
            part = row[start : start + GROUP]
            if symmetric:
                scale = max(map(abs, part)) / (top // 2)
                zero = (top + 1) // 2
            else:
                scale = (max(part) - min(part)) / top
                zero = round(-min(part) / scale)
            scale = float(torch.tensor(scale).bfloat16())
            zero = min(max(zero, 0), top)
            scales[-1].append(scale)
            zeros[-1].append(zero)
            values[-1] += [min(max(round(v / scale) + zero, 0), top) for v in part]
    return values, scales, zeros


def value_of(values: list, scales: list, zeros: list, groups: list[int] | None = None) -> Tensor:
    """(integer - zero) * scale, one by one."""
    rows = []
    for row, scale, zero in zip(values, scales, zeros, strict=True):
        own = groups or [column // GROUP for column in range(len(row))]
        rows.append([(v - zero[g]) * scale[g] for v, g in zip(row, own, strict=True)])
    return torch.tensor(rows)


def fp8_tensor(weight: Tensor) -> Packed:
    """vLLM's and ModelOpt's static FP8: one scale, with another for the activations."""
    scale = weight.abs().max() / 448
    quantised = (weight / scale).to(FLOAT8)
    parts = {"weight": quantised, "weight_scale": scale.reshape(())}
    return parts | {"input_scale": torch.tensor(0.01)}, quantised.float() * scale


def fp8_channel(weight: Tensor) -> Packed:
    """compressed-tensors' FP8 by output channel: scales [R, 1], bfloat16."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    quantised = (weight / scale.float()).to(FLOAT8)
    return {"weight": quantised, "weight_scale": scale}, quantised.float() * scale.float()


def fp8_row(weight: Tensor) -> Packed:
    """The same with scales [R]."""
    parts, value = fp8_channel(weight)
    return {**parts, "weight_scale": parts["weight_scale"].flatten()}, value


def fp8_block(weight: Tensor) -> Packed:
    """compressed-tensors' FP8 by blocks of 16 x 16."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // 16), -(-columns // 16))
    quantised, value = torch.empty_like(weight).to(FLOAT8), torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16))
            scale[i, j] = weight[at].abs().max() / 448
            quantised[at] = (weight[at] / scale[i, j]).to(FLOAT8)
            value[at] = quantised[at].float() * scale[i, j]
    return {"weight": quantised, "weight_scale": scale}, value


def int8_channel(weight: Tensor) -> Packed:
    """compressed-tensors' INT8, symmetric, by output channel."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    quantised = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": quantised, "weight_scale": scale}, quantised.float() * scale.float()


def int8_zero(weight: Tensor) -> Packed:
    """The same with zero points."""
    scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 255
    zero = (-128 - weight.amin(1, keepdim=True) / scale).round().clamp(-128, 127).to(torch.int8)
    quantised = (weight / scale + zero.float()).round().clamp(-128, 127).to(torch.int8)
    value = (quantised.float() - zero.float()) * scale
    return {"weight": quantised, "weight_scale": scale, "weight_zero_point": zero}, value


def pack_quantized(weight: Tensor, bits: int, symmetric: bool, shuffled: bool = False) -> Packed:
    """compressed-tensors' W4A16 and W8A16: words along the columns, zero points along the rows."""
    values, scales, zeros = integers(weight, bits, symmetric)
    groups = [column // GROUP for column in range(weight.shape[1])]
    if shuffled:
        groups = [groups[(7 * column) % len(groups)] for column in range(len(groups))]
    parts = {
        "weight_packed": pack_words(values, bits),
        "weight_scale": torch.tensor(scales).bfloat16(),
        "weight_shape": torch.tensor(list(weight.shape)),
    }
    if not symmetric:
        by_group = [list(column) for column in zip(*zeros, strict=True)]
        parts["weight_zero_point"] = pack_words(by_group, bits).T.contiguous()
    if shuffled:
        parts["weight_g_idx"] = torch.tensor(groups, dtype=torch.int32)
    return parts, value_of(values, scales, zeros, groups)


def awq(weight: Tensor) -> Packed:
    """AutoAWQ's gemm version: [in, out / 8], the eight columns of a word in AWQ's order."""
    values, scales, zeros = integers(weight, 4, symmetric=False)

    def shuffled(columns: list[list[int]]) -> list[list[int]]:
        """By input row (or group), the output columns in the order of their bits."""
        rows = [list(row) for row in zip(*columns, strict=True)]
        return [
            [row[start + i] for start in range(0, len(row), 8) for i in AWQ_ORDER] for row in rows
        ]

    parts = {
        "qweight": pack_words(shuffled(values), 4),
        "qzeros": pack_words(shuffled(zeros), 4),
        "scales": torch.tensor(scales).T.contiguous().half(),
    }
    halves = torch.tensor(scales).half().tolist()
    return parts, value_of(values, halves, zeros)


def gptq(weight: Tensor, bits: int, offset: int, shuffled: bool) -> Packed:
    """GPTQ: [in / P, out]; zero points are stored `offset` too small; any column in any group."""
    values, scales, zeros = integers(weight, bits, symmetric=False)
    zeros = [[max(zero, 1) for zero in row] for row in zeros]
    halves = torch.tensor(scales).half()
    groups = [column // GROUP for column in range(weight.shape[1])]
    if shuffled:
        groups = [groups[(7 * column) % len(groups)] for column in range(len(groups))]
    by_group = [[zero - offset for zero in column] for column in zip(*zeros, strict=True)]
    parts = {
        "qweight": pack_words(values, bits).T.contiguous(),
        "qzeros": pack_words(by_group, bits),
        "scales": halves.T.contiguous(),
        "g_idx": torch.tensor(groups, dtype=torch.int32),
    }
    return parts, value_of(values, halves.tolist(), zeros, groups)


def nvfp4(weight: Tensor, modelopt: bool) -> Packed:
    """4-bit floats by 16 with a float8 scale each, times (ModelOpt) or over one for all."""
    whole = weight.abs().max() / (6 * 448)
    rows = []
    scales = torch.empty(weight.shape[0], weight.shape[1] // 16).to(FLOAT8)
    value = torch.empty_like(weight)
    for r, row in enumerate(weight):
        nibbles = []
        for g in range(scales.shape[1]):
            part = row[16 * g : 16 * g + 16]
            scales[r, g] = (part.abs().max() / 6 / whole).to(FLOAT8)
            step = float(scales[r, g]) * float(whole)
            for i, number in enumerate(part.tolist()):
                nibble = min(range(16), key=lambda n: abs(MXFP4[n] * step - number))
                nibbles.append(nibble)
                value[r, 16 * g + i] = MXFP4[nibble] * step
        rows.append([nibbles[i] | nibbles[i + 1] << 4 for i in range(0, len(nibbles), 2)])
    packed = torch.tensor(rows, dtype=torch.uint8)
    if modelopt:
        parts = {"weight": packed, "weight_scale": scales, "weight_scale_2": whole.reshape(())}
        return parts | {"input_scale": torch.tensor(0.01)}, value
    parts = {"weight_packed": packed, "weight_scale": scales}
    return parts | {"weight_global_scale": (1 / whole).reshape(1)}, value


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed_settings(bits: int) -> dict[str, Any]:
    return compressed("pack-quantized", type="int", num_bits=bits, group_size=GROUP)


def gptq_settings(bits: int, stored: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": True,
        "checkpoint_format": stored,
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
INT8 = compressed("int-quantized", type="int", num_bits=8, strategy="channel")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
Format = tuple[Callable[[Tensor], Packed], dict[str, Any] | None, dict[str, Any] | None]
# Name -> the packer, quantization_config of config.json, and the content of hf_quant_config.json.
FORMATS: dict[str, Format] = {
    "fp8, one scale": (fp8_tensor, FP8, None),
    "modelopt fp8": (fp8_tensor, None, {"quantization": {"quant_algo": "FP8"}}),
    "modelopt fp8 in config.json": (
        fp8_tensor,
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        None,
    ),
    "fbgemm fp8": (fp8_channel, {"quant_method": "fbgemm_fp8"}, None),
    "scales that nobody declares": (fp8_row, None, None),
    "compressed fp8, channels": (
        fp8_channel,
        compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
        None,
    ),
    "compressed fp8, blocks": (
        fp8_block,
        compressed(
            "float-quantized", type="float", num_bits=8, strategy="block", block_structure=[16, 16]
        ),
        None,
    ),
    "compressed int8": (int8_channel, INT8, None),
    "compressed int8 with zeros": (int8_zero, INT8, None),
    "compressed w4a16": (lambda w: pack_quantized(w, 4, True), packed_settings(4), None),
    "compressed w8a16": (lambda w: pack_quantized(w, 8, True), packed_settings(8), None),
    "compressed w4a16 with zeros": (
        lambda w: pack_quantized(w, 4, False),
        packed_settings(4),
        None,
    ),
    "compressed w4a16, columns in any order": (
        lambda w: pack_quantized(w, 4, True, shuffled=True),
        packed_settings(4),
        None,
    ),
    "compressed nvfp4": (
        lambda w: nvfp4(w, modelopt=False),
        compressed("nvfp4-pack-quantized", type="float", num_bits=4, group_size=16),
        None,
    ),
    "modelopt nvfp4": (
        lambda w: nvfp4(w, modelopt=True),
        None,
        {"quantization": {"quant_algo": "NVFP4"}},
    ),
    "awq": (awq, AWQ, None),
    "gptq": (lambda w: gptq(w, 4, 1, shuffled=True), gptq_settings(4, "gptq"), None),
    "gptq v2, 8 bits": (lambda w: gptq(w, 8, 0, shuffled=False), gptq_settings(8, "gptq_v2"), None),
}


def quantise(folder: Path, name: str) -> dict[str, Tensor]:
    """Quantise a teacher's linear weights in place; gives what its tensors then are, float32."""
    pack, settings, modelopt = FORMATS[name]
    tensors, plain = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() != 2 or any(part in key for part in KEPT):
            tensors[key] = plain[key] = tensor
            continue
        parts, plain[key] = pack(tensor)
        tensors |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=settings)
    if modelopt:
        (folder / "hf_quant_config.json").write_text(json.dumps(modelopt))
    return plain
