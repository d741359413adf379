"""Quantised copies of tiny teachers, written by hand as the hub keeps them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MXFP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MXFP4 += [-value for value in MXFP4]


def mxfp4_value(nibble: int, exponent: int) -> float:
    """One number: sign, magnitude, and the block's power of two."""
    return MXFP4[nibble] * 2.0 ** (exponent - 127)


def slow_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., G, B] and [..., G] to [..., G * 2B], number by number."""
    values = []
    for row, exponents in zip(
        blocks.flatten(0, -3).tolist(), scales.flatten(0, -2).tolist(), strict=True
    ):
        for block, exponent in zip(row, exponents, strict=True):
            for byte in block:
                values += [mxfp4_value(byte & 15, exponent), mxfp4_value(byte >> 4, exponent)]
    return torch.tensor(values).view(*blocks.shape[:-2], -1)


def to_mxfp4(folder: Path) -> Path:
    """Replace a GPT-OSS teacher's experts by random MXFP4 ones; everything else to bfloat16."""
    generator = torch.Generator().manual_seed(5)
    tensors = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(
            122, 126, shape[:-1], dtype=torch.uint8, generator=generator
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return edit_config(folder, dtype="bfloat16", quantization_config=quantization)


def to_fp8(folder: Path, block: tuple[int, int], skip: tuple[str, ...]) -> Path:
    """Quantise a teacher's linear weights block by block, as DeepSeek-V3 ships."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if tensor.dim() != 2 or any(part in name for part in skip):
            continue
        rows, columns = tensor.shape
        scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = (
                    slice(i * block[0], (i + 1) * block[0]),
                    slice(j * block[1], (j + 1) * block[1]),
                )
                scale[i, j] = tensor[part].abs().max() / 448
                quantised[part] = (tensor[part] / scale[i, j]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = quantised, scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    return edit_config(folder, quantization_config=quantization)


def slow_fp8(folder: Path, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The tensors of such a teacher in float32, dequantised block by block."""
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.float()
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    rows = slice(i * block[0], (i + 1) * block[0])
                    value[rows, j * block[1] : (j + 1) * block[1]] *= scale[i, j]
        plain[name] = value
    return plain


def edit_config(folder: Path, **changes: object) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder
