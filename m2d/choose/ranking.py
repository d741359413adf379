"""A ranking: what a scoring method says of one layer, and its form as data.

One ranking serves every K, since the kept experts are always a prefix of the order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2d.choose.layer_statistics import Indices, LayerStatistics, Vector
from m2d.errors import UserError

FORMAT = 1
LARGEST = 1e300  # beyond it a whole number of JSON is no float64
DIGITS = 12  # significant digits kept on disk: rounding noise must not look like a new ranking


@dataclass(frozen=True, eq=False)
class Ranking:
    """Experts from best to worst, and the importance that merging and scaling use."""

    order: Indices
    """[E] expert ids, best first; the first K are kept."""
    importance: Vector
    """[E] by expert id, none negative."""


def by_importance(importance: Vector) -> Ranking:
    """The ranking of a plain score: highest first, the lower expert id first among equals."""
    return Ranking(np.argsort(-importance, kind="stable").astype(np.int64), importance)


def round_significant(value: float, digits: int = DIGITS) -> float:
    """`value` at so many significant decimal digits, and never -0.0."""
    return float(f"{value:.{digits - 1}e}") + 0.0


def rankings_to_dict(
    scoring: str,
    layers: Sequence[LayerStatistics],
    rankings: Sequence[Ranking],
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """The content of rankings/{scoring}.json; equal rankings give equal dicts.

    fingerprint: of the teacher whose statistics these are.
    """
    return {
        "format": FORMAT,
        "scoring": scoring,
        "teacher_fingerprint": fingerprint,
        "layers": [
            {
                "layer": layer.layer,
                "order": [int(expert) for expert in ranking.order],
                "importance": [round_significant(float(value)) for value in ranking.importance],
            }
            for layer, ranking in zip(layers, rankings, strict=True)
        ],
    }


def rankings_from_dict(data: Any, layers: Sequence[LayerStatistics]) -> tuple[str, list[Ranking]]:
    """The scoring method and one Ranking per layer of `layers`, in that order.

    Raises UserError when `data` is not a ranking, or not one of these layers and experts.
    """
    keys = set(data) if isinstance(data, Mapping) else set()
    if keys - {"teacher_fingerprint"} != {"format", "scoring", "layers"}:
        raise UserError("not a ranking: its keys must be format, scoring, layers")
    if data["format"] != FORMAT:
        raise UserError(f"ranking of format {data['format']!r}; this version reads {FORMAT}")
    if not isinstance(data["scoring"], str) or not isinstance(data["layers"], list):
        raise UserError("not a ranking: scoring must be a string and layers a list")
    found: dict[int, Mapping] = {}
    for entry in data["layers"]:
        if not isinstance(entry, Mapping) or set(entry) != {"layer", "order", "importance"}:
            raise UserError("not a ranking: a layer's keys must be layer, order, importance")
        if type(entry["layer"]) is not int:
            raise UserError("not a ranking: a layer's layer must be a whole number")
        found[entry["layer"]] = entry
    expected = [layer.layer for layer in layers]
    if sorted(found) != sorted(expected) or len(data["layers"]) != len(expected):
        raise UserError(
            f"the ranking covers layers {sorted(found)}, the statistics {sorted(expected)}; "
            "rank again from these statistics"
        )
    return data["scoring"], [_checked(found[layer.layer], layer) for layer in layers]


def _checked(entry: Mapping, layer: LayerStatistics) -> Ranking:
    experts, order, importance = layer.num_experts, entry["order"], entry["importance"]
    if not _numbers(order, experts) or sorted(order) != list(range(experts)):
        raise UserError(
            f"layer {layer.layer}: the ranking's order must name each of the {experts} experts once"
        )
    if not _numbers(importance, experts) or not all(0 <= value <= LARGEST for value in importance):
        raise UserError(
            f"layer {layer.layer}: the ranking's importance must be {experts} numbers, "
            "none negative"
        )
    return Ranking(np.array(order, dtype=np.int64), np.array(importance, dtype=np.float64))


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) for value in values)
    )
