"""Whether a student computes what its teacher computes outside the feed-forward networks.

Only FFNs are converted; embeddings, attention, norms and head are copied. Their weights are the
same bytes, but the student's class reads another config.json: tying, sliding windows, rotary
embeddings, multipliers and whatever a class derives from its keys must come out alike. So both
classes run on a few tokens with FFNs that give zero, layer by layer, before anything is written.
"""

import contextlib
import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.devices import release_freed_memory
from m2d.errors import UserError, first_line
from m2d.models.calls import Calls, Tap, replay, with_room
from m2d.models.checkpoint import Checkpoint, require_finite
from m2d.models.families import Family
from m2d.models.skeleton import (
    are_experts,
    layers_of,
    layers_path,
    make_skeleton,
    replace_layers,
    text_paths,
)
from m2d.models.stream import drop_weights
from m2d.models.teacher import RETURNS, Teacher
from m2d.students.tensors import source_name

TOKENS = 24
WINDOW = 8  # sliding windows are shortened to it, so that few tokens show them
TOLERANCE = 1e-4


class _NoExperts(nn.Module):
    """Stands where the experts stood, and gives zeros."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden)


@torch.no_grad()
def check_trunk(teacher: Teacher, student_config: dict[str, Any]) -> None:
    """Raise a UserError where a student of that config.json is another model outside its FFNs."""
    student = CONFIG_MAPPING[student_config["model_type"]].from_dict(dict(student_config))
    configs = [copy.deepcopy(teacher.skeleton.config), student]
    for key, value in RETURNS.items():
        setattr(student.get_text_config(), key, value)
    _shorten_windows(configs)
    read = Checkpoint(teacher.folder).read
    vocabulary = int(teacher.config.vocab_size)
    ids = (torch.arange(1, TOKENS + 1) * 7919 % vocabulary)[None]
    family = teacher.family
    ours_of = partial(source_name, family)
    theirs = _Trunk(configs[0], teacher, read, ids)
    ours = _Trunk(configs[1], teacher, lambda name: read(ours_of(name)), ids)
    _compare(theirs.hidden, ours.hidden, teacher, "embeddings")
    for index in range(len(theirs.layers)):
        _compare(theirs.step(index), ours.step(index), teacher, f"attention of layer {index}")
    _compare(theirs.logits(), ours.logits(), teacher, "output head")


def _compare(theirs: Tensor, ours: Tensor, teacher: Teacher, what: str) -> None:
    difference = float((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise UserError(
            f"{teacher.folder}: the {what} of a {teacher.family.student_architecture} with this "
            f"config.json would compute something else (relative difference {difference:.2g}); "
            "the student is not written"
        )


def _shorten_windows(configs: list[PretrainedConfig]) -> None:
    """Make long sliding windows short, different ones to different lengths."""
    lengths: dict[int, int] = {}
    for config in configs:
        text = config.get_text_config()
        window = getattr(text, "sliding_window", None)
        if isinstance(window, int) and window > WINDOW:
            text.sliding_window = lengths.setdefault(window, WINDOW - len(lengths))


class _AtTheHead(Exception):
    """Ends a forward pass."""


def _stop(*_: Any) -> None:
    raise _AtTheHead


def _zeros(_: str, shape: torch.Size) -> Tensor:
    """Of any shape, in no memory."""
    return torch.zeros(1).expand(shape)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))


class _Trunk:
    """A stock class without its FFNs, run layer by layer in float32."""

    def __init__(
        self,
        config: PretrainedConfig,
        teacher: Teacher,
        read: Callable[[str], Tensor],
        ids: Tensor,
    ):
        self.read, self.ids, self.family = read, ids, teacher.family
        config.dtype = torch.float32
        self.folder = teacher.folder
        self.model = make_skeleton(config, teacher.folder)
        self.layers = list(layers_of(self.model))
        self.prefix = f"{layers_path(self.model)}."
        taps = [Tap(layer) for layer in self.layers]
        self.taps = taps
        replace_layers(self.model, taps)
        self.tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        # Embedding and head are the largest weights: one of them at a time is in memory.
        self.embedding = self._names(self.model.get_input_embeddings()) - self.tied
        self.head = self._names(self.model.get_output_embeddings()) - self.tied - self.embedding
        self._fill_but(self.tied | self.head)
        self.model.tie_weights()
        self._run_to_the_head()
        self._set(self.embedding, _zeros)
        assert taps[0].hidden is not None
        self.hidden: Tensor = with_room(taps, taps[0].hidden)
        self.calls = Calls(taps)
        self.calls.record()

    def _run_to_the_head(self) -> None:
        """Let the layers note how they are called; the head has no weights yet."""
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(_stop) if head is not None else None
        try:
            with contextlib.suppress(_AtTheHead):
                self.model(self.ids, use_cache=False, logits_to_keep=1)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(
                f"{self.folder}: a {type(self.model).__name__} with this config.json cannot run "
                f"({first_line(error)}); the student is not written"
            ) from error
        finally:
            if handle is not None:
                handle.remove()

    def _names(self, module: nn.Module | None) -> set[str]:
        """The names of a module's own parameters in the whole model."""
        own = {id(parameter) for parameter in module.parameters()} if module else set()
        named = self.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if id(parameter) in own}

    def _fill_but(self, left_out: set[str]) -> None:
        for path in text_paths(self.model):
            prefix = f"{path}." if path else ""
            part = self.model.get_submodule(path)
            self._fill(part, prefix, {n.removeprefix(prefix) for n in left_out}.__contains__)

    def _set(self, names: set[str], value_of: Callable[[str, torch.Size], Tensor]) -> None:
        """Give parameters of the whole model other values, and what is tied to them."""
        for name in names:
            _replace(self.model, name, value_of(name, self.model.get_parameter(name).shape))
        self.model.tie_weights()

    def _fill(self, module: nn.Module, prefix: str, skip: Callable[[str], bool]) -> None:
        """Give a module its weights; zeros where `skip` says so."""
        for name, parameter in list(module.named_parameters()):
            value_of = _zeros if skip(name) else self._weight
            _replace(module, name, value_of(prefix + name, parameter.shape))

    def _weight(self, name: str, shape: torch.Size) -> Tensor:
        value = self.read(name)
        require_finite(value, name)
        if value.shape != shape:
            raise UserError(
                f"{name} is {list(value.shape)}, but the student's config implies {list(shape)}"
            )
        return value.float()

    def step(self, index: int) -> Tensor:
        """The hidden states [1, T, H] after a layer whose FFN gives zero."""
        layer = self.layers[index]
        inside = feed_forward_paths(self.family, layer)
        for path, module in list(layer.named_modules()):
            if path and are_experts(module):
                layer.set_submodule(path, _NoExperts())
        self._fill(layer, f"{self.prefix}{index}.", lambda name: name.startswith(inside))
        self.hidden = self.calls.run(layer, index, 0, self.hidden)
        drop_weights(layer)
        release_freed_memory()
        return self.hidden

    def logits(self) -> Tensor:
        """The logits [1, T, V] of the last hidden states."""
        replay(self.taps, self.hidden)
        again = self.head or self.embedding
        self._set(again, self._weight)
        logits = self.model(self.ids, use_cache=False).logits
        self._set(again, _zeros)
        return logits


def feed_forward_paths(family: Family, layer: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of a layer's parameters that belong to its FFN, in either model.

    In hybrids the mixer of a layer is an FFN or something else.
    """
    block = family.block
    paths = [path for path in (block, family.dense, family.shared) if path]
    names = [name for name, _ in layer.named_parameters()]

    def is_ffn(path: str) -> bool:
        own = [name.removeprefix(f"{path}.") for name in names if name.startswith(f"{path}.")]
        return any(re.match(r"(experts\.|shared|gate$|(gate_)?up_proj|w1)", name) for name in own)

    kept = [path for path in paths if is_ffn(path)]
    if not block:
        kept.append(family.router.partition(".")[0])  # its rows are of the experts' number
    return tuple(f"{path}." for path in kept)
