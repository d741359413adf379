"""What a model takes to serve: its weights, and the keys and values of the tokens that it has read.

From the shapes of a model's parameters by name, however they were found; no torch is imported.
"""

import re
from collections.abc import Mapping
from typing import Any

# Bits of a weight as programs keep it: the last two with llama.cpp's scale for every 32 weights
# (Q8_0; Q4_0 and Q4_K).
BITS = {"bf16": 16.0, "8-bit": 8.5, "4-bit": 4.5}
TOKENS = 1000
CACHE_BYTES = 2  # of a value in the cache: bfloat16 or float16
# Layers of these kinds keep something per token; others (linear attention, Mamba, convolutions) a
# state whose size does not depend on how many there were.
LIMITED, UNLIMITED = {"sliding_attention", "chunked_attention"}, {"full_attention"}
OUTPUTS = ("o_proj", "dense", "out_proj")
OTHER_PARTS = re.compile(r"\b(visual|vision\w*|audio\w*|image\w*|mtp)\.")


def footprint(shapes: Mapping[str, tuple[int, ...]], config: Any, active: int) -> dict[str, Any]:
    """Sizes in bytes.

    shapes: of every parameter, by name, tied ones once. config: of the language model. active:
    parameters that a token uses.
    """
    count = sum(_product(shape) for shape in shapes.values())
    return {
        "parameters": count,
        "active_parameters": active,
        "weight_bytes": {name: round(count * bits / 8) for name, bits in BITS.items()},
        "kv_cache_bytes": kv_cache_bytes(shapes, config),
    }


def kv_cache_bytes(shapes: Mapping[str, tuple[int, ...]], config: Any, tokens: int = TOKENS) -> int:
    """Bytes that a sequence of so many tokens has in the cache.

    Latent attention (DeepSeek's) is taken to be cached compressed, as serving programs do; a layer
    with a sliding window keeps no more tokens than that.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(
        config, "attention_chunk_size", None
    )
    if kinds is None and not getattr(config, "use_sliding_window", True):
        window = None
    total = 0
    for layer, values in values_per_token(shapes).items():
        kind = kinds[layer] if kinds and layer < len(kinds) else None
        if kind is None or kind in LIMITED:
            kept = min(tokens, window or tokens)
        else:
            kept = tokens if kind in UNLIMITED else 0
        total += values * kept
    return total * CACHE_BYTES


def values_per_token(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    """Layer -> how many values of keys and values a token has there."""
    found: dict[int, int] = {}
    for name, shape in shapes.items():
        match = re.search(r"\b(?:layers|blocks)\.(\d+)\.(.*)\.(\w+)\.weight$", name)
        if match is None or OTHER_PARTS.search(name):
            continue
        part = match[3]
        if part in ("k_proj", "v_proj", "kv_a_proj_with_mqa"):
            values = shape[0]
        elif part in ("qkv_proj", "query_key_value", "Wqkv"):
            path = name.removesuffix(f"{part}.weight")
            outputs = [shapes.get(f"{path}{output}.weight") for output in OUTPUTS]
            # The output projection reads as many values as the queries are wide.
            values = next((shape[0] - output[1] for output in outputs if output), 0)
        else:
            continue
        layer = int(match[1])
        found[layer] = found.get(layer, 0) + values
    return found


def as_lines(found: Mapping[str, Any], title: str) -> list[str]:
    """The same, to read."""
    weights = ", ".join(f"{size(value)} {name}" for name, value in found["weight_bytes"].items())
    return [
        f"{title}",
        f"  parameters         {found['parameters']:,}, {found['active_parameters']:,} active",
        f"  weights            {weights}",
        f"  KV cache           {size(found['kv_cache_bytes'])} per {TOKENS:,} tokens (16 bits)",
    ]


def size(count: float) -> str:
    """Bytes to read: 61.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
