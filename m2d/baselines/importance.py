"""Structured pruning of a dense model: which layers, channels, heads and neurons stay.

Pure functions of importances from one calibration pass; what is kept keeps its order. Shapes: L
layers, H hidden size, A query heads in G groups (one key and value head each), I FFN neurons.

Sources: depth by the change of the residual stream, Men et al. 2024 (ShortGPT, arXiv:2403.03853);
width by the size of activations, Muralidharan et al. 2024 (Minitron, arXiv:2407.14679).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2d.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class Importance:
    """How much every part of a model matters; only the order within an axis counts."""

    layers: Floats
    """[L]: mean over tokens of 1 - cosine(input, output of the layer)."""
    hidden: Floats
    """[H]: mean over tokens of |output of a norm|, added up over the norms of all layers."""
    heads: Floats
    """[L, A]: mean over tokens of the norm of the head's output, before the output projection."""
    neurons: Floats
    """[L, I]: mean over tokens of |input of the down projection|."""


@dataclass(frozen=True)
class Cut:
    """What stays, as ascending indices; the lists of lists have one item per kept layer."""

    layers: list[int]
    hidden: list[int]
    kv_heads: list[list[int]]
    heads: list[list[int]]
    neurons: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_shape(old: Shape, new: Shape) -> None:
    """Raise a UserError unless `old` can be pruned to `new`."""
    for key, most in asdict(old).items():
        size = getattr(new, key)
        if not 1 <= size <= most:
            option = key.replace("_", "-")
            raise UserError(f"--{option} {size}: must lie between 1 and the teacher's own {most}")
    if new.heads % new.kv_heads:
        raise UserError(
            f"--heads {new.heads}: must be a multiple of --kv-heads {new.kv_heads}; every key and "
            "value head serves as many query heads"
        )
    own, per_group = old.heads // old.kv_heads, new.heads // new.kv_heads
    if per_group > own:
        raise UserError(
            f"--heads {new.heads} with --kv-heads {new.kv_heads}: {per_group} query heads to a key "
            f"and value head, but the teacher has {own}; give fewer heads, or more of the other"
        )


def largest(values: Floats, count: int) -> list[int]:
    """Indices of the `count` largest values, ascending; of equal ones the first."""
    return sorted(int(i) for i in np.argsort(-values, kind="stable")[:count])


def choose_cut(importance: Importance, old: Shape, new: Shape) -> Cut:
    """What to keep of a model of shape `old` for one of shape `new`.

    The most important of each axis. In attention, whole groups stay or go: the new number of
    groups, those whose best query heads (as many as a group will keep) matter most together, and
    within each group its best heads.
    """
    check_shape(old, new)
    layers = largest(importance.layers, new.layers)
    hidden = largest(importance.hidden, new.hidden_size)
    per_group = new.heads // new.kv_heads
    groups, heads, neurons = [], [], []
    for layer in layers:
        by_group = importance.heads[layer].reshape(old.kv_heads, -1)
        best = [largest(group, per_group) for group in by_group]
        together = np.array([group[kept].sum() for group, kept in zip(by_group, best, strict=True)])
        groups.append(largest(together, new.kv_heads))
        heads.append([g * by_group.shape[1] + h for g in groups[-1] for h in best[g]])
        neurons.append(largest(importance.neurons[layer], new.intermediate_size))
    return Cut(layers, hidden, groups, heads, neurons)
