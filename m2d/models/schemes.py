"""How a repository says that its weights are quantised.

In config.json (`quantization_config`, in older ones `compression_config`) or, ModelOpt's, in
hf_quant_config.json. m2d/models/quantized_entries.py finds the tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2d.artifacts import read_json, reading
from m2d.errors import UserError
from m2d.models.quantized import FP8_BLOCK

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
# Of AWQ and GPTQ: where config.json names the layout of the packed integers, and those read.
LAYOUT_KEYS = ("checkpoint_format", "format", "version")
PLAIN = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}

# compressed-tensors' names of an order of columns that `g_idx` must tell.
SHUFFLED = ("group", "dynamic", "true")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's weights are quantised, as far as its tensors do not say themselves."""

    method: str | None = None
    block: tuple[int, int] = FP8_BLOCK
    """Of scaled weights."""
    blocks_only: bool = False
    """Whether config.json says that every scale is one of such a block."""
    bits: int | None = None
    """Of packed integers."""
    group: int | None = None
    """Input columns that share a scale, of packed or int8 weights; None: all."""
    zero_offset: int = 0
    """GPTQ: how much too small the stored zero points are."""
    zero_points: bool = False
    """Whether config.json says that all integers have zero points."""
    shuffled: bool = False
    """Whether config.json says that columns were put into groups in another than their order."""


def read_scheme(folder: Path, config: dict[str, Any]) -> Scheme:
    """The scheme that config.json and ModelOpt's file name.

    Raises UserError, with its name, for one that m2d does not read, and for two that disagree.
    """
    found = []
    for settings, where in _settings(folder, config):
        with reading(where, "a config that says how its weights are quantised"):
            found.append((_kind(settings), _scheme(settings, where), where))
    if not found:
        return Scheme()
    (kind, scheme, first), *others = found
    for other, own, where in others:
        alike = own == scheme or "modelopt" in (own.method, scheme.method)  # which says no sizes
        if other != kind or not alike:
            what = other if other != kind else f"{kind} of other sizes"
            raise UserError(
                f"{where}: says that the weights are {what}, and {first} that they are {kind}; "
                "remove what is wrong"
            )
    return scheme


def _kind(settings: dict[str, Any]) -> str:
    """What settings say of the numbers themselves, whichever program's words they use."""
    method = str(settings.get("quant_method"))
    said = settings.get({"modelopt": "quant_algo", "compressed-tensors": "format"}.get(method, ""))
    for kind in ("nvfp4", "fp8"):
        if kind in f"{method} {said}".lower() or (kind, said) == ("fp8", "float-quantized"):
            return kind
    return str(said or method)


def _scheme(settings: dict[str, Any], where: Path) -> Scheme:
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
    block = settings.get("weight_block_size")
    if block is None:
        return Scheme(method)
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(map(_positive, block))):
        raise UserError(f"{where}: weight_block_size is {block!r}; it must be two positive numbers")
    return Scheme(method, (block[0], block[1]), blocks_only=True)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _settings(folder: Path, config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Path]]:
    """All that is said of the quantisation, and where; what counts comes first."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in QUANTISATION_KEYS:
            if found := part.get(key):
                if not isinstance(found, dict):
                    raise UserError(f"{folder / 'config.json'}: {key} must be an object")
                if key == "compression_config":
                    found = {"quant_method": "compressed-tensors", **found}
                yield found, folder / "config.json"
    file = folder / MODELOPT_FILE
    if file.is_file():
        inner = read_json(file).get("quantization")
        if not isinstance(inner, dict):
            raise UserError(f"{file}: has no quantization section")
        yield {**inner, "quant_method": "modelopt"}, file


def _compressed(settings: dict[str, Any], refuse: Callable[[str], UserError]) -> Scheme:
    groups = [g for g in (settings.get("config_groups") or {}).values() if isinstance(g, dict)]
    layouts = [settings.get("format"), *(g["format"] for g in groups if g.get("format"))]
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    unread = [one for one in layouts if one not in FORMATS] + [sparsity] * (sparsity != "dense")
    if unread:
        raise refuse(f"compressed-tensors' {unread[0]}")
    if (settings.get("transform_config") or {}).get("config_groups"):
        # The weights are of rotated activations, which only a program that rotates these has.
        raise refuse("compressed-tensors' transforms")
    weights = [g["weights"] for g in groups if isinstance(g.get("weights"), dict)]
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
    return Scheme(
        "compressed-tensors",
        (block[0], block[1]),
        bits=bits,
        group=group if _positive(group) else None,
        zero_points=bool(integers) and all(w.get("symmetric") is False for w in integers),
        shuffled=any(str(w.get("actorder")).lower() in SHUFFLED for w in integers),
    )


def _integers(method: str, settings: dict[str, Any], refuse: Callable[[str], UserError]) -> Scheme:
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size"))
    named = {str(settings[key]).lower() for key in LAYOUT_KEYS if settings.get(key)}
    if settings.get("is_marlin_format"):
        named.add("marlin")
    if str(settings.get("backend")).lower() == "llm-awq":
        named.add("llm-awq")
    plain = PLAIN[method]
    stored = " and ".join(sorted(named - {*plain}) or sorted(named) or plain[:1])
    if bits not in ((4,) if method == "awq" else (2, 4, 8)) or stored not in plain:
        raise refuse(f"{method} of {bits} bits in the layout {stored!r}")
    if settings.get("rotation"):
        raise refuse(f"{method} after a rotation ({settings['rotation']})")
    offset = 1 if stored == "gptq" and method == "gptq" else 0
    return Scheme(
        method,
        bits=bits,
        group=group if _positive(group) else None,
        zero_offset=offset,
        shuffled=method == "gptq" and bool(settings.get("desc_act")),
    )
