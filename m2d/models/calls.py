"""What decoder layers are given besides hidden states: recorded, and passed on between layers."""

import inspect
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# A layer with such a parameter gives two results; the second one is the next layer's argument.
PASSED_ON = "prev_"
# A layer with this parameter is given the inputs of all layers that began a block before it.
BLOCKS = "block_states"


class Tap(nn.Module):
    """Stands where a decoder layer stood: notes its call and passes `replay` or the input on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        # Some models ask the layer itself, such as for the kind of its attention.
        self.__dict__["stood_here"] = layer
        self.names = list(inspect.signature(layer.forward).parameters)[1:]
        self.hidden: Tensor | None = None
        self.call: dict[str, Any] = {}
        self.replay: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood_here"], name)

    @property
    def passed_on(self) -> str | None:
        """The argument that the layer before gives this one."""
        return next((name for name in self.names if name.startswith(PASSED_ON)), None)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.call.pop(BLOCKS, None)
        output = hidden if self.replay is None else self.replay
        return output if self.passed_on is None else (output, None)


def beginnings(taps: Sequence[Tap]) -> list[int]:
    """The layers whose inputs later ones are given."""
    return [i for i, tap in enumerate(taps) if BLOCKS in tap.names and tap.is_block_boundary]


def with_room(taps: Sequence[Tap], hidden: Tensor) -> Tensor:
    """Hidden states [B, T, H] before the first layer as they pass through the layers.

    That is as they are or, where layers are given the inputs of n layers before them, with room for
    those beside them: [B, T, (1 + n) H].
    """
    count = len(beginnings(taps))
    if not count:
        return hidden
    return torch.cat([hidden, hidden.new_zeros(*hidden.shape[:-1], count * hidden.shape[-1])], -1)


def replay(taps: Sequence[Tap], hidden: Tensor | None) -> None:
    """Have the taps pass on what the layers gave, of states after the last one; None: no longer."""
    first = beginnings(taps)
    states = [None] * (1 + len(first)) if hidden is None else hidden.chunk(1 + len(first), dim=-1)
    taps[-1].replay = states[0]
    for index, given in zip(first, states[1:], strict=True):
        if index:  # the first layer is given the embeddings
            taps[index - 1].replay = given


class Calls:
    """The other arguments of every layer, for every batch. What is equal is held once."""

    def __init__(self, taps: Sequence[Tap]):
        self.taps = taps
        self.recorded: list[list[dict[str, Any]]] = []  # by batch, then by layer
        self.passed_on: list[Any] = []  # by batch, what the layer before has given

    @property
    def between_layers(self) -> bool:
        """Whether layers hand each other more than hidden states."""
        calls = self.recorded[0] if self.recorded else []
        shared = any(isinstance(value, UserDict) for call in calls for value in call.values())
        return shared or any(tap.passed_on for tap in self.taps)

    def record(self) -> None:
        """Note the next batch: what the taps were called with last."""
        before = self.recorded[-1] if self.recorded else [{} for _ in self.taps]
        seen: dict[tuple[int, int], Any] = {}
        self.recorded.append(
            [
                {name: _held_once(value, old.get(name), seen) for name, value in tap.call.items()}
                for tap, old in zip(self.taps, before, strict=True)
            ]
        )
        self.passed_on.append(None)

    def of(self, index: int, batch: int) -> dict[str, Any]:
        """The arguments of layer `index`."""
        call = self.recorded[batch][index]
        name = self.taps[index].passed_on
        return call if name is None or not index else call | {name: self.passed_on[batch]}

    def run(self, layer: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The hidden states after a layer; what it hands on is noted for the next one."""
        if BLOCKS in self.taps[index].names:
            return self._with_blocks(layer, index, batch, hidden)
        output = layer(hidden, **self.of(index, batch))
        if not isinstance(output, tuple):
            return output
        if self.taps[index].passed_on is not None:
            self.passed_on[batch] = output[1]
        return output[0]

    def _with_blocks(self, layer: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The same, where the hidden states have the inputs of earlier layers beside them."""
        first = beginnings(self.taps)
        states = hidden.unflatten(-1, (1 + len(first), -1))
        own, known = states[..., 0, :].contiguous(), sum(other < index for other in first)
        moved = states.clone()
        blocks = states[..., 1 : 1 + known, :].contiguous()
        moved[..., 0, :] = layer(own, **{BLOCKS: blocks}, **self.of(index, batch))
        if index in first:
            moved[..., 1 + known, :] = own
        return moved.flatten(-2)


def _held_once(value: Any, before: Any, seen: dict[tuple[int, int], Any]) -> Any:
    """The earlier batch's object where it is equal; masks and positions mostly are.

    UserDicts, to which layers write what others read, are each batch's own.
    """
    key = (id(value), id(before))
    if key not in seen:
        seen[key] = before if _equal(value, before) else value
    return seen[key]


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, UserDict):
        return False
    if isinstance(one, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and one.device == other.device and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    return isinstance(one, bool | int | float | str) and one == other
