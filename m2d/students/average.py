"""Groups of experts put together: their averages, one below the other or side by side.

Shapes: H hidden size, I expert intermediate size.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m2d.choose.plan import Group, LayerPlan


def merge_gate_or_up(
    read: Callable[[int], Tensor], plan: LayerPlan, down: bool = False
) -> list[Tensor]:
    """The groups' averages, each [group width, H]: one below the other, a gate or up projection.

    read(expert) gives the expert's tensor [I, H] or bias [I]. A group of one is copied exactly.
    down: of a down projection [H, I] that is not scaled.
    """
    return [_select(_average(read, group), group, int(down)) for group in plan.groups]


def merge_down(
    read: Callable[[int], Tensor], plan: LayerPlan, weight: float = 1.0
) -> Iterator[Tensor]:
    """The groups' averages [H, group width], each times its scale: side by side, down projections.

    read(expert) gives the expert's tensor [H, I]. weight: with which the student itself will
    multiply the result. Products are rounded once, from float32.
    """
    for group in plan.groups:
        yield _select(_average(read, group), group, 1) * (group.scale / weight)


def merge_down_bias(read: Callable[[int], Tensor], plan: LayerPlan, weight: float = 1.0) -> Tensor:
    """Bias of the down projection [H]: the groups' averages, each times its scale, added up."""
    total: Tensor | float = 0.0
    for group in plan.groups:
        part = _average(read, group)
        total = total + part.float() * (group.scale / weight)
    assert isinstance(total, Tensor)
    return total.to(part.dtype)


def _average(read: Callable[[int], Tensor], group: Group) -> Tensor:
    if len(group.experts) == 1:
        return read(group.experts[0])
    total = None
    for expert, weight in zip(group.experts, group.weights, strict=True):
        tensor = read(expert)
        part = tensor.float() * weight  # summed in float32, rounded once
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(tensor.dtype)


def _select(tensor: Tensor, group: Group, axis: int) -> Tensor:
    """The intermediate neurons that the group keeps, all if it names none."""
    if group.neurons is None:
        return tensor
    return tensor.index_select(axis, torch.tensor(group.neurons, device=tensor.device))
