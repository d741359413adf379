"""Layers run one after the other over all batches, against a model that runs batch by batch."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2d.models.calls import Calls, Tap


class Layer(nn.Module):
    """Uses all that stock layers are known to be given: ids, a store that all layers share, and
    what the layer before has handed on, which the first and every other layer ignores."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.kind = "odd" if index % 2 else "even"

    def forward(
        self,
        hidden: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        store: Any = None,
        prev_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.index == 0:
            store["first"] = hidden.sum(-1, keepdim=True)
        handed = prev_state if self.index % 2 else ids[..., None] * 0.5 + hidden
        assert handed is not None
        assert mask is not None
        out = torch.tanh(hidden * mask + handed) + store["first"]
        return out, handed + 1


def run(layers: Any, ids: Tensor) -> Tensor:
    """As stock models do it: the mask by its name, ids by their place."""
    hidden = torch.stack([ids.sin(), ids.cos()], -1)
    mask = torch.linspace(0, 1, ids.shape[1])[:, None]
    store: UserDict[str, Tensor] = UserDict()
    state = None
    for layer in layers:
        hidden, state = layer(hidden, ids, mask=mask, store=store, prev_state=state)
    return hidden


@pytest.fixture
def recorded() -> tuple[list[Layer], list[Tensor], Calls, list[Tensor]]:
    layers = [Layer(i) for i in range(4)]
    taps = [Tap(layer) for layer in layers]
    batches = [torch.arange(10.0).view(2, 5) + 7 * i for i in range(2)] + [torch.ones(1, 5)]
    calls, hidden = Calls(taps), []
    for ids in batches:
        run(taps, ids)
        calls.record()
        assert taps[0].hidden is not None
        hidden.append(taps[0].hidden)
    return layers, batches, calls, hidden


def test_every_batch_is_given_its_own(recorded: Any) -> None:
    """ids of two batches differ though their shapes are alike; what layers write stays apart."""
    layers, batches, calls, hidden = recorded
    for index, layer in enumerate(layers):
        for i in range(len(batches)):
            hidden[i] = calls.run(layer, index, i, hidden[i])
    for ids, found in zip(batches, hidden, strict=True):
        assert torch.equal(found, run(layers, ids))


def test_what_is_equal_is_held_once(recorded: Any) -> None:
    _, _, calls, _ = recorded
    first, second, _ = (batch[1] for batch in calls.recorded)
    assert first["mask"] is second["mask"]
    assert first["ids"] is not second["ids"]
    assert first["store"] is not second["store"]
    assert calls.recorded[0][0]["store"] is calls.recorded[0][3]["store"]
    assert calls.between_layers


def test_a_tap_answers_for_its_layer() -> None:
    tap = Tap(Layer(3))
    assert tap.kind == "odd"
    assert tap.passed_on == "prev_state"
