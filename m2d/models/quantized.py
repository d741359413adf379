"""Quantised weights as the hub keeps them, back to floating point.

MXFP4 (GPT-OSS): blocks of 32 values of 4 bits along the input axis, two to a byte, low half first,
with one power of two per block. Block-wise FP8 (DeepSeek-V3, Qwen3-FP8): float8 values with one
float32 scale per rectangle, under the weight's name with `_scale_inv` appended.
"""

import torch
from torch import Tensor

# E2M1: a sign, two bits of exponent, one of mantissa.
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_BLOCK = 32
MXFP4_EXPONENT_BIAS = 127
FP8_BLOCK = (128, 128)
FP8_SUFFIX = "_scale_inv"
MXFP4_SUFFIXES = ("_blocks", "_scales")


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks [..., G, B] and scales [..., G], both uint8, to values [..., G * 2B] of `dtype`.

    Every value is a small number times a power of two, hence exact in bfloat16.
    """
    # A byte is two values: one look-up of 4 bytes gives both.
    table = _byte_values().view(torch.int32).reshape(-1)
    pairs = table.index_select(0, blocks.reshape(-1).int())
    values = pairs.view(torch.bfloat16).view(*blocks.shape[:-1], 2 * blocks.shape[-1])
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - MXFP4_EXPONENT_BIAS)
    return values.mul_(powers.bfloat16()[..., None]).flatten(-2).to(dtype)


def _byte_values() -> Tensor:
    """The two values of every byte, bfloat16 [256, 2]."""
    table = torch.tensor([*MXFP4_VALUES, *(-value for value in MXFP4_VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([table[byte & 15], table[byte >> 4]], dim=-1)


def dequantize_fp8(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] = FP8_BLOCK
) -> Tensor:
    """weight [..., R, C] float8 and scale [..., ceil(R / b0), ceil(C / b1)] to [..., R, C].

    A scale of one element holds for the whole weight.
    """
    values = weight.float()
    if scale.numel() == 1:
        return (values * scale.float()).to(dtype)
    rows = scale.float().repeat_interleave(block[0], dim=-2)[..., : weight.shape[-2], :]
    return (values * rows.repeat_interleave(block[1], dim=-1)[..., : weight.shape[-1]]).to(dtype)


def fp8_scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight of that shape."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
