"""What a stock class wants of a checkpoint, and whether the checkpoint has just that.

A model's parameters are those of its class on the meta device. Fused experts, one parameter for all
of a layer, are wanted expert by expert, under the canonical names of m2d/models/layouts.py. The
check reads headers alone, so it costs nothing: it stands before every use of weights.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint
from m2d.models.entries import AnyEntry, Entry, blocks
from m2d.models.families import FUSED
from m2d.models.skeleton import above, are_experts, in_text, layers_path, own_parameter, stack_of

# Of old checkpoints: buffers that every version of their classes computes itself.
COMPUTED = re.compile(r".*\.(rotary_emb\.(inv_freq|(cos|sin)_cached)|masked_bias)")
# Heads that predict more than the next token.
MTP = re.compile(r"(?:^|\.)mtp(?:\.|_)")


@dataclass(frozen=True)
class Fused:
    """A parameter that holds one projection, or gate and up together, of all experts of a layer."""

    name: str
    path: str
    """Of the experts' module."""
    shape: tuple[int, ...]
    """[E, ...], also of one whose experts are no axis of their own."""
    parts: tuple[str, ...]
    """The canonical projections in it, such as gate_proj.weight and up_proj.weight."""
    transposed: bool
    """Whether its weights are [E, in, out]."""
    rows: bool
    """Whether the parameter is [E * I, H]."""
    interleaved: bool
    """Whether gate and up alternate rather than follow one another."""

    def names(self, expert: int) -> list[str]:
        """Canonical names of one expert's tensors."""
        return [f"{self.path}.{expert}.{part}" for part in self.parts]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of one canonical tensor: [out, in], or [out] of a bias."""
        own = self.shape[1:]
        if len(own) == 2 and self.transposed:
            own = own[::-1]
        return (own[0] // len(self.parts), *own[1:])

    def join(self, tensors: list[Tensor]) -> Tensor:
        """One expert's item of the parameter, from its tensors in the order of `parts`."""
        if len(tensors) == 1:
            whole = tensors[0]
        elif self.interleaved:
            whole = torch.stack(tensors, dim=1).flatten(0, 1)
        else:
            whole = torch.cat(tensors)
        return whole.T if whole.dim() == 2 and self.transposed else whole


@dataclass(frozen=True)
class Wanted:
    """The tensors of a stock class."""

    plain: dict[str, tuple[int, ...]]
    """Name -> shape, of parameters and stored buffers, but for fused experts."""
    fused: dict[str, Fused]
    """By the parameter's name."""
    tied: dict[str, str]
    """Name -> the one it is the same tensor as."""
    floating: frozenset[str]
    """Those of `plain` that are in floating point."""
    unused: tuple[str, ...]
    """Regular expressions of what the class knows of and leaves in the file."""
    computed: tuple[str, ...]
    """Regular expressions of what the class makes itself where the file lacks it."""
    text_only: bool = False
    """Whether parts other than the text model are left aside."""
    layers: str = "model.layers"
    """Module path of the decoder layers."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, of everything."""
        found = dict(self.plain)
        for one in self.fused.values():
            found |= {n: one.own_shape for e in range(one.shape[0]) for n in one.names(e)}
        return found


def wanted_of(model: PreTrainedModel, text_only: bool = False) -> Wanted:
    """What a class on the meta device wants; text_only: for its text model alone."""
    of_text = in_text(model) if text_only else lambda _: True
    fused: dict[str, Fused] = {}
    for path, module in model.named_modules():
        if are_experts(module):
            for stem in FUSED:
                for name in (stem, f"{stem}_bias"):
                    if own_parameter(module, name) is not None:
                        fused[f"{path}.{name}"] = _fused(path, name, module)
    state = {
        name: t for name, t in model.state_dict().items() if name not in fused and of_text(name)
    }
    return Wanted(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        fused,
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
        frozenset(name for name, tensor in state.items() if tensor.is_floating_point()),
        tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
        text_only,
        layers_path(model),
    )


def _fused(path: str, name: str, module: nn.Module) -> Fused:
    projections, stack = FUSED[name.removesuffix("_bias")], stack_of(module)
    kind = "bias" if name.endswith("_bias") else "weight"
    parts = tuple(f"{part}.{kind}" for part in projections)
    shape: tuple[int, ...] = tuple(cast(Tensor, own_parameter(module, name)).shape)
    transposed = stack.transposed
    if stack.rows:
        shape, transposed = (stack.count, stack.width, stack.size), projections == ("down_proj",)
    interleaved = not getattr(module, "is_concatenated", True)
    return Fused(f"{path}.{name}", path, shape, parts, transposed, stack.rows, interleaved)


def check_tensors(checkpoint: Checkpoint, wanted: Wanted) -> None:
    """Raise a UserError unless the checkpoint has the tensors that the class wants, and no others.

    Left aside are what the class itself ignores, layers beyond the last that config.json counts as
    extra (for multi-token prediction), and a tied tensor beside its twin, if the two are equal.
    """
    shapes, entries, folder = wanted.shapes(), checkpoint.entries, checkpoint.folder
    made = [re.compile(pattern) for pattern in wanted.computed]
    missing = [
        name
        for name in shapes
        if name not in entries
        and wanted.tied.get(name) not in entries
        and not any(pattern.search(name) for pattern in made)
    ]
    others = [name for name in entries if name not in shapes]
    extra = [name for name in others if not _unused(name, wanted, checkpoint)]
    if missing or extra:
        raise UserError(
            f"{folder}: not the weights that its config.json describes: "
            + " and ".join(_count(missing, "missing") + _count(extra, "more than the model has"))
        )
    for name, shape in shapes.items():
        if name in entries:
            _check_one(checkpoint, name, entries[name], shape, wanted)
    for name, twin in wanted.tied.items():
        if name in entries and twin in entries and not _equal(entries[name], entries[twin]):
            raise UserError(
                f"{folder}: config.json ties {name} to {twin}, but the two differ on disk, and "
                "programs do not agree on which counts; set tie_word_embeddings to false, or "
                f"remove {name}"
            )


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Of a composite config.json, what it says of the text model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _count(names: list[str], what: str) -> list[str]:
    tensors = "tensor is" if len(names) == 1 else "tensors are"
    return [f"{len(names)} {tensors} {what} ({names[0]})"] if names else []


def _check_one(
    checkpoint: Checkpoint, name: str, entry: AnyEntry, shape: tuple[int, ...], wanted: Wanted
) -> None:
    if entry.shape != shape:
        raise UserError(
            f"{checkpoint.folder}: {name} is {list(entry.shape)} on disk, but the config implies "
            f"{list(shape)}"
        )
    floats = name in wanted.floating or name not in wanted.plain
    if floats and not (entry.dtype.is_floating_point and entry.dtype.itemsize > 1):
        raise UserError(
            f"{checkpoint.folder}: {name} is {str(entry.dtype).removeprefix('torch.')}, which is "
            "no weight without a scale"
        )


def _unused(name: str, wanted: Wanted, checkpoint: Checkpoint) -> bool:
    if COMPUTED.fullmatch(name) or any(re.search(part, name) for part in wanted.unused):
        return True
    if wanted.text_only and not name.startswith(above(wanted.layers)):
        return True
    if MTP.search(name):
        return True
    config = text_part(checkpoint.config)
    layers, extra = (config.get(k) for k in ("num_hidden_layers", "num_nextn_predict_layers"))
    match = re.match(re.escape(wanted.layers) + r"\.(\d+)\.", name)
    return bool(
        match
        and isinstance(layers, int)
        and isinstance(extra, int)
        and layers <= int(match[1]) < layers + extra
    )


def _equal(one: AnyEntry, other: AnyEntry) -> bool:
    """Whether two tensors on disk have the same bytes."""
    if not (isinstance(one, Entry) and isinstance(other, Entry)):
        return False
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if (one.file, one.start) == (other.file, other.start):
        return True
    pairs = zip(blocks(one, "", bytearray(2**20)), blocks(other, "", bytearray(2**20)), strict=True)
    return all(a == b for a, b in pairs)


def is_buffer(model: nn.Module, name: str) -> bool:
    """Whether a tensor of the state is a buffer."""
    path, _, last = name.rpartition(".")
    return last in model.get_submodule(path)._buffers
