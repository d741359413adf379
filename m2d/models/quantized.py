"""Quantised weights as the hub keeps them, back to floating point.

MXFP4 (GPT-OSS): blocks of 32 values of 4 bits along the input axis, two to a byte, low half first,
with one power of two per block. Scaled weights (float8 or int8): one scale for the whole weight,
for each row, or for each rectangle (DeepSeek-V3, Qwen3-FP8), to multiply with. NVFP4: 4-bit values
in blocks of 16 with a float8 scale each and one more for the whole weight. Packed integers
(compressed-tensors, AWQ, GPTQ): several to an int32, each with a scale and perhaps a zero point per
group of input columns. m2d/models/quantized_entries.py says which tensor is which.

Each raises ValueError for contents that no quantiser writes: a scale that is not finite, of zero
where the numbers are not, or, but of integers in groups, negative; a zero point that its bits do
not hold.

Shapes: R output rows, C input columns, G groups of columns, P integers in an int32.
"""

import torch
from torch import Tensor

# E2M1: a sign, two bits of exponent, one of mantissa.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_BLOCK = 32
MXFP4_EXPONENT_BIAS = 127
E8M0_NAN = 255
MXFP4_SUFFIXES = ("_blocks", "_scales")
FP8_BLOCK = (128, 128)
NVFP4_BLOCK = 16
# AWQ (gemm): the columns of a group of eight, in the order of their bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks [..., G, B] and scales [..., G], both uint8, to values [..., G * 2B] of `dtype`.

    Every value is a small number times a power of two, hence exact in bfloat16.
    """
    if bool((scales == E8M0_NAN).any()):
        raise ValueError("a scale is NaN")
    values = _fp4_pairs(blocks)
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - MXFP4_EXPONENT_BIAS)
    return values.mul_(powers.bfloat16()[..., None]).flatten(-2).to(dtype)


def _fp4_pairs(packed: Tensor) -> Tensor:
    """The values of uint8 [..., B], two to a byte and the low half first: bfloat16 [..., 2B]."""
    # A byte is two values: one look-up of 4 bytes gives both.
    table = _byte_values().view(torch.int32).reshape(-1)
    pairs = table.index_select(0, packed.reshape(-1).int())
    return pairs.view(torch.bfloat16).view(*packed.shape[:-1], 2 * packed.shape[-1])


def _byte_values() -> Tensor:
    """The two values of every byte, bfloat16 [256, 2]."""
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([table[byte & 15], table[byte >> 4]], dim=-1)


def dequantize_scaled(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    dtype: torch.dtype,
    block: tuple[int, int],
) -> Tensor:
    """weight [..., R, C] and scale [..., ceil(R / b0), ceil(C / b1)] to [..., R, C].

    The value is (weight - zero) * scale. A scale of one element holds for the whole weight.
    """
    values = weight.float()
    if zero is not None:
        if not bool(((zero >= -128) & (zero <= 127)).all()):
            raise ValueError("a zero point lies outside the 8 bits of the weight")
        values = values - _spread(zero.float(), weight.shape, block)
    scale = _plausible(scale)
    return _product(values, _spread(scale, weight.shape, block), scale).to(dtype)


def _plausible(scale: Tensor, signed: bool = False) -> Tensor:
    """Scales in float32. signed: some quantisers of integers write negative ones."""
    found = scale.float()
    sound = found.isfinite() if signed else found.isfinite() & (found >= 0)
    if not bool(sound.all()):
        count, first = int((~sound).sum()), float(found[~sound][0])
        raise ValueError(f"{count} of {found.numel()} scales cannot be right, such as {first:g}")
    return found


def _product(values: Tensor, spread: Tensor, scale: Tensor) -> Tensor:
    """values * spread; scale: the same scales before they were spread."""
    if bool((scale == 0).any()) and bool(((values != 0) & (spread == 0)).any()):
        raise ValueError("a scale is 0 where the quantised numbers are not")
    return values * spread


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """A scale for every element, or what broadcasts to it."""
    if scale.numel() == 1:
        return scale.reshape(())
    for dim, size in ((-2, block[0]), (-1, block[1])):
        if scale.shape[dim] not in (1, shape[dim]):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return scale


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight of that shape."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize_nvfp4(
    packed: Tensor, scale: Tensor, whole: Tensor, *, dtype: torch.dtype, divide: bool
) -> Tensor:
    """uint8 [R, C / 2], float8 scale [R, C / 16] and one float32 `whole` to [R, C].

    divide: whether `whole` divides the scales (compressed-tensors) or multiplies them (ModelOpt).
    """
    factor = _plausible(whole).reshape(())
    if factor == 0:
        raise ValueError("the scale of the whole weight is 0")
    values = _fp4_pairs(packed).float()
    # One of a block may be 0: the smallest are, once they are rounded to float8.
    scales = _plausible(scale) * (1 / factor if divide else factor)
    scales = scales.repeat_interleave(NVFP4_BLOCK, -1)
    return (values * scales).to(dtype)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned integers of an int32 tensor [A, B], the lowest bits first, along `dim`."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    wide = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # [A, B, P]
    return wide.flatten(-2) if dim == 1 else wide.transpose(1, 2).flatten(0, 1)


def dequantize_packed(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    dtype: torch.dtype,
    bits: int,
    columns: int,
    group: int,
) -> Tensor:
    """compressed-tensors' packed integers: int32 [R, C / P] and scale [R, G] to [R, C].

    Stored are signed integers plus 2^(bits - 1). zero: int32 [R / P, G], packed along the rows in
    the same way. groups [C]: the group of each column, where they are not in order.
    """
    offset = 1 << (bits - 1)
    values = (unpack(packed, bits, 1)[:, :columns] - offset).float()
    in_order = groups is None or bool((groups == -1).all())
    place = _groups(None if in_order else groups, columns, group, scale.shape[1])
    scales = _plausible(scale, signed=True)
    if zero is not None:
        zeros = (unpack(zero, bits, 0)[: len(values)] - offset).float()
        values = values - zeros[:, place]
    return _product(values, scales[:, place], scales).to(dtype)


def _groups(groups: Tensor | None, columns: int, group: int, count: int) -> Tensor:
    """The group of each column [C], of `count`; in order where `groups` does not say otherwise."""
    if groups is None:
        return torch.arange(columns) // group
    if not bool(((groups >= 0) & (groups < count)).all()):
        raise ValueError(f"g_idx names groups outside 0 to {count - 1}")
    return groups.long()


def dequantize_awq(
    packed: Tensor, zero: Tensor, scale: Tensor, *, dtype: torch.dtype, bits: int, group: int
) -> Tensor:
    """AWQ's gemm layout: int32 [C, R / 8], zeros int32 [G, R / 8] and scale [G, R] to [R, C]."""
    order = torch.tensor(AWQ_ORDER).argsort()

    def integers(whole: Tensor) -> Tensor:
        return unpack(whole, bits, 1).unflatten(-1, (-1, len(order)))[..., order].flatten(-2)

    place = _groups(None, len(packed), group, len(scale))
    scales = _plausible(scale, signed=True)
    integral = (integers(packed) - integers(zero)[place]).float()
    values = _product(integral, scales[place], scales)
    return values.T.contiguous().to(dtype)


def dequantize_gptq(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    groups: Tensor | None = None,
    *,
    dtype: torch.dtype,
    bits: int,
    group: int,
    zero_offset: int,
) -> Tensor:
    """GPTQ: int32 [C / P, R], zeros int32 [G, R / P] and scale [G, R] to [R, C].

    Stored zeros are `zero_offset` too small. groups [C]: the group of each column.
    """
    values = unpack(packed, bits, 0)
    place = _groups(groups, len(values), group, len(scale))
    scales = _plausible(scale, signed=True)
    zeros = unpack(zero, bits, 1) + zero_offset
    if bool((zeros >= 1 << bits).any()):  # programs do not agree on what it wraps to
        raise ValueError(f"a zero point is {1 << bits}, which {bits} bits do not hold")
    wide = _product((values - zeros[place]).float(), scales[place], scales)
    return wide.T.contiguous().to(dtype)
